r"""Resampling: ancestors for S systems of M weighted particles, unbiased: particle m has M w_m children on average
(or a given number of them in place of M).

    multinomial   M independent choices
    stratified    one in each M-th of the unit interval
    systematic    the same with one uniform for all
    residual      ⌊M w_m⌋ for certain, the rest multinomial

A weight of zero (log-weight −inf) has no children. Systems whose weights are all zero keep their particles.

Every resampling makes families: particles that descend from one ancestor decide as one. How many are left in effect
bounds what a cloud knows of the weights of modes, whatever its number of particles.
"""

import math

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count
from metaflowmaps.errors import unknown
from metaflowmaps.random import Source, rand

FEW_FAMILIES = 1 / 8  # of the samples: their weights of modes are then up to √(1 + 8) times as far off as exact ones'
RESAMPLERS = ("systematic", "stratified", "multinomial", "residual")


def resample(
    kind: str, log_weights: Tensor, generator: Source | None = None, num_children: int | None = None
) -> Tensor:
    """Ancestors from unnormalised log-weights (S, M): (S, num_children), M where nobody says."""
    systems, particles = log_weights.shape
    count = particles if num_children is None else num_children
    dead = log_weights.amax(1, keepdim=True) == -torch.inf
    weights = torch.where(dead, torch.zeros_like(log_weights), log_weights).double().softmax(1)
    if kind == "multinomial":
        points = rand((systems, count), generator, torch.float64, log_weights.device)
        ancestors = _at(weights, points)
    elif kind in ("systematic", "stratified"):
        offset = rand((systems, 1 if kind == "systematic" else count), generator, torch.float64, log_weights.device)
        strata = torch.arange(count, dtype=torch.float64, device=log_weights.device)
        ancestors = _at(weights, (strata + offset) / count)
    elif kind == "residual":
        certain = (weights * count + 1e-9).floor()
        rest = (weights * count - certain).clamp_min(0)
        filled = certain.sum(1, keepdim=True)
        points = rand((systems, count), generator, torch.float64, log_weights.device)
        chosen = _at(_normalised(rest, weights), points)
        places = torch.arange(count, device=log_weights.device)[None]
        ordered = torch.searchsorted(certain.cumsum(1), places.double().expand(systems, -1).contiguous(), right=True)
        ancestors = torch.where(places < filled, ordered.clamp_max(particles - 1), chosen)
    else:
        raise unknown("resampler", kind, RESAMPLERS)
    return torch.where(dead, torch.arange(count, device=log_weights.device)[None] % particles, ancestors)


def _normalised(rest: Tensor, weights: Tensor) -> Tensor:
    total = rest.sum(1, keepdim=True)
    return torch.where(total > 0, rest / total.clamp_min(1e-300), weights)


def _at(weights: Tensor, points: Tensor) -> Tensor:
    """The particle whose stretch of the cumulated weights holds each point; one of weight zero has no stretch."""
    edges = weights.cumsum(1)
    edges = edges / edges[:, -1:]
    index = torch.searchsorted(edges, points.contiguous(), right=True)
    last = (weights > 0).long() * torch.arange(weights.shape[1], device=weights.device)
    return torch.minimum(index, last.amax(1, keepdim=True))


def check_particles(particles: int | None) -> None:
    """Refuse a system of no particles; None is all rows of a batch."""
    if particles is not None:
        check_count(particles, "particles")


def by_system(values: Tensor, size: int) -> Tensor:
    """Rows m·S + s, particle m of system s, as systems: (M·S,) -> (S, M)."""
    return values.reshape(size, -1).T


def rows_of_systems(ancestors: Tensor) -> Tensor:
    """Indices (S, k) of particles within their systems as rows of the batch: (k·S,)."""
    systems = len(ancestors)
    return (ancestors * systems + torch.arange(systems, device=ancestors.device)[:, None]).T.flatten()


def effective(log_weights: Tensor) -> Tensor:
    """ESS (Σw)²/Σw² of each system: (S,); all particles where every weight is zero."""
    out = torch.exp(2 * torch.logsumexp(log_weights, 1) - torch.logsumexp(2 * log_weights, 1))
    return torch.where(out.isnan(), torch.full_like(out, log_weights.shape[1]), out)


def families(founders: Tensor, size: int) -> Tensor:
    """The effective number of founders that the particles of each system descend from, (Σ share²)^−1: (S,)."""
    of_systems = by_system(founders, size)
    apart = int(founders.max()) + 1
    systems = torch.arange(len(of_systems), device=founders.device)
    seen, counts = (of_systems + apart * systems[:, None]).unique(return_counts=True)
    squares = torch.zeros(len(of_systems), dtype=torch.float64, device=founders.device)
    return size**2 / squares.index_add(0, seen // apart, counts.double().square())


def few_families(founders: Tensor, samples: Tensor, instead: str) -> list[str]:
    """A line where the families (S,) of systems that return so many samples (S,) are few."""
    in_all = float(len(founders) ** 2 / (1 / founders).sum())
    if in_all >= FEW_FAMILIES * float(samples.sum()):
        return []
    return [
        f"the samples descend from {in_all:.0f} first ones in effect: modes may be missing, their weights wrong by "
        f"some {1 / math.sqrt(in_all):.0%}; use more samples at once, {instead}"
    ]
