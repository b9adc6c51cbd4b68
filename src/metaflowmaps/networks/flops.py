r"""What a transformer's forward pass costs, counted from its configuration: multiply-adds of matrix products, twice.

A sample of N tokens of width W through one block: 2 N W (3W + W + 2H) for projections and perceptron of hidden width H,
4 N² W for attention, 12 W² for the modulation; what embeds times and scales is counted once. A training step is three
forward passes: one, and two of their size for the gradients of inputs and weights. A call that is differentiated in
forward mode counts three as well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from metaflowmaps.networks.embed import TimeFeatures


def forward_flops(config: Mapping[str, Any]) -> float:
    """FLOPs of one sample through a DiT of this configuration."""
    width, depth, patch = (int(config[key]) for key in ("width", "depth", "patch"))
    tokens, pixels = (int(config["size"]) // patch) ** 2, patch * patch * int(config["channels"])
    hidden: int = round(config.get("mlp_ratio", 4.0) * width)
    block = tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width + 6 * width**2
    ends = 3 * tokens * pixels * width + 2 * width**2  # patches of the state and the context in, patches out
    times = 5 * (256 * width + width**2) + 2 * width**2  # five embeddings, the gate of the context
    return 2.0 * (depth * block + ends + times + _guidance(config.get("guidance", False), width))


def _guidance(guidance: bool | Sequence[float], width: int) -> int:
    """Multiply-adds of the embedding of a scale: features of it through two layers, or a row of a table."""
    if isinstance(guidance, bool):
        return (TimeFeatures(1).features + width) * width if guidance else 0
    return len(guidance) * width
