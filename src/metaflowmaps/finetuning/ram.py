r"""RAM, reinforce adjoint matching (Bergmeister et al., 2026): the tilt to first order, on the student's own endpoints.

With b the base's drift and X samples of the student, noised to x_t with velocity u, the target of the student's drift
b̂ is ``b + (r − c) (u − b̂)``, b̂ in it held fixed. Where b̂ is the drift of its own samples, E[u | x_t] = b̂, and the
fixed point is

    b̂ = b + Cov_b̂(r, u | x_t).

The tilted drift is the integral of that covariance over all p_a ∝ p_1 e^{a r}, a from 0 to 1; here it is the whole
step with the covariance at the end. It is exact where the covariance does not change along the way (Gaussian data, r
linear), and otherwise off by ½ d/da Cov, of second order in r: **the fixed point is not p_1 e^r**.

c is the mean of r over the student's endpoints. r − c is kept above −1, as e^{r − c} − 1 is, whose first order it is:
below, the regression turns from repelling endpoints to not being convex.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metaflowmaps.finetuning.endpoint_regression import CALLS, EndpointRegression
from metaflowmaps.finetuning.state_laws import Count, PoolSize
from metaflowmaps.finetuning.tuning_objective import TuningObjective, TuningSetup, mean_of_finite
from metaflowmaps.finetuning.tuning_problem import evaluating
from metaflowmaps.flow_map import MetaFlowMap


@dataclass(frozen=True)
class RAM(TuningObjective):
    """The base's drift corrected by the reward on the student's own endpoints; it needs a drift and values of r."""

    name: ClassVar[str] = "ram"
    title: ClassVar[str] = "RAM"
    needs_states: ClassVar[bool] = False

    pool: PoolSize = 4096  # endpoints of the student
    pool_steps: Count = 16  # ODE steps each, by the midpoint rule: two calls
    refresh_every: Count = 50  # steps; a quarter of the pool is replaced

    def differentiates(self, declared: bool) -> bool:
        """Whether ∇r is taken: never."""
        return False

    def evaluations(self) -> int:
        """The student with its gradient, and the base's drift."""
        return 3 + 1

    def pool_evaluations(self, steps: int) -> int:
        """The pool, and a quarter of it at each refresh."""
        return self.pool_steps * CALLS * (self.pool + (steps - 1) // self.refresh_every * (self.pool // 4))

    def start(self, setup: TuningSetup) -> "RAMRegression":
        """The regression at work."""
        return RAMRegression(self, setup)


class RAMRegression(EndpointRegression):
    """RAM at work: the reference is the base, the pool the student's as it learns."""

    def __init__(self, options: RAM, setup: TuningSetup) -> None:
        super().__init__(setup, options.pool, options.pool_steps)
        self.refresh_every = options.refresh_every

    def reference(self, model: MetaFlowMap, step: int) -> MetaFlowMap:
        """The base; of the pool a quarter is made anew in turn."""
        with evaluating(model):
            if not len(self.pool):
                self.fill(model, step)
            elif step % self.refresh_every == 0:
                self.replace(model, step)
        return self.problem.base

    def replace(self, model: MetaFlowMap, step: int) -> None:
        """A quarter of the pool."""
        fresh = self.size // 4
        x_1, cond, rewards = self.endpoints(model, fresh, step)
        rows = (torch.arange(fresh) + step // self.refresh_every * fresh) % self.size
        self.pool[rows], self.rewards[rows] = x_1, rewards
        for name, value in self.cond.items():
            value[rows] = cond[name]

    def gain(self, rewards: Tensor) -> Tensor:
        """r − c, not below −1."""
        return (rewards - mean_of_finite(self.rewards)).clamp_min(-1)
