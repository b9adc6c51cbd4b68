r"""Tilt matching (Potaptchik, Lee and Albergo, 2025): e^r put into the drift level by level, without its gradient.

Between p_1 and the tilted law lie p_a ∝ p_1 e^{a r}. Given the drift b_a and endpoints X ~ p_a, noised to x_t with
velocity u, the drift one level on is that of the same states weighed anew,

    b_{a+h}(x) = E[e^{h r(X)} u | x_t = x] / E[e^{h r(X)} | x_t = x],

so ``E[w (b̂ − u) | x_t] = 0`` there, with w = e^{h r − c}: flow matching with weights. Since E[u − b_a | x_t] = 0, the
**implicit** form adds u − b_a to the residual,

    w (b̂ − u) + (u − b_a) = (b̂ − b_a) − (w − 1) (u − b̂),

which leaves the fixed point alone and takes out the noise of flow matching: what remains is of order h. It also means
that what is wrong with the pool (a finite one, by an ODE in few steps) enters by w − 1, once in all levels together,
where weights alone would learn it anew at each. c is the log-mean of e^{h r} over the pool, so that w is 1 on average.

The **explicit** form is its first order, a regression on ``b_a + h (r − c) (u − b_a)`` with c the mean of r. Its
minimiser is the Euler step b_a + h Cov_a(r, u | x_t), whose error over all levels is of order h.

**Levels.** A level starts from the averaged weights of the level before and draws its pool from them. h is as large as
leaves the weights e^{h r} an ESS of ``share`` of the pool at the first level, and at later ones as what is left to go,
Λ standard deviations of r, divides by the levels that are left (:mod:`metaflowmaps.steering.anneal`). All levels but
the last share the first half of the steps. A level that reaches a = 1 is the last.
"""

import copy
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import check_count
from metaflowmaps.errors import InputError, check_one_of
from metaflowmaps.finetuning.endpoint_regression import CALLS, EndpointRegression
from metaflowmaps.finetuning.state_laws import Count, PoolSize, log_mean_exp
from metaflowmaps.finetuning.tuning_objective import TuningObjective, TuningSetup
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.tempering import SMALLEST_LOSS, next_strength, stretch

FORMS = ("implicit", "explicit")
FEW = 0.05  # of the pool, as an ESS: a last level that leaves less was too large a step


@dataclass(frozen=True)
class TiltMatching(TuningObjective):
    """The tilt in levels, each a regression on endpoints of the level before; it needs a drift and values of r."""

    name: ClassVar[str] = "tilt-matching"
    title: ClassVar[str] = "tilt matching"
    needs_states: ClassVar[bool] = False

    form: Literal["implicit", "explicit"] = "implicit"
    levels: Count = 6  # at most
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of a pool that the first level's weights leave, as an ESS
    pool: PoolSize = 16_384  # endpoints a level
    pool_steps: Count = 16  # ODE steps each, by the midpoint rule: two calls

    def __post_init__(self) -> None:
        check_count(self.levels, "levels")
        check_one_of("form", self.form, FORMS)

    def differentiates(self, declared: bool) -> bool:
        """Whether ∇r is taken: never."""
        return False

    def evaluations(self) -> int:
        """The student with its gradient, and the level's drift."""
        return 3 + 1

    def pool_evaluations(self, steps: int) -> int:
        """Every level's pool."""
        return self.levels * self.pool * self.pool_steps * CALLS

    def start(self, setup: TuningSetup) -> "TiltRegression":
        """The regression at work."""
        return TiltRegression(self, setup)


class TiltRegression(EndpointRegression):
    """Tilt matching at work: from a to a + h, from the reference's weights to the student's."""

    learned: ClassVar[tuple[str, ...]] = (*EndpointRegression.learned, "level", "a", "end", "weights", "mean", "count")

    def __init__(self, options: TiltMatching, setup: TuningSetup) -> None:
        super().__init__(setup, options.pool, options.pool_steps)
        self.options, self.steps = options, setup.steps
        self.moving = options.form == "implicit"
        self.level, self.a, self.end = -1, 0.0, 0.0
        self.weights: dict[str, Tensor] = {}  # of the reference, none for the base
        self.mean: dict[str, Tensor] = {}  # of the student's parameters, over the second half of a level
        self.count = 0
        self._model = self.problem.base

    def reference(self, model: MetaFlowMap, step: int) -> MetaFlowMap:
        """The level's own; at its end the next level starts from the student."""
        half = self._half(step)
        if self.end < 1 and half // 2 > self.level:
            self._next_level(model, half // 2, step)
        elif self.end < 1 and half % 2:
            self._average(model)
        if self.weights and self._model is self.problem.base:  # resumed
            self._model = _frozen(model, self.weights)
        return self._model

    def gain(self, rewards: Tensor) -> Tensor:
        """w − 1, or to first order h (r − c)."""
        h = self.end - self.a
        if not self.moving:
            return h * (rewards - self.rewards.mean())
        return torch.expm1(h * rewards - log_mean_exp(h * self.rewards)) if h else torch.zeros_like(rewards)

    def figures(self) -> dict[str, float]:
        """Where the tilt stands."""
        return {"level": float(self.level), "tilt": self.end}

    def _half(self, step: int) -> int:
        """Which half of a level a step falls into, counted from the start; the last level has what is left."""
        early = self.options.levels - 1
        return min(2 * early, step * 4 * early // self.steps)

    def _next_level(self, model: MetaFlowMap, level: int, step: int) -> None:
        """A level from where the last has come to."""
        if self.level >= 0:
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()} | self.mean
            self._model = _frozen(model, self.weights)
        self.level, self.a, self.mean, self.count = level, self.end, {}, 0
        self.fill(self._model, step)
        if not self.moving and not bool(self.rewards.isfinite().all()):
            raise InputError("form=explicit takes finite rewards, and some are not: use method.form=implicit")
        self.end = self._end()

    def _end(self) -> float:
        """a + h, by the pool's rewards; 1 at the last level."""
        left = self.options.levels - self.level
        if left > 1:
            rewards, now = self.rewards[None], torch.tensor([self.a], dtype=torch.float64)
            equal = torch.zeros_like(rewards)
            share = torch.tensor([self.options.share], dtype=torch.float64)
            if self.a > 0:
                share = torch.exp(-(stretch(rewards, equal, now) / left).square()).clamp(
                    float(share), 1 - SMALLEST_LOSS
                )
            return float(next_strength(rewards, equal, now, share))
        kept = 1 / float(((1 - self.a) * self.rewards).softmax(0).square().sum()) / len(self.rewards)
        if kept < FEW:
            warnings.warn(
                f"the last level of tilt matching, from {self.a:.2g} to 1, rests on {kept:.1%} of its pool: "
                "raise method.levels or lower the strength",
                stacklevel=2,
            )
        return 1.0

    def _average(self, model: MetaFlowMap) -> None:
        """The running mean of the student's parameters."""
        self.count += 1
        for name, value in model.named_parameters():
            held = self.mean.get(name, value.detach())
            self.mean[name] = torch.lerp(held, value.detach(), 1 / self.count)


def _frozen(model: MetaFlowMap, weights: dict[str, Any]) -> MetaFlowMap:
    """A copy of a model with these weights."""
    copied = copy.deepcopy(model)
    copied.load_state_dict(weights)
    return copied.requires_grad_(False).eval()
