r"""What a network's forward pass costs, read off torch's own counter on the meta device: nothing is computed.

A multiply-add counts two. A training step is three forward passes: one, and two of its size for the gradients of
inputs and weights; a call that is differentiated in forward mode counts three as well.
"""

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from metaflowmaps.networks import NetworkConfig
from metaflowmaps.networks.classifiers import Classifier


def on_meta(config: NetworkConfig, event_shape: tuple[int, ...]) -> nn.Module:
    """A network of which only shapes exist."""
    with torch.device("meta"):
        return config.network(event_shape)


def forward_flops(network: nn.Module) -> float:
    """FLOPs of one sample through a network: its matrix products and convolutions.

    Args:
        network: one that :func:`on_meta` made, or any other (which is then run once).
    """
    first, shape = next(network.parameters()), tuple(network.event_shape)  # type: ignore[arg-type]
    x, t = first.new_empty(1, *shape), first.new_zeros(1)
    if isinstance(network, Classifier):
        inputs: tuple[Tensor, ...] = (x,)
    else:
        inputs = (x, t, t, x, t, *([t.long()] if network.num_classes else []))
    # the fused attention of a processor is not among what torch counts, the composed one is
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(*inputs)
    return float(counter.get_total_flops())
