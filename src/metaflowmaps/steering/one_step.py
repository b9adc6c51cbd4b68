"""Samples of the base model in one call each, X_{0,1}(ε; 0, ·): the proposals of the cheap rivals."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, check_count, select_cond
from metaflowmaps.steering.method import Method
from metaflowmaps.steering.problem import SteeringProblem


@dataclass(frozen=True)
class OfCandidates(Method):
    """A method that makes n candidates for each sample and keeps some of them.

    Args:
        n: candidates a sample.
    """

    draws = True

    n: int = 16

    def __post_init__(self) -> None:
        check_count(self.n, "n")

    @property
    def copies(self) -> int:
        """n rows a sample."""
        return self.n

    @property
    def shown_draws(self) -> int:
        """n."""
        return self.n

    def with_draws(self, num_draws: int) -> Method:
        """Another n."""
        return replace(self, n=num_draws)


class OneStep:
    """The model's posterior at t = 0, which is the law of its data."""

    def __init__(self, problem: SteeringProblem) -> None:
        self.problem, self.posterior = problem, problem.metered.posterior()

    def draw(self, noise: Tensor, cond: Cond) -> Tensor:
        """One sample a row of noise, under a condition for each row: (rows, *event)."""
        context, times = torch.zeros_like(noise), noise.new_zeros(len(noise))
        if hasattr(self.posterior, "push"):
            pushed: Tensor = self.posterior.push(noise, times, context, cond)
            return pushed
        generator = self.problem.stream("draws").generator()
        drawn: Tensor = self.posterior.draw(times, context, 1, generator=generator, cond=cond)[0]
        return drawn

    def samples(self, noise: Tensor) -> Tensor:
        """One sample for each row of state: (rows, *event)."""
        return self.draw(noise, self.problem.cond_for(len(noise)))

    def samples_of(self, noise: Tensor, rows: Tensor) -> Tensor:
        """Samples for some rows of the state."""
        return self.draw(noise[rows], self.cond_of(rows, len(noise)))

    def cond_of(self, rows: Tensor, everyone: int) -> Cond:
        """The condition of some rows of a state of ``everyone``."""
        return select_cond(self.problem.cond_for(everyone), rows)
