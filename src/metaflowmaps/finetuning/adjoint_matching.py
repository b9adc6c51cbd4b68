r"""Adjoint matching (Domingo-Enrich et al., 2024), on the same states, networks and meters as MFM-FT.

On-policy: trajectories of the student's memoryless SDE, and along each the lean adjoint, a backward pass through the
*base's* process, ``a_k = ∂x_{k+1}/∂x_k ᵀ a_{k+1}``, ``a_1 = −∇r(x_1)``. At the optimum ``E[a | x_t] = −∇V_t``, so the
target of the drift is ``b − (σ_t²/2) a``. The SDE runs in steps of the exact linear bridge (see
:mod:`metaflowmaps.steering.process`), from t = 0 and on times equal in the chart's angle that are shifted at random, so
that all are met.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import Cond, expand_time, repeat_cond
from metaflowmaps.draws import reward_gradient
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.tuning_objective import (
    Regression,
    TargetBatch,
    TuningObjective,
    TuningSetup,
    mean_of_finite,
)
from metaflowmaps.finetuning.tuning_problem import evaluating
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.random import rand, randn, stream
from metaflowmaps.steering.problem import FIRST


@dataclass(frozen=True)
class AdjointMatching(TuningObjective):
    """Regression on the adjoints of the student's own trajectories, of ``steps`` steps each."""

    name: ClassVar[str] = "adjoint-matching"
    title: ClassVar[str] = "adjoint matching"
    needs_states: ClassVar[bool] = False

    steps: Annotated[int, Field(ge=2)] = 32

    def evaluations(self) -> int:
        """The student with its gradient and along its way, the base's adjoint and drift."""
        return 3 + 1 + 3 + 1

    def start(self, setup: TuningSetup) -> "AdjointRegression":
        """The regression at work."""
        return AdjointRegression(self, setup)


class AdjointRegression(Regression):
    """Adjoint matching at work: rows are the visited states of batch_size/steps trajectories."""

    def __init__(self, options: AdjointMatching, setup: TuningSetup) -> None:
        super().__init__(setup)
        self.steps = options.steps
        if self.batch_size < self.steps:
            raise InputError(
                f"adjoint-matching needs batch_size >= method.steps ({self.steps}): a trajectory fills so many"
            )

    @torch.no_grad()
    def batch(self, model: MetaFlowMap, step: int) -> TargetBatch:
        """States of fresh trajectories with the targets that their adjoints give."""
        g, problem = stream(self.seed, "finetune", step), self.problem
        m, base = max(1, self.batch_size // self.steps), problem.base
        cond = problem.conditions(m, g)
        x = randn((m, *base.event_shape), g, base.dtype, base.device)
        grid = self._grid(x, g)
        states = [x]
        for t, u in pairwise(grid):
            bridge = problem.path.bridge(t, u)
            with evaluating(model):
                drift = model.drift(float(t), states[-1], cond)
            ahead = problem.path.to_denoise(float(t), states[-1], drift, "drift")
            noise = randn(tuple(x.shape), g, x.dtype, x.device)
            states.append(bridge.keep.to(x) * states[-1] + bridge.data.to(x) * ahead + bridge.std.to(x) * noise)
        problem.count(forwards=m * (len(grid) - 1))
        adjoints = self._adjoints(grid, states, cond)
        times, visited, pulled = [], [], []
        for t, x_t, a in zip(grid[:-1], states, adjoints, strict=False):
            if float(t) >= FIRST:  # σ² is infinite at t = 0, where the adjoint is 0 in expectation only
                times.append(t.to(x).expand(m))
                visited.append(x_t)
                pulled.append(a)
        wide = repeat_cond(cond, len(times))
        reached = problem.at(torch.cat(times), torch.cat(visited), wide)
        half = problem.path.sigma_squared(expand_time(reached.t, reached.x)) / 2
        target = reached.as_flow(reached.drift - half * torch.cat(pulled))
        reward = problem.rewards(states[-1], cond)
        figures = {"reward_of_draws": mean_of_finite(reward)}
        return TargetBatch(
            t=reached.t,
            a=reached.a,
            z=reached.z,
            target=target,
            weight=torch.ones_like(reached.t),
            cond=wide,
            figures=figures,
        )

    def _grid(self, x: Tensor, g: torch.Generator) -> Tensor:
        """0, then times equal in the angle with a common random shift, then 1."""
        inner = (torch.arange(self.steps - 1) + 0.5 + rand((1,), g)) / self.steps
        zeros = torch.zeros(len(inner), *x.shape[1:]).to(x)
        chart = self.problem.base.anchor(torch.zeros(len(inner)).to(x), zeros).chart
        times = chart.time_out(inner.clamp(max=0.999).to(x)).cpu().double()
        return torch.cat([torch.zeros(1), times, torch.ones(1)])

    def _adjoints(self, grid: Tensor, states: list[Tensor], cond: Cond) -> list[Tensor]:
        """a at each time of the grid, the last −∇r."""
        problem, steps = self.problem, list(pairwise(grid))
        with torch.enable_grad():
            end = states[-1].detach().requires_grad_(True)
            a = -reward_gradient(problem.reward(end, cond), end, end)
        problem.count(reward_calls=len(a), reward_backwards=len(a))
        out = [a]
        for (t, u), state in zip(reversed(steps), reversed(states[:-1]), strict=True):
            bridge = problem.path.bridge(t, u)
            with torch.enable_grad():
                x = state.detach().requires_grad_(True)
                ahead = problem.path.to_denoise(float(t), x, problem.base.drift(float(t), x, cond), "drift")
                following = bridge.keep.to(x) * x + bridge.data.to(x) * ahead
                (a,) = torch.autograd.grad(following, x, a)
            problem.count(forwards=len(a), backwards=len(a))
            out.append(a)
        return out[::-1]
