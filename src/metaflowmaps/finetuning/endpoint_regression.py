r"""Regressions on a model's own endpoints: samples of it with their rewards, noised again.

A sample X of a model, noised to ``x_t = α ε + β X``, has the velocity ``u = α̇ ε + β̇ X``, and E[u | x_t] is the drift
of the law that X comes from. Its reward is paid for once and its row made anew at every step; neither the reward nor
the way to X is differentiated, and no map is needed. How a reward moves a drift is a covariance: under p_a ∝ p e^{a r}

    d/da E_a[u | x_t] = Cov_a(r(X), u | x_t).

So a row pulls the student F̂ towards ``F + g (u − F̂)``, F̂ on the right held fixed: from the drift F of a reference
along its own u, by a gain g of its reward. That is the gradient of ``‖F̂ − F‖² + g ‖F̂ − u‖²``, which is convex where
the mean of g at a state is above −1.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaflowmaps._shapes import event_sum, expand_time, select_cond
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.state_laws import samples_stream, student_samples
from metaflowmaps.finetuning.tuning_objective import Regression, TargetBatch, TuningSetup, mean_of_finite
from metaflowmaps.finetuning.tuning_problem import student_flow
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.random import randn, stream
from metaflowmaps.sampling import INTEGRATORS

INTEGRATOR = "midpoint"  # 16 steps are nearer to the law than 128 of Euler's, whose modes are 1 to 3 % too narrow
CALLS = INTEGRATORS[INTEGRATOR].calls


@dataclass(frozen=True, kw_only=True)
class EndpointBatch(TargetBatch):
    """Rows whose target moves with the student: ``target + gain (velocity − F̂)``."""

    velocity: Tensor
    gain: Tensor


class EndpointRegression(Regression):
    """A pool of endpoints with their rewards, and the regression on rows made of it.

    A subclass says what the reference of a step is, whose endpoints are in the pool, and the gain of a reward.

    Args:
        setup: of the run.
        pool: how many endpoints are kept.
        pool_steps: ODE steps each, of CALLS calls.
    """

    learned: ClassVar[tuple[str, ...]] = ("problem", "pool", "cond", "rewards")
    moving: bool = True  # whether the pivot is the student, or the reference

    def __init__(self, setup: TuningSetup, pool: int, pool_steps: int) -> None:
        super().__init__(setup)
        self.size, self.pool_steps = pool, pool_steps
        self.pool = torch.zeros(0)
        self.cond: dict[str, Tensor] = {}
        self.rewards = torch.zeros(0, dtype=torch.float64)

    def reference(self, model: MetaFlowMap, step: int) -> MetaFlowMap:
        """The frozen model that a step starts from; the pool is brought up to date here."""
        raise NotImplementedError

    def gain(self, rewards: Tensor) -> Tensor:
        """g of rewards (B,)."""
        raise NotImplementedError

    @torch.no_grad()
    def batch(self, model: MetaFlowMap, step: int) -> EndpointBatch:
        """Endpoints of the pool at inner times uniform below ``last``. Called once a step: the pool is kept."""
        problem, n = self.problem, self.batch_size
        reference = self.reference(model, step)
        g = stream(self.seed, "finetune", step)
        index = torch.randint(len(self.pool), (n,), generator=g)
        x_1, cond = self.pool[index.to(self.pool.device)], dict(select_cond(self.cond, index) or {})
        a = problem.times(n, g).to(x_1)
        noise = randn(tuple(x_1.shape), g, x_1.dtype, x_1.device)
        chart = problem.base.anchor(torch.zeros_like(a), torch.zeros_like(x_1)).chart
        t = chart.time_out(a).clamp(0, 1)
        x = problem.path.interpolate(noise, x_1, t)
        z = chart.state_in(t, x)
        velocity = chart.velocity_in(t, x, problem.path.velocity(noise, x_1, t))
        flow = student_flow(reference, a, z, cond)
        problem.count(forwards=n)
        gain = self.gain(self.rewards[index]).to(x_1)
        figures = {"reward_of_pool": mean_of_finite(self.rewards), "gain": float(gain.abs().mean())}
        if not self.moving:
            flow, gain = flow + expand_time(gain, flow) * (velocity - flow), torch.zeros_like(gain)
        return EndpointBatch(
            t=t, a=a, z=z, target=flow, weight=torch.ones_like(gain), cond=cond, velocity=velocity, gain=gain,
            figures=figures | self.figures(),
        )  # fmt: skip

    def figures(self) -> dict[str, float]:
        """What else a batch reports."""
        return {}

    def __call__(self, model: MetaFlowMap, batch: EndpointBatch) -> Tensor:
        """Per-row losses, (B,)."""
        n = len(batch)
        self.problem.count(forwards=n, backwards=n)
        f = student_flow(model, batch.a, batch.z, batch.cond)
        target = batch.target + expand_time(batch.gain, f) * (batch.velocity - f.detach())
        losses: Tensor = event_sum((f - target).square())
        return losses

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the pool, where the base is."""
        super().load_state_dict(state)
        device = self.problem.base.device
        self.pool = self.pool.to(device)
        self.cond = {name: value.to(device) for name, value in self.cond.items()}

    def fill(self, model: MetaFlowMap, step: int) -> None:
        """The whole pool anew, of a model."""
        self.pool, self.cond, self.rewards = self.endpoints(model, self.size, step)
        if not bool(self.rewards.isfinite().any()):
            raise InputError(f"at step {step} no sample of the model has a finite reward: lower the strength")

    def endpoints(self, model: MetaFlowMap, n: int, step: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """n samples of a model's drift, their conditions, and their rewards in float64 on the CPU."""
        g = samples_stream(self.seed, f"endpoints-{step}")
        x_1, cond = student_samples(self.problem, model, n, self.pool_steps, g, INTEGRATOR)
        return x_1, dict(cond or {}), self.problem.rewards(x_1, cond).double().cpu()
