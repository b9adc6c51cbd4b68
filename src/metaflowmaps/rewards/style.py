r"""Rewards measured from pixels in [−1, 1], with p = (x + 1)/2 as the amount of ink at a pixel.

``Ink``     r(x) = λ mean p                          stroke weight
``Slant``   r(x) = −λ Σ p (u − ū)(v − v̄) / Σ p (v − v̄)²    lean to the right: columns u gained a row v upwards

``Colour``     r(x) = λ mean ⟨p − p̄, d⟩      p̄ the grey of a pixel (its mean over red, green and blue), d the unit
                                            vector of the wanted colour less its own grey: greys count nothing
``Symmetry``   r(x) = −λ mean (p − p')²       p' the picture in a mirror, left for right
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, as_numbers, positive
from metaflowmaps.errors import InputError, unknown

COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "orange": (1.0, 0.5, 0.0),
    "yellow": (1.0, 1.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.4, 1.0),
    "purple": (0.5, 0.0, 1.0),
    "pink": (1.0, 0.0, 0.5),
}
LEAST_CHROMA = 1e-3


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


class Colour:
    """r(x) = strength · how much of a colour there is, a mean over pixels; its opposite counts against it.

    Args:
        colour: a name of :data:`COLOURS`, or red, green and blue in [0, 1].
        strength: λ, which the reward is multiplied by.

    Examples:
        >>> blue = mfm.rewards.Colour("blue")
        >>> picture = torch.tensor([-1.0, -1.0, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
        >>> bool(blue(picture) > 0 > blue(-picture))
        True
    """

    differentiable = True

    def __init__(self, colour: str | Sequence[float], strength: float = 1.0) -> None:
        if isinstance(colour, str) and colour not in COLOURS:
            raise unknown("colour", colour, tuple(COLOURS))
        rgb = as_numbers(COLOURS[colour] if isinstance(colour, str) else colour, "colour")
        if rgb.shape != (3,) or not bool(((rgb >= 0) & (rgb <= 1)).all()):
            raise InputError(f"colour must be red, green and blue in [0, 1], such as (0, 0.4, 1), got {rgb.tolist()}")
        chroma = rgb - rgb.mean()
        if float(chroma.norm()) < LEAST_CHROMA:
            raise InputError(f"colour {tuple(rgb.tolist())} is a grey, which has no hue: mfm.rewards.Ink is brightness")
        self.colour, self.direction = colour, chroma / chroma.norm()
        self.strength = positive(strength, "strength", or_zero=True)

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape[1:]:
            raise InputError(
                f"Colour is of pictures in colour (B, 3, H, W), got {tuple(x.shape)}: take a map of such, as emoji"
            )
        # the direction sums to 0 over channels, so a pixel's own grey drops out
        mean = (x.mean((2, 3)) + 1) / 2
        along: Tensor = mean @ self.direction.to(x)
        return self.strength * along

    def __repr__(self) -> str:
        return f"Colour({self.colour!r}, strength={self.strength:g})"


class Symmetry:
    """r(x) = −strength · the mean squared difference to the picture in a mirror; 0 where both halves are alike.

    Args:
        strength: λ, which the reward is multiplied by.

    Examples:
        >>> picture = torch.zeros(1, 3, 8, 8)
        >>> picture[..., 0] = 1.0  # a line on the left alone
        >>> mfm.rewards.Symmetry()(torch.cat([picture, picture + picture.flip(3)]))
        tensor([-0.0625, -0.0000])
    """

    differentiable = True

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = positive(strength, "strength", or_zero=True)

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        _check(x, "Symmetry")
        return -self.strength * ((x - x.flip(3)) / 2).square().flatten(1).mean(1)

    def __repr__(self) -> str:
        return f"Symmetry(strength={self.strength:g})"


def _check(x: Tensor, who: str) -> None:
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise InputError(f"{who} works on pictures (B, C, H, W), got {tuple(x.shape)}")
