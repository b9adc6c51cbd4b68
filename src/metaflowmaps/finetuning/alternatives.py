r"""What else a reward can be put into the weights by, on the same states, networks and meters.

**Adjoint matching** (Domingo-Enrich et al., 2024). On-policy: trajectories of the student's memoryless SDE, and along
each the lean adjoint, a backward pass through the *base's* process, ``a_k = ∂x_{k+1}/∂x_k ᵀ a_{k+1}``, ``a_1 =
−∇r(x_1)``. At the optimum ``E[a | x_t] = −∇V_t``, so the target of the drift is ``b − (σ_t²/2) a``. The SDE runs in
steps of the exact linear bridge (see :mod:`metaflowmaps.steering.process`), from t = 0 and on times equal in the
chart's angle that are shifted at random, so that all are met.

**DRaFT**: −r of the student's one-step draws, differentiated through the student itself. Nothing holds it to p_1: it
climbs to where the reward is highest.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import expand_time
from metaflowmaps.draws import pull_back
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.objective import Regression, Source, TargetBatch, mean_of_finite
from metaflowmaps.finetuning.problem import Cond, Problem, evaluating
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.random import rand, randn, stream
from metaflowmaps.rewards.base import is_differentiable
from metaflowmaps.steering.problem import FIRST


def needs_gradient(problem: Problem, method: str) -> None:
    """Refuse a reward without one."""
    if not is_differentiable(problem.reward):
        raise InputError(f"{method} differentiates the reward, and this one has no gradient: use method=mfm-ft")


class AdjointMatching(Regression):
    """Rows are the visited states of batch_size/steps trajectories."""

    def __init__(self, problem: Problem, source: Source, batch_size: int, seed: int, steps: int) -> None:
        super().__init__(problem, source, batch_size, seed)
        needs_gradient(problem, "adjoint-matching")
        if batch_size < steps:
            raise InputError(
                f"adjoint-matching needs batch_size >= adjoint_steps ({steps}): a trajectory fills so many"
            )
        self.steps = steps

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
                drift = model.drift(float(t), states[-1], cond or None)
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
        wide = {k: v.repeat(len(times)) for k, v in cond.items()}
        place = problem.place(torch.cat(times), torch.cat(visited), wide)
        half = problem.path.sigma_squared(expand_time(place.t, place.x)) / 2
        target = place.carried(place.drift - half * torch.cat(pulled))
        reward = problem.rewards(states[-1], cond)
        figures = {"reward_of_draws": mean_of_finite(reward)}
        return TargetBatch(place.t, place.a, place.z, target, torch.ones_like(place.t), wide, figures)

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
            a = -pull_back(problem.reward(end, cond or None), end, end)
        problem.count(reward_calls=len(a), reward_backwards=len(a))
        out = [a]
        for (t, u), state in zip(reversed(steps), reversed(states[:-1]), strict=True):
            bridge = problem.path.bridge(t, u)
            with torch.enable_grad():
                x = state.detach().requires_grad_(True)
                ahead = problem.path.to_denoise(float(t), x, problem.base.drift(float(t), x, cond or None), "drift")
                following = bridge.keep.to(x) * x + bridge.data.to(x) * ahead
                (a,) = torch.autograd.grad(following, x, a)
            problem.count(forwards=len(a), backwards=len(a))
            out.append(a)
        return out[::-1]


@dataclass(frozen=True)
class DraftBatch:
    """Contexts and noise for one-step draws."""

    t: Tensor
    x_t: Tensor
    eps: Tensor
    cond: Cond

    def __len__(self) -> int:
        return len(self.t)

    def rows(self, start: int, end: int) -> "DraftBatch":
        """Rows [start, end)."""
        cond = {k: v[start:end] for k, v in self.cond.items()}
        return DraftBatch(self.t[start:end], self.x_t[start:end], self.eps[start:end], cond)

    def to(self, device: torch.device) -> "DraftBatch":
        """The batch on a device."""
        cond = {k: v.to(device) for k, v in self.cond.items()}
        return replace(self, t=self.t.to(device), x_t=self.x_t.to(device), eps=self.eps.to(device), cond=cond)

    def about(self, rows: Tensor) -> str:
        """What these rows have in common, for a message."""
        t = self.t.cpu()[rows]
        return f"context times in [{float(t.min()):.3f}, {float(t.max()):.3f}]"


class Draft(Regression):
    """−r(X_{0,1}(ε; t, x)) of the student's own map; a share of the rows has t = 0, which is generation."""

    def __init__(self, problem: Problem, source: Source, batch_size: int, seed: int, at_zero: float) -> None:
        super().__init__(problem, source, batch_size, seed)
        needs_gradient(problem, "draft")
        self.at_zero = at_zero

    @torch.no_grad()
    def batch(self, model: MetaFlowMap, step: int) -> Any:
        """Contexts of a step."""
        g = stream(self.seed, "finetune", step)
        place = self.place(model, step, g)
        eps = randn(tuple(place.x.shape), g, place.x.dtype, place.x.device)
        zero = (rand((len(eps),), g) < self.at_zero).to(eps.device)
        t = torch.where(zero, torch.zeros_like(place.t), place.t)
        noise = randn(tuple(eps.shape), g, eps.dtype, eps.device)
        x = torch.where(zero.reshape(-1, *([1] * (eps.ndim - 1))), noise, place.x)
        return DraftBatch(t, x, eps, place.cond)

    def __call__(self, model: MetaFlowMap, batch: Any) -> Tensor:
        """−r of each row's draw."""
        n = len(batch)
        self.problem.count(forwards=n, backwards=n, reward_calls=n, reward_backwards=n)
        x_1 = model.push(batch.eps, batch.t, batch.x_t, 1, batch.cond or None)
        return -self.problem.reward(x_1, batch.cond or None)
