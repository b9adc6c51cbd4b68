r"""Distances from pairwise statistics: unbiased multi-scale RBF MMD, energy distance.

    MMD²(P, Q)   = E k(x, x') + E k(y, y') − 2 E k(x, y)          k = mean over scales of exp(−d²/(2 h²))
    energy(P, Q) = 2 E ‖x − y‖ − E ‖x − x'‖ − E ‖y − y'‖

Both are estimated without the diagonal (U-statistics), so their expectation at P = Q is 0 and they may come out
negative. Both are means of a kernel over pairs, so the two-sample test of :mod:`two_sample` serves both.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.metrics.finite import check_finite

PairKernel = Callable[[Tensor], Tensor]  # of squared distances
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
BLOCK = 2048


def energy_kernel(squared: Tensor) -> Tensor:
    """−‖x − y‖: with it, the MMD formula is the energy distance.

    Args:
        squared: ‖x − y‖².

    Returns:
        k, of the same shape.
    """
    return -squared.clamp_min(0).sqrt()


def rbf_kernel(bandwidth: float, scales: tuple[float, ...] = SCALES) -> PairKernel:
    """Mean of Gaussian kernels at bandwidth × scales.

    Args:
        bandwidth: h.
        scales: its multiples.

    Returns:
        k of squared distances.
    """

    def kernel(squared: Tensor) -> Tensor:
        total = torch.zeros_like(squared)
        for scale in scales:
            total += torch.exp(squared / (-2 * (bandwidth * scale) ** 2))
        return total / len(scales)

    return kernel


def median_distance(x: Tensor, limit: int = 2000) -> float:
    """Median pairwise distance of (up to limit of) the points, the usual bandwidth.

    Args:
        x: points (n, d).
        limit: how many are looked at.

    Returns:
        The distance.
    """
    points = x[:: max(1, len(x) // limit)][:limit]
    return float(torch.pdist(points).median().clamp_min(1e-12))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖², (n, m).

    Args:
        x: (n, d).
        y: (m, d).

    Returns:
        (n, m).
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def _mean_within(x: Tensor, kernel: PairKernel) -> float:
    """Mean of k(x_i, x_j) over i ≠ j."""
    n = len(x)
    total = 0.0
    for rows in x.split(BLOCK):
        total += float(kernel(squared_distances(rows, x)).sum(dtype=torch.float64))
    diagonal = n * float(kernel(torch.zeros((), dtype=x.dtype)))
    return (total - diagonal) / (n * (n - 1))


def _mean_across(x: Tensor, y: Tensor, kernel: PairKernel) -> float:
    total = sum(float(kernel(squared_distances(rows, y)).sum(dtype=torch.float64)) for rows in x.split(BLOCK))
    return total / (len(x) * len(y))


def _prepared(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < 2:
        raise InputError(
            f"two samples of at least 2 points and one event shape are needed, got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    return check_finite(x.detach(), "samples").flatten(1), check_finite(y.detach(), "samples").flatten(1)


def _discrepancy(x: Tensor, y: Tensor, kernel: PairKernel) -> float:
    return _mean_within(x, kernel) + _mean_within(y, kernel) - 2 * _mean_across(x, y, kernel)


def mmd_squared(x: Tensor, y: Tensor, bandwidth: float | None = None) -> float:
    """Unbiased MMD² between samples (n, *event) and (m, *event); bandwidth: the pooled median distance.

    Args:
        x: (n, *event).
        y: (m, *event).
        bandwidth: h; None: the pooled median distance.

    Returns:
        MMD², about 0 for one law; it may be negative.
    """
    x, y = _prepared(x, y)
    if bandwidth is None:
        bandwidth = median_distance(torch.cat([x, y]))
    if not bandwidth > 0:
        raise InputError(f"bandwidth must be positive, got {bandwidth}")
    return _discrepancy(x, y, rbf_kernel(bandwidth))


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Unbiased energy distance (squared form) between samples (n, *event) and (m, *event).

    Args:
        x: (n, *event).
        y: (m, *event).

    Returns:
        2 E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖; it may be negative.
    """
    return _discrepancy(*_prepared(x, y), energy_kernel)
