"""What autocast must not round.

Losses take differences of a network in its times. Rounded to the 8 bits of bfloat16, the embeddings of b + h and b − h
are the same number or differ by a unit of rounding, whatever the derivative is. So times, everything computed from them
once a sample, the patches that enter and those that leave stay in float32; the matrix products over tokens, which are
all of the cost, are left to autocast. Errors of the products are not seen by a subtraction any better, which is why the
step of a difference depends on the precision (docs/scale.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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
