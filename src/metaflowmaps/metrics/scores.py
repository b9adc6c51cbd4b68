r"""Proper scores of a forecast that is a set of draws, and how often it covers the truth.

    CRPS            E|X − y| − ½ E|X − X'|          a coordinate at a time, then averaged
    energy score    E‖X − y‖ − ½ E‖X − X'‖          of whole events: dependence between coordinates counts

Both with pairs of different draws (unbiased in the number of draws: a forecaster gains nothing by drawing fewer). A
**point** forecast is one draw: its CRPS is the absolute error.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metaflowmaps.errors import InputError

BLOCK = 64  # truths whose pairs of draws are compared at a time


def crps(draws: Tensor, truth: Tensor) -> Tensor:
    """The CRPS of each truth, averaged over its coordinates: (N, B, *event), (B, *event) -> (B,)."""
    _check(draws, truth)
    count = len(draws)
    error = (draws - truth).abs().mean(0)
    if count > 1:
        # Σ_{i<j} |x_i − x_j| from the sorted draws: the i-th is the larger of i pairs, the smaller of count − 1 − i
        weight = 2 * torch.arange(count, dtype=draws.dtype, device=draws.device) - (count - 1)
        pairs = torch.einsum("n,n...->...", weight, draws.sort(0).values)
        error = error - pairs / (count * (count - 1))
    return error.flatten(1).mean(1)


def energy_score(draws: Tensor, truth: Tensor) -> Tensor:
    """The energy score of each truth: (N, B, *event), (B, *event) -> (B,)."""
    _check(draws, truth)
    flat, at, count = draws.flatten(2), truth.flatten(1), len(draws)
    error: Tensor = (flat - at).norm(dim=2).mean(0)
    if count == 1:
        return error
    pairs = [torch.cdist(part, part).sum((1, 2)) for part in flat.transpose(0, 1).split(BLOCK)]
    return error - torch.cat(pairs) / (2 * count * (count - 1))


def coverage(draws: Tensor, truth: Tensor, levels: Sequence[float] = (0.5, 0.9)) -> dict[str, float]:
    """How many coordinates of the truth lie in the central interval of each level.

    Args:
        draws: (N, B, *event).
        truth: (B, *event).
        levels: each in (0, 1).

    Returns:
        level -> share.
    """
    _check(draws, truth)
    shares = {}
    for level in levels:
        edges = draws.new_tensor([(1 - level) / 2, (1 + level) / 2])
        low, high = torch.quantile(draws, edges, dim=0)
        shares[f"{level:g}"] = float(((truth >= low) & (truth <= high)).double().mean())
    return shares


def _check(draws: Tensor, truth: Tensor) -> None:
    if draws.shape[1:] != truth.shape:
        raise InputError(f"draws must be (N, *{tuple(truth.shape)}), as the truth is, got {tuple(draws.shape)}")
