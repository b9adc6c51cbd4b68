r"""How different are the samples from one another?

The **Vendi score** is the effective number of distinct samples: with a kernel of unit diagonal, K/n has eigenvalues
λ_i that sum to 1, and the score is ``exp(−Σ λ_i log λ_i)``, from 1 (all alike) to n (all orthogonal).
For the cosine kernel ``K/n = Z Zᵀ/n`` shares its nonzero eigenvalues with ``Zᵀ Z/n``: the smaller one is used.
"""

import torch
from torch import Tensor

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.metrics.finite import finite_rows
from metaflowmaps.metrics.kernels import _mean_within, energy_kernel, median_distance, rbf_kernel, squared_distances


def mean_pairwise_distance(x: Tensor) -> float:
    """Mean of ‖x_i − x_j‖ over i ≠ j of samples (n, *event).

    Args:
        x: samples.

    Returns:
        The mean distance.
    """
    return -_mean_within(finite_rows(x, "samples").flatten(1), energy_kernel)


def vendi_score(x: Tensor, kernel: str = "cosine", bandwidth: float | None = None) -> float:
    """The Vendi score of samples (n, *event); rbf: exp(−d²/(2 bandwidth²)), by default at the median distance.

    Args:
        x: samples.
        kernel: ``cosine`` or ``rbf``.
        bandwidth: of the latter; None: the median distance.

    Returns:
        The effective number of distinct samples, 1 to n.
    """
    points = finite_rows(x, "samples").flatten(1)
    n, d = points.shape
    if kernel == "cosine":
        norms = points.norm(dim=1, keepdim=True)
        if not (norms > 0).all():
            raise InputError("the cosine of a zero sample is not defined: remove such rows, or use kernel='rbf'")
        unit = points / norms
        gram = unit.T @ unit if n > d else unit @ unit.T
    elif kernel == "rbf":
        width = median_distance(points) if bandwidth is None else bandwidth
        if not width > 0:
            raise InputError(f"bandwidth must be positive, got {bandwidth}")
        gram = rbf_kernel(width, (1.0,))(squared_distances(points, points))
    else:
        raise unknown("kernel", kernel, ("cosine", "rbf"))
    share = torch.linalg.eigvalsh(gram / n).clamp_min(0)  # rounding dips below 0
    return float(torch.special.entr(share).sum().exp())
