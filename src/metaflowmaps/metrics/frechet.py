r"""Fréchet distance between Gaussians fitted to two sets of features.

    d² = |μ_x − μ_y|² + tr C_x + tr C_y − 2 tr (C_x^{1/2} C_y C_x^{1/2})^{1/2}

the **square** of a metric (the squared W2 of the two Gaussians), which is what FID reports. With any factors
``C = Fᵀ F``, ``F_x = U C_x^{1/2}`` for a partial isometry U, so the last trace is the nuclear norm of
``C_x^{1/2} C_y^{1/2}`` and that of ``F_x F_yᵀ``: no root of a matrix is taken, and singular covariances (fewer rows
than features) need no care. F is the centred data over √(n − 1), or the triangular factor of it when that is smaller.

Of a reference that only its mean and covariance are known of (a statistics file), the factor is the root of the latter.

The estimate is biased upwards by about 1/n: compare only at equal n, and with what two halves of one set are apart.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaflowmaps._files import check_regular
from metaflowmaps._shapes import as_numbers
from metaflowmaps.errors import InputError
from metaflowmaps.metrics.finite import check_finite, finite_rows


class Moments(NamedTuple):
    """A Gaussian: mean (d,) and a factor F with Fᵀ F its covariance (d, d)."""

    mean: Tensor
    factor: Tensor


def moments(x: Tensor) -> Moments:
    """The Gaussian fitted to features (n, d), in float64.

    Args:
        x: features, finite.

    Returns:
        Mean (d,) and factor of the covariance.
    """
    x = finite_rows(x, "features")
    if x.ndim != 2:
        raise InputError(f"features (n, d) are needed, got {tuple(x.shape)}")
    return Moments(x.mean(0), _factor(x))


def read_statistics(path: str | Path) -> Moments:
    """The ``mu`` and ``sigma`` of an .npz file, such as the reference batches of ADM hold.

    Args:
        path: the file.

    Returns:
        Mean (d,) and factor of the covariance.
    """
    if Path(path).suffix in (".pkl", ".pickle"):
        raise InputError(
            f"{path} is a pickle, which may run anything when it is read: convert one that you trust, such as EDM2's, "
            "with d = pickle.load(open(FILE, 'rb'))['fid']; numpy.savez('stats.npz', mu=d['mu'], sigma=d['sigma'])"
        )
    try:
        check_regular(Path(path))
        with np.load(path) as file:
            mean, covariance = (as_numbers(torch.from_numpy(file[key]), key) for key in ("mu", "sigma"))
    except Exception as error:  # anything can be in a file, and its parser may trip over it in any way
        text = " ".join(str(error).split())
        raise InputError(
            f"{path} is no statistics file ({text[:80]}): give an .npz with mu (d,) and sigma (d, d)"
        ) from None
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise InputError(
            f"{path} has mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}: (d,) and (d, d) are needed"
        )
    for name, held in (("mu", mean), ("sigma", covariance)):
        check_finite(held, f"{name} of {path},")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    most = float(covariance.abs().max())
    uneven = float((covariance - covariance.T).abs().max())
    # rounding of float32 leaves 1e-7 of the largest below 0, times the number of features
    if min(float(values.min()), -uneven) < -1e-3 * most:
        raise InputError(
            f"{path} is no statistics file: its sigma is no covariance, symmetric and with no negative part"
        )
    return Moments(mean, values.clamp_min(0).sqrt()[:, None] * vectors.T)


def frechet_distance(x: Tensor | Moments, y: Tensor | Moments) -> float:
    """d² between Gaussians, those fitted to features (n, d) and (m, d) where features are given, in float64.

    Args:
        x: features (n, d), or their moments.
        y: features (m, d), or their moments.

    Returns:
        d², the square of a metric.
    """
    (mean_x, a), (mean_y, b) = (one if isinstance(one, Moments) else moments(one) for one in (x, y))
    for held in (mean_x, a, mean_y, b):
        check_finite(held, "moments")
    if mean_x.shape != mean_y.shape:
        raise InputError(f"the features differ in number, {len(mean_x)} and {len(mean_y)}: they must be of one kind")
    shift = (mean_x - mean_y).square().sum()
    common = torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, float(shift + a.square().sum() + b.square().sum() - 2 * common))


def _factor(x: Tensor) -> Tensor:
    """F (min(n, d), d) with Fᵀ F the sample covariance."""
    centred: Tensor = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    if len(x) > x.shape[1]:
        centred = torch.linalg.qr(centred, mode="r").R
    return centred
