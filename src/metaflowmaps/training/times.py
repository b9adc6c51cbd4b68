r"""Laws of the context time t and of the inner times a ≤ b.

Inner times are chart times (:mod:`metaflowmaps.parameterization`). A share of the pairs starts at a = 0:
these are the jumps that one-step draws use, and with a teacher a Lagrangian loss needs no others for them.
"""

import torch
from torch import Tensor

from metaflowmaps.random import RowNoise, Source, rand
from metaflowmaps.training.train_config import TimesConfig


def context_times(config: TimesConfig, n: int, generator: Source) -> Tensor:
    """(n,) context times: uniform (or U² as in the release), a share on the focus, and t = 0 with its probability."""
    t = rand((n,), generator)
    if config.context == "release":
        t = t.square()
    low, high = config.focus
    focused = rand((n,), generator) < config.focus_share
    t = torch.where(focused, low + (high - low) * rand((n,), generator), t)
    at_zero = rand((n,), generator) < config.context_at_zero
    return torch.where(at_zero, t.new_zeros(()), t)


def diagonal_times(config: TimesConfig, n: int, generator: Source) -> Tensor:
    """(n,) inner times of the diagonal, uniform below ``last``."""
    return config.last * rand((n,), generator)


def late_rows(config: TimesConfig, n: int, generator: Source) -> Tensor:
    """(n,) flags of the rows whose inner times go by s = 1 − U² instead (the objective knows the chart)."""
    return rand((n,), generator) < config.late_share


def inner_times(config: TimesConfig, n: int, generator: Source) -> tuple[Tensor, Tensor]:
    """(n,) sorted pairs a ≤ b, below ``last``; a share of them starts at a = 0."""
    # of a stream a row, the rows come first
    pairs = rand((n, 2), generator).mT if isinstance(generator, RowNoise) else rand((2, n), generator)
    a, b = (config.last * pairs.sort(0).values).unbind()
    from_noise = rand((n,), generator) < config.from_noise
    alone = config.last * rand((n,), generator)
    return torch.where(from_noise, a.new_zeros(()), a), torch.where(from_noise, alone, b)
