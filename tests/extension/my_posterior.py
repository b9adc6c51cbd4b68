"""A posterior of one's own: a class that is called with the model and draws."""

from typing import Any

import torch
from torch import Tensor


class TwoSteps:
    """Draws of the map in two jumps, shrunk towards their mean."""

    def __init__(self, model: Any, shrink: float = 0.9) -> None:
        self.model, self.path, self.shrink = model, model.path, shrink

    def draw(
        self, t: Any, x_t: Tensor, num_draws: int, generator: torch.Generator | None = None, cond: Any = None
    ) -> Tensor:
        """(num_draws, B, *event)."""
        draws = self.model.draw(t, x_t, num_draws, generator=generator, cond=cond)
        mean = draws.mean(0)
        return mean + self.shrink * (draws - mean)
