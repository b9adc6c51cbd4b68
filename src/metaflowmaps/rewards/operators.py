"""What a camera does to a picture: linear observation operators for :class:`metaflowmaps.rewards.InverseProblem`.

Each is a callable on a batch, in the dtype and on the device of that batch, and differentiable. Nothing about an
operator has to be declared: any function of (B, *event) that returns one row a sample serves as well.
"""

import math
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import as_numbers, check_count, check_state, positive
from metaflowmaps.errors import InputError


class Mask:
    """A(x) = the p coordinates of x where mask = 1, as a flat vector: (B, *event) -> (B, p).

    Not mask · x: an observation holds what was seen and nothing else. Noise on it is noise on p numbers, ‖y − A(x)‖²/σ²
    has p degrees of freedom, and no constant from noise at hidden pixels enters the reward.

    Args:
        mask: 1 (observed) or 0 (hidden), in the shape of one sample.

    Examples:
        >>> left = torch.zeros(1, 8, 8)
        >>> left[..., :4] = 1
        >>> mfm.rewards.Mask(left)(torch.ones(2, 1, 8, 8)).shape  # what was seen, flat
        torch.Size([2, 32])
    """

    def __init__(self, mask: Any) -> None:
        given = as_numbers(mask, "mask")
        if not bool(((given == 0) | (given == 1)).all()):
            raise InputError(
                "mask must hold 1 (observed) and 0 (hidden) only; compare a picture to a level: mask > 0.5"
            )
        if not bool(given.any()):
            raise InputError("mask observes nothing: it needs at least one 1")
        self.mask = given.bool()
        self.index = given.flatten().nonzero()[:, 0]

    def __call__(self, x: Tensor) -> Tensor:
        """A(x), one row a sample."""
        check_state(x)
        if x.shape[1:] != self.mask.shape:
            raise InputError(
                f"the mask has shape {tuple(self.mask.shape)} and a sample {tuple(x.shape[1:])}: "
                "give a mask in the shape of one sample (mask.expand(*event_shape) shares it among channels)"
            )
        return x.flatten(1).index_select(1, self.index.to(x.device))

    def __repr__(self) -> str:
        return f"Mask(shape={tuple(self.mask.shape)}, observed={len(self.index)})"


class Blur:
    """A(x) = K_H x K_Wᵀ a channel, K_ij = Σ_{m: clamp(i+m) = j} k_m, k_m ∝ exp(−m²/(2 std²)), Σ k_m = 1: (B, C, H, W).

    Pixels beyond the border are copies of the border's (replicate padding): a constant picture stays as it is and a
    kernel may be larger than the picture. Two matrix products: exact in float32, where a convolution may run in TF32.

    Args:
        std: of the kernel, in pixels.
        kernel_size: odd; None: 2⌈3 std⌉ + 1.

    Examples:
        >>> blur = mfm.rewards.Blur(1.0)
        >>> blur(torch.ones(1, 1, 8, 8)).shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(self, std: float, kernel_size: int | None = None) -> None:
        self.std = positive(std, "std")
        size = 2 * math.ceil(3 * self.std) + 1 if kernel_size is None else kernel_size
        check_count(size, "kernel_size")
        if size % 2 == 0:
            raise InputError(f"kernel_size must be odd, got {size}; use {size + 1}")
        self.kernel_size = size

    @property
    def kernel(self) -> Tensor:
        """k_{−h} … k_h, h = (kernel_size − 1)/2: the weights along one axis."""
        return (-0.5 * (self._offsets() / self.std).square()).softmax(0)

    def matrix(self, n: int) -> Tensor:
        """K for an axis of n pixels: (n, n), rows sum to 1."""
        target = (torch.arange(n)[:, None] + self._offsets().long()).clamp(0, n - 1)
        return torch.zeros(n, n, dtype=torch.float64).scatter_add(1, target, self.kernel.expand(n, -1))

    def __call__(self, x: Tensor) -> Tensor:
        """A(x), one row a sample."""
        _check_images(x, "Blur")
        return self.matrix(x.shape[2]).to(x) @ x @ self.matrix(x.shape[3]).to(x).mT

    def _offsets(self) -> Tensor:
        half = self.kernel_size // 2
        return torch.arange(-half, half + 1, dtype=torch.float64)

    def __repr__(self) -> str:
        return f"Blur(std={self.std:g}, kernel_size={self.kernel_size})"


class Downsample:
    """A(x) = the mean over factor × factor blocks: (B, C, H, W) -> (B, C, H/factor, W/factor).

    Args:
        factor: side of a block, in pixels.

    Examples:
        >>> half = mfm.rewards.Downsample(2)
        >>> half(torch.ones(1, 1, 8, 8)).shape
        torch.Size([1, 1, 4, 4])
    """

    def __init__(self, factor: int) -> None:
        check_count(factor, "factor")
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        """A(x), one row a sample."""
        _check_images(x, "Downsample")
        f, (height, width) = self.factor, x.shape[2:]
        if height % f or width % f:
            raise InputError(
                f"Downsample({f}) needs a height and width that {f} divides, got {height} × {width}: "
                f"crop to {height - height % f} × {width - width % f} or choose another factor"
            )
        blocks: Tensor = x.unflatten(3, (width // f, f)).unflatten(2, (height // f, f))
        return blocks.mean((3, 5))

    def __repr__(self) -> str:
        return f"Downsample({self.factor})"


def _check_images(x: Tensor, who: str) -> None:
    check_state(x)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise InputError(
            f"{who} works on pictures (B, C, H, W), got {tuple(x.shape)}: reshape, as in x.reshape(len(x), C, H, W)"
        )
