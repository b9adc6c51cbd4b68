r"""What a transformer's forward pass costs, counted from its configuration: multiply-adds of matrix products, twice.

A sample of N tokens of width W through one block: 2 N W (3W + W + 2H) for projections and perceptron of hidden width H,
4 N² W for attention, 12 W² for the modulation. A training step is three forward passes: one, and two of their size for
the gradients of inputs and weights; a call that is differentiated forward in time is three as well (primal, tangent,
and the attention's products once more), without the backward two.
"""

from collections.abc import Mapping
from typing import Any


def forward_flops(config: Mapping[str, Any]) -> float:
    """FLOPs of one sample through a DiT of this configuration."""
    width, depth, patch = (int(config[key]) for key in ("width", "depth", "patch"))
    channels, tokens = int(config["channels"]), (int(config["size"]) // patch) ** 2
    hidden = round(config.get("mlp_ratio", 4.0) * width)
    block = 2 * tokens * width * (4 * width + 2 * hidden) + 4 * tokens**2 * width + 12 * width**2
    pixels = patch * patch * channels
    patches = 2 * (2 * tokens * pixels * width)  # of the state and of the context
    final = 2 * tokens * width * pixels + 4 * width**2
    times = 5 * 2 * (256 * width + width**2) + 4 * width**2  # five embeddings of times, the gate of the context
    return float(depth * block + patches + final + times)
