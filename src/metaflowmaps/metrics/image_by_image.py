"""Image by image: peak signal-to-noise ratio; and how far class frequencies are from those asked for."""

import torch
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.metrics.finite import check_finite, finite_rows

CAP = 100.0  # decibels: what identical images are given


def psnr(x: Tensor, y: Tensor, data_range: float = 2.0) -> Tensor:
    """10 log10(data_range² / mean square difference) of each row of x and y (B, *event): (B,), at most CAP.

    Args:
        x: images.
        y: images of the same shape.
        data_range: highest minus lowest possible value.

    Returns:
        Decibels, (B,).
    """
    x, y = finite_rows(x, "images", 1), finite_rows(y, "images", 1)
    if x.shape != y.shape:
        raise InputError(f"two image batches of one shape are needed, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not 0 < data_range < float("inf"):
        raise InputError(f"data_range must be positive (2 for images in [−1, 1]), got {data_range}")
    return (10 * (data_range**2 / (x - y).square().flatten(1).mean(1)).log10()).clamp_max(CAP)


def class_distance(frequencies: Tensor, target: Tensor) -> float:
    """‖frequencies − target‖ of two vectors (K,) of class frequencies, each summing to 1.

    Args:
        frequencies: (K,).
        target: (K,).

    Returns:
        The Euclidean distance.
    """
    vectors = []
    for vector in (frequencies, target):
        vector = vector.detach().to("cpu", torch.float64)
        check_finite(vector, "class frequencies")
        # frequencies in float32 sum to 1 within K roundings
        if vector.ndim != 1 or not (vector >= 0).all() or abs(float(vector.sum()) - 1) > 1e-4:
            raise InputError("class frequencies are a vector (K,) of numbers >= 0 that sum to 1: divide counts by n")
        vectors.append(vector)
    if len(vectors[0]) != len(vectors[1]):
        raise InputError(f"{len(vectors[0])} frequencies for {len(vectors[1])} classes: both vectors must be (K,)")
    return float((vectors[0] - vectors[1]).norm())
