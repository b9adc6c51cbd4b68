r"""Fréchet distance between Gaussians fitted to two sets of features.

    d² = |μ_x − μ_y|² + tr C_x + tr C_y − 2 tr (C_x^{1/2} C_y C_x^{1/2})^{1/2}

the **square** of a metric (the squared W2 of the two Gaussians), which is what FID reports. With any factors
``C = Fᵀ F``, ``F_x = U C_x^{1/2}`` for a partial isometry U, so the last trace is the nuclear norm of
``C_x^{1/2} C_y^{1/2}`` and that of ``F_x F_yᵀ``: no root of a matrix is taken, and singular covariances (fewer rows
than features) need no care. F is the centred data over √(n − 1), or the triangular factor of it when that is smaller.

The estimate is biased upwards by about 1/n: compare only at equal n, and with :func:`frechet_floor`.
"""

import torch
from torch import Tensor

from metaflowmaps.errors import InputError


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """d² between Gaussians fitted to features (n, d) and (m, d), in float64."""
    x, y = finite_rows(x, "features"), finite_rows(y, "features")
    if x.ndim != 2 or x.shape[1:] != y.shape[1:]:
        raise InputError(f"two feature arrays (n, d) and (m, d) are needed, got {tuple(x.shape)} and {tuple(y.shape)}")
    a, b = _factor(x), _factor(y)
    shift = (x.mean(0) - y.mean(0)).square().sum()
    common = torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float(shift + a.square().sum() + b.square().sum() - 2 * common))


def frechet_floor(x: Tensor, splits: int = 4, generator: torch.Generator | None = None) -> float:
    """The mean of d² between random disjoint halves of features (n, d): what n/2 rows of one law are apart."""
    if splits < 1 or len(x) < 4:
        raise InputError(f"a floor needs 4 rows and 1 split at least, got {len(x)} and {splits}")
    total, half = 0.0, len(x) // 2
    for _ in range(splits):
        order = torch.randperm(len(x), generator=generator).to(x.device)
        total += frechet_distance(x[order[:half]], x[order[half : 2 * half]])
    return total / splits


def finite_rows(x: Tensor, what: str, least: int = 2) -> Tensor:
    """x (n, …) in float64 on the CPU, refused when it has too few rows, no columns or a value that is not finite."""
    if x.ndim < 2 or len(x) < least or x[0].numel() == 0:
        raise InputError(f"{what} of at least {least} rows (n, …) are needed, got shape {tuple(x.shape)}")
    x = x.detach().to("cpu", torch.float64)
    if not x.isfinite().all():
        raise InputError(f"{what} of shape {tuple(x.shape)} hold NaN or infinite values: remove those rows")
    return x


def _factor(x: Tensor) -> Tensor:
    """F (min(n, d), d) with Fᵀ F the sample covariance."""
    centred: Tensor = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    if len(x) > x.shape[1]:
        centred = torch.linalg.qr(centred, mode="r").R
    return centred
