r"""Rewards measured from pixels in [−1, 1], with p = (x + 1)/2 as the amount of ink at a pixel.

``Ink``     r(x) = λ mean p                          stroke weight
``Slant``   r(x) = −λ Σ p (u − ū)(v − v̄) / Σ p (v − v̄)²    lean to the right: columns u gained a row v upwards
"""

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, positive
from metaflowmaps.errors import InputError


class Ink:
    """r(x) = strength · mean of (x + 1)/2 over channels and pixels.

    Args:
        strength: λ, which the reward is multiplied by.

    Examples:
        >>> mfm.rewards.Ink(strength=2.0)(torch.ones(3, 1, 8, 8))
        tensor([2., 2., 2.])
    """

    differentiable = True

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = positive(strength, "strength", or_zero=True)

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        _check(x, "Ink")
        return self.strength * (x.flatten(1).mean(1) + 1) / 2

    def __repr__(self) -> str:
        return f"Ink(strength={self.strength:g})"


class Slant:
    """r(x) = strength · the shear of the ink: columns to the right for each row upwards; 0 for an empty image.

    Args:
        strength: λ, which the reward is multiplied by.

    Examples:
        >>> mfm.rewards.Slant()(torch.eye(8).flip(0)[None, None]).shape
        torch.Size([1])
    """

    differentiable = True

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = positive(strength, "strength", or_zero=True)

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        _check(x, "Slant")
        ink = ((x + 1) / 2).clamp_min(0).mean(1)
        height, width = ink.shape[1:]
        total = ink.sum((1, 2), keepdim=True).clamp_min(1e-6)
        v = torch.arange(height, dtype=x.dtype, device=x.device)[None, :, None]
        u = torch.arange(width, dtype=x.dtype, device=x.device)[None, None, :]
        v = v - (ink * v).sum((1, 2), keepdim=True) / total
        u = u - (ink * u).sum((1, 2), keepdim=True) / total
        rise = (ink * v.square()).sum((1, 2))
        floor = 1e-3 * (1 + total[:, 0, 0])  # a stroke of no height has no slant, an empty image no steep gradient
        return -self.strength * (ink * u * v).sum((1, 2)) / (rise + floor)

    def __repr__(self) -> str:
        return f"Slant(strength={self.strength:g})"


def _check(x: Tensor, who: str) -> None:
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise InputError(f"{who} works on pictures (B, C, H, W), got {tuple(x.shape)}")
