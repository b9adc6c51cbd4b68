"""A steering method of one's own: one frozen dataclass. It works wherever one of the package's does."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metaflowmaps.draws import DrawOptions, equal_log_weights, tilted_weights, weighted
from metaflowmaps.steering import Guidance, GuidedMethod
from metaflowmaps.steering.problem import SteeringProblem
from metaflowmaps.value import ess


@dataclass(frozen=True)
class TopDraw(GuidedMethod):
    """D* is taken for the weighted mean of the ``keep`` best draws."""

    name = "top-draw"  # what tables and files call it
    title = "top draws"
    look = ("#884422", "d")  # in figures
    draws = True  # a trait: it has num_draws

    num_draws: int = 4  # options
    keep: int = 2

    def remember(self, problem: SteeringProblem) -> None:
        """Once a batch of trajectories: draw from the model itself."""
        problem.open_posterior(None)

    def guide(self, problem: SteeringProblem, memory: Any, t: float, x: Tensor) -> Guidance:
        """The drift, and the mean of the best draws minus D_t(x)."""
        drift = problem.drift(t, x)
        made = problem.draws(t, x, DrawOptions(self.num_draws))  # x_1 (N, B, *event) and rewards (N, B)
        least = made.rewards.topk(min(self.keep, self.num_draws), 0).values[-1]
        log_base = equal_log_weights(made.rewards).masked_fill(made.rewards < least, float("-inf"))
        weights = tilted_weights(made.rewards, log_base)
        shift = weighted(weights, made.x_1) - problem.denoise(t, x, drift)
        return Guidance(drift, shift, {"ess": ess(weights)})
