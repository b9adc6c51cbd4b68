r"""Does the truth look like one more posterior draw?

For an image b with draws x¹ … x^N ~ p(·|context_b) and the truth x⁰ ~ p(·|context_b) the N + 1 images are
exchangeable, so the rank r of the truth among them is uniform on 0..N **at every pixel**. Ranks of neighbouring pixels
are dependent, so they are not 𝒫 independent observations and a χ² table would be wrong. What is exact is the image:
any of the N + 1 could have been the truth. With the rank of *every* image j at every pixel, the discrete Legendre
polynomials φ₁ (a line) and φ₂ (a parabola) of the rank, orthonormal on 0..N, give each image three features,

    bias        f = mean over pixels of φ₁           truth above or below the draws
    spread      f = mean over pixels of φ₂           truth outside (> 0) or inside (< 0) the draws
    dependence  f = (mean over pixels of φ₁)²        truth's pixels move together more (> 0) or less than the draws'

each centred over j. If every j were the truth with equal chance, independently over images, ``Σ_b f(j_b, b)`` would
have mean 0 and variance ``V = Σ_b mean_j f(j, b)²``; the **statistic** is the largest of the three scores
``|Σ_b f(0, b)| / √V``, and its null law is drawn by choosing the j_b so. ``p = (1 + #{null ≥ observed}) / (1 + R)``
is a valid p-value at any number of images, draws and pixels, whatever the dependence between pixels.

Data on a grid (8 bits, or the 17 grey levels of digits) put the truth *on* the grid and draws between its points:
``resolution`` rounds both to it first, and ties are broken at random. Clamp the draws to the range of the data too.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.metrics.finite import finite_rows
from metaflowmaps.random import rand

FEATURES = ("bias", "spread", "dependence")
BLOCK = 2**22  # values ranked at a time


class RankTest(NamedTuple):
    """The statistic, its p-value, the signed scores of its parts, the truth's ranks, and the scale of its errors."""

    statistic: float
    p_value: float
    scores: dict[str, float]  # by FEATURES; standard deviations under the null
    histogram: Tensor  # (N + 1,) int64: how often each rank occurs, over images and pixels
    spread_ratio: float


def rank_statistics(
    samples: Tensor, truth: Tensor, generator: torch.Generator | None = None, resolution: float = 0.0
) -> Tensor:
    """Rank 0..N of the truth (B, *event) among draws (N, B, *event) at each pixel: (B, P) int64.

    Args:
        samples: draws (N, B, *event).
        truth: (B, *event).
        generator: breaks ties.
        resolution: step of the data's grid, to which both are rounded; 0: none.

    Returns:
        Ranks (B, P), int64.
    """
    pooled = _pooled(samples, truth, resolution)
    return torch.cat([ranks[0] for ranks in _ranks(pooled, generator)])


def rank_test(
    samples: Tensor,
    truth: Tensor,
    relabellings: int = 999,
    generator: torch.Generator | None = None,
    resolution: float = 0.0,
) -> RankTest:
    """Are truth (B, *event) and draws (N, B, *event) exchangeable, image by image?

    Args:
        samples: draws (N, B, *event), N >= 2.
        truth: (B, *event).
        relabellings: R of the null law.
        generator: of ties and relabellings.
        resolution: step of the data's grid; 0: none.

    Returns:
        Statistic, p-value, scores, ranks and the spread ratio.
    """
    if relabellings < 1:
        raise InputError(f"relabellings must be at least 1 (999 resolves p = .001), got {relabellings}")
    pooled = _pooled(samples, truth, resolution)
    count, images = pooled.shape[:2]
    line, parabola = _polynomials(count)
    histogram = torch.zeros(count, dtype=torch.int64)
    parts = []
    for ranks in _ranks(pooled, generator):
        histogram += torch.bincount(ranks[0].flatten(), minlength=count)
        first = line[ranks].mean(2)
        parts.append(torch.stack([first, parabola[ranks].mean(2), first.square()]))
    features = torch.cat(parts, 2)  # (3, N + 1, B)
    features -= features.mean(1, keepdim=True)
    scale = features.square().mean(1).sum(1).sqrt()
    # pixels in exact opposition leave no bias to any image: such a part says nothing
    features = torch.where(scale[:, None, None] > 1e-9, features / scale[:, None, None], 0.0)
    scores = features[:, 0].sum(1)
    chosen = (rand((relabellings, images), generator, torch.float64) * count).long()
    null = features[:, chosen, torch.arange(images)].sum(2).abs().amax(0)
    observed = scores.abs().max()
    # a relabelling that equals the observed one must count, whatever the rounding
    exceed = int((null >= observed * (1 - 1e-12)).sum())
    return RankTest(
        float(observed),
        (1 + exceed) / (1 + relabellings),
        dict(zip(FEATURES, scores.tolist(), strict=True)),
        histogram,
        spread_ratio(samples, truth),
    )


def spread_ratio(samples: Tensor, truth: Tensor) -> float:
    """√(Σ (truth − mean of draws)² / ((1 + 1/N) Σ variance of draws)): 1 when calibrated, > 1 when draws are narrow.

    Sums run over images and pixels, so that constant pixels do not matter. Bias counts as error.

    Args:
        samples: draws (N, B, *event).
        truth: (B, *event).

    Returns:
        The ratio.
    """
    pooled = _pooled(samples, truth, 0.0)
    pooled = pooled - pooled[1]  # equal draws then have exactly no spread
    draws = pooled[1:]
    error = float((pooled[0] - draws.mean(0)).square().sum())
    spread = (1 + 1 / len(draws)) * float(draws.var(0).sum())
    if spread == 0:
        return 1.0 if error == 0 else math.inf
    return math.sqrt(error / spread)


def _pooled(samples: Tensor, truth: Tensor, resolution: float) -> Tensor:
    """The truth and then the draws, (N + 1, B, P) float64, on the grid."""
    if samples.ndim < 3 or samples.shape[1:] != truth.shape or samples.shape[0] < 2:
        raise InputError(
            f"draws (N, B, *event), N >= 2, and truth (B, *event) are needed, got {tuple(samples.shape)} and "
            f"{tuple(truth.shape)}"
        )
    if not 0 <= resolution < math.inf:
        raise InputError(f"resolution is the grid's step (0: none), got {resolution}")
    pooled = torch.cat([finite_rows(truth, "true images")[None], finite_rows(samples, "draws")]).flatten(2)
    return (pooled / resolution).round() if resolution else pooled


def _ranks(pooled: Tensor, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Ranks 0..N of every image at every pixel, ties at random: blocks (N + 1, b, P) of images."""
    for values in pooled.split(max(1, BLOCK // (pooled.shape[0] * pooled.shape[2])), 1):
        shuffle = rand(tuple(values.shape), generator, torch.float64).argsort(0)
        order = shuffle.gather(0, values.gather(0, shuffle).argsort(dim=0, stable=True))
        yield order.argsort(0)


def _polynomials(count: int) -> tuple[Tensor, Tensor]:
    """φ₁ and φ₂ on 0..N: orthogonal to 1 and to each other, of mean square 1; count >= 3."""
    u = torch.arange(count, dtype=torch.float64) - (count - 1) / 2
    line = u / u.square().mean().sqrt()
    parabola = line.square() - 1
    return line, parabola / parabola.square().mean().sqrt()
