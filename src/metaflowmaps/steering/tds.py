"""TDS, the twisted diffusion sampler: SMC with ψ = e^{r(D_t(x))} and DPS-guided proposals."""

from typing import Any

from torch import Tensor

from metaflowmaps._shapes import event_sum
from metaflowmaps.steering.dps import DpsGuide, at_posterior_mean
from metaflowmaps.steering.problem import FIRST, Problem
from metaflowmaps.steering.smc import Twisted


class PointTwist:
    """r at the posterior mean; the last move goes there, so the last twist is e^r itself."""

    def start(self, problem: Problem) -> None:
        DpsGuide().start(problem)

    def at(self, problem: Problem, memory: Any, t: float, x: Tensor) -> Twisted:
        at = at_posterior_mean(problem, t, x)
        norm = event_sum(at.gradient.square()).sqrt()
        return Twisted(at.drift, at.reward, at.shift, {"value": at.reward, "gradient_norm": norm})

    def select(self, memory: Any, rows: Tensor) -> None:
        return None

    def last(self, problem: Problem, memory: Any, t: float, x: Tensor, twisted: Twisted) -> tuple[Tensor, Tensor]:
        point = problem.denoise(t, x, twisted.drift)
        # a twist this early was looked at a little later: the reward of where the particle goes is another one
        return point, problem.score_of(point) if t < FIRST else twisted.log_twist
