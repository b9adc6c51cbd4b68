"""What autocast must not round.

Losses take differences of a network in its times. Rounded to the 8 bits of bfloat16, the embeddings of b + h and b − h
are the same number or differ by a unit of rounding, whatever the derivative is. So times, everything computed from them
once a sample, the patches that enter and those that leave stay in float32; the matrix products over tokens, which are
all of the cost, are left to autocast. Errors of the products are not seen by a subtraction any better, which is why the
step of a difference depends on the precision (docs/scale.md).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for this kind of device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


@contextmanager
def unrounded(*inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The inputs, in float32 at least and without autocast while it lasts; untouched where there is none."""
    device = inputs[0].device
    if not autocasting(device):
        yield inputs
        return
    with torch.autocast(device.type, enabled=False):
        yield tuple(x if x.dtype == torch.float64 else x.float() for x in inputs)


@torch.no_grad()
def hold_rounded(network: nn.Module, call: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> int:
    """Hold in ``dtype`` the matrices that autocast rounds to it at every use: nothing that it computes changes.

    Args:
        network: changed in place; not compiled, and frozen.
        call: runs every part of it once.
        device: where it is.
        dtype: bfloat16, say.

    Returns:
        How many matrices were rounded.
    """
    rounded: dict[nn.Module, bool] = {}

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        rounded[layer] = rounded.get(layer, True) and autocasting(device)

    layers = [
        m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d) and not parametrize.is_parametrized(m)
    ]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.autocast(device.type, dtype):
            call()
    finally:
        for hook in hooks:
            hook.remove()
    chosen = [layer for layer in layers if rounded.get(layer)]
    for layer in chosen:
        layer.weight.data = layer.weight.data.to(dtype)  # type: ignore[union-attr, operator]
    return len(chosen)
