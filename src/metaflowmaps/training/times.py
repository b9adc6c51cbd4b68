r"""Laws of the context time t and of the inner times a ≤ b.

Inner times are chart times (:mod:`metaflowmaps.parameterization`). A share of the pairs starts at a = 0:
these are the jumps that one-step draws use, and with a teacher a Lagrangian loss needs no others for them.
"""

import torch
from torch import Tensor

from metaflowmaps.random import rand
from metaflowmaps.training.train_config import TimesConfig


def context_times(config: TimesConfig, n: int, generator: torch.Generator) -> Tensor:
    """(n,) context times: uniform (or U² as in the release), a share on the focus, and t = 0 with its probability."""
    t = rand((n,), generator)
    if config.context == "release":
        t = t.square()
    low, high = config.focus
    focused = rand((n,), generator) < config.focus_share
    t = torch.where(focused, low + (high - low) * rand((n,), generator), t)
    at_zero = rand((n,), generator) < config.context_at_zero
    return torch.where(at_zero, torch.zeros(()), t)


def diagonal_times(config: TimesConfig, n: int, generator: torch.Generator) -> Tensor:
    """(n,) inner times of the diagonal, uniform below ``last``."""
    return config.last * rand((n,), generator)


def late_rows(config: TimesConfig, n: int, generator: torch.Generator) -> Tensor:
    """(n,) flags of the rows whose inner times go by s = 1 − U² instead (the objective knows the chart)."""
    return rand((n,), generator) < config.late_share


def inner_times(config: TimesConfig, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(n,) sorted pairs a ≤ b, below ``last``; a share of them starts at a = 0."""
    a, b = (config.last * rand((2, n), generator).sort(0).values).unbind()
    from_noise = rand((n,), generator) < config.from_noise
    alone = config.last * rand((n,), generator)
    return torch.where(from_noise, torch.zeros(()), a), torch.where(from_noise, alone, b)
