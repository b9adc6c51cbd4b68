"""What all methods that draw from the posterior have: how many draws, of what noise, and from which posterior."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count, event_sum
from metaflowmaps.draws import DrawOptions, Draws, tilted_weights
from metaflowmaps.errors import check_one_of
from metaflowmaps.random import NOISES
from metaflowmaps.steering.method import Info, Method
from metaflowmaps.steering.problem import SteeringProblem
from metaflowmaps.value import ess, free_shift, log_mean, value_std_err
from metaflowmaps.work.choices import PickOutside


@dataclass(frozen=True)
class FromDraws(Method):
    """A method that draws.

    Args:
        num_draws: N, draws a step and state.
        noise: of the draws: independent, antithetic or quasi(-random).
        chunk: draws of every state that are held at a time.
        map_steps: jumps of the map a draw.
        posterior: where draws come from in place of the model: a class (or ``file.py:Name``) that is called with the
            model and has ``draw(t, x_t, num_draws, generator=None, cond=None)``.
    """

    draws: ClassVar[bool] = True
    weighs: ClassVar[bool] = False  # whether it can use draws of unequal weight; else they are resampled

    num_draws: int = 4
    noise: str = "independent"
    chunk: int = 64
    map_steps: int = 1
    posterior: Annotated[Any, PickOutside()] = None

    def __post_init__(self) -> None:
        for name in ("num_draws", "chunk", "map_steps"):
            check_count(getattr(self, name), name)
        check_one_of("noise", self.noise, NOISES)

    def options(self, differentiate: bool = False) -> DrawOptions:
        """How draws are made."""
        return DrawOptions(self.num_draws, differentiate, self.noise, self.chunk, weighted=self.weighs)

    def open_posterior(self, problem: SteeringProblem) -> None:
        """Let the problem draw from this method's posterior."""
        problem.open_posterior(self.posterior, self.map_steps)


def halved_shift(pool: Draws, log_base: Tensor) -> Tensor | None:
    """The gradient-free shift by every other draw, mean of both halves, less that of all; None for a single draw."""
    if len(log_base) < 2:
        return None
    halves = [free_shift(Draws(pool.x_1[k::2], pool.rewards[k::2]), log_base[k::2].log_softmax(0)) for k in (0, 1)]
    return (halves[0] + halves[1]) / 2 - free_shift(pool, log_base)


def draw_info(problem: SteeringProblem, t: float, shift: Tensor, rewards: Tensor, log_base: Tensor, noise: str) -> Info:
    """What an estimate from draws reports: (B,) each."""
    base, tilted = log_base.exp(), tilted_weights(rewards, log_base)
    error = value_std_err(tilted, base)
    gain = float(problem.path.beta(t)) / float(problem.path.alpha(t)) ** 2
    return {
        "ess": ess(tilted),
        "base_ess": ess(base),
        "value": log_mean(rewards, log_base),
        "value_std_err": error if noise == "independent" else torch.full_like(error, torch.nan),
        "gradient_norm": gain * event_sum(shift.square()).sqrt(),
    }


def best_of_copies(x: Tensor, reward: Tensor, copies: int) -> Tensor:
    """Of each sample's copies, rows m · samples + i, the one of highest reward: (copies · S, …) -> (S, …)."""
    return x[best_rows(reward, copies)]


def best_rows(reward: Tensor, copies: int) -> Tensor:
    """The row of the best copy of each sample: (copies · S,) -> (S,)."""
    samples = len(reward) // copies
    return reward.reshape(copies, samples).argmax(0) * samples + torch.arange(samples, device=reward.device)
