r"""Are two samples from one law? A permutation test, exact at any sample size.

Under the null every relabelling of the pooled sample is equally likely, so with P random relabellings
``p = (1 + #{statistic ≥ observed}) / (1 + P)`` is a valid p-value whatever the statistic; here the energy
distance or MMD².
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metaflowmaps.errors import unknown
from metaflowmaps.metrics.kernels import (
    PairKernel,
    _prepared,
    energy_kernel,
    median_distance,
    rbf_kernel,
    squared_distances,
)


class TwoSampleTest(NamedTuple):
    """The observed statistic and its permutation p-value."""

    statistic: float
    p_value: float


def two_sample_test(
    x: Tensor,
    y: Tensor,
    statistic: str = "energy",
    permutations: int = 499,
    generator: torch.Generator | None = None,
) -> TwoSampleTest:
    """Energy or MMD permutation test between (n, *event) and (m, *event); memory grows as (n + m)².

    Args:
        x: (n, *event).
        y: (m, *event).
        statistic: ``energy`` or ``mmd``.
        permutations: P random relabellings.
        generator: of the relabellings.

    Returns:
        The statistic and its p-value.
    """
    x, y = _prepared(x, y)
    pooled = torch.cat([x, y]).double()
    kernel: PairKernel
    if statistic == "energy":
        kernel = energy_kernel
    elif statistic == "mmd":
        kernel = rbf_kernel(median_distance(pooled))
    else:
        raise unknown("statistic", statistic, ("energy", "mmd"))
    gram = kernel(squared_distances(pooled, pooled))
    gram.fill_diagonal_(0)
    n, total = len(x), len(pooled)
    m = total - n
    order = torch.rand(permutations, total, generator=generator).argsort(1)
    first = torch.zeros(permutations + 1, total, dtype=torch.float64)
    first[0, :n] = 1
    first[1:].scatter_(1, order[:, :n], 1.0)
    pulled = first @ gram
    within_x = (pulled * first).sum(1)
    across = pulled.sum(1) - within_x
    within_y = gram.sum() - within_x - 2 * across
    values = within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * across / (n * m)
    # a relabelling that equals the observed one must count as at least as large, whatever the rounding
    exceed = int((values[1:] >= values[0] - 1e-12 * gram.abs().max()).sum())
    return TwoSampleTest(float(values[0]), (1 + exceed) / (1 + permutations))
