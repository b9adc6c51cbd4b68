r"""Predicted data held in the range that data have: a fixed one, or one that each sample sets for itself.

A network that was trained on images in [−1, 1] may predict data outside; over many steps, and under guidance, such
predictions drift off. The predicted noise follows what is left of the prediction: ``E = (y − b D)/a``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import expand_time, positive
from metaflowmaps.errors import InputError

Clip = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DynamicThreshold:
    """Each sample is held to ±s and divided by s/least, s a quantile of its own |D|, ``least`` or more.

    Args:
        quantile: of a sample's coordinates, in absolute value.
        least: the bound of the data's own range; a sample within it stays as it is.

    Examples:
        >>> clip = mfm.DynamicThreshold(quantile=0.9)
        >>> clip(torch.tensor([[0.5, -0.5, 4.0]])).abs().max() <= 1
        tensor(True)
    """

    quantile: float = 0.995
    least: float = 1.0

    def __post_init__(self) -> None:
        positive(self.least, "least")
        if not 0 < self.quantile <= 1:
            raise InputError(f"quantile must lie in (0, 1], got {self.quantile}")

    def __call__(self, data: Tensor) -> Tensor:
        """D (B, *event) -> the same, within ±least."""
        sizes = data.detach().abs().flatten(1).to(torch.promote_types(data.dtype, torch.float32))
        bound = expand_time(sizes.quantile(self.quantile, 1).clamp_min(self.least).to(data), data)
        return torch.minimum(torch.maximum(data, -bound), bound) * (self.least / bound)


def clip_of(given: Any) -> Clip | None:
    """What ``wrap``'s ``clip`` means: None, c for [−c, c], (low, high), or a :class:`DynamicThreshold`."""
    if given is None or isinstance(given, DynamicThreshold):
        return given
    pair = (-given, given) if isinstance(given, int | float) and not isinstance(given, bool) else given
    numbers = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(n, int | float) for n in pair)
    if not numbers or not all(math.isfinite(n) for n in pair) or not pair[0] < pair[1]:
        raise InputError(f"clip is c for [−c, c], (low, high) or mfm.DynamicThreshold(), got {given!r}")
    low, high = map(float, pair)
    return lambda data: data.clamp(low, high)
