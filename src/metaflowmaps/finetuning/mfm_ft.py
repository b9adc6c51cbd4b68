r"""MFM-FT: the tilted drift by regression, unbiased from any number of draws.

At every state (t, x), with draws X_i ~ p(x_1 | x_t) of the frozen map (Eq. 43),

    E[ e^{r(X)} (b̂ − b) − (σ_t²/2) ∇_x e^{r(X)} ] = 0        ⇔        b̂ = b* = b + (σ_t²/2) ∇V_t

Since ``∇e^r = e^r ∇r``, the gradient of the paper's loss ``‖b̂ − sg[b − (e^r − 1)(b̂ − b) + (σ²/2) ∇e^r]‖²`` in the
student's weights is that of a **weighted regression**,

    w ‖b̂ − v‖²,   w = (1/N) Σ_i e^{r_i − c},   v = Σ_i e^{r_i} v_i / Σ_i e^{r_i},   v_i = b + (σ_t²/2) ∇_x r(X_i)

for one draw and for many: the self-normalised target v of MFM-G, weighted by its own normaliser. The weight is what
removes the bias; with w = 1 one has the self-normalised regression.

**Without gradients** (black-box rewards): by Tweedie the tilted drift is the mean of ``v_i = α̇ ε + β̇ X_i``, the
velocity that leads to the draw, under the same weights: reward-weighted flow matching at any state. At t = 0, where σ²
is infinite, this form is regular and takes over.

**Blend**: both v_i have one and the same weighted mean, so ``(1 − λ) v_i^free + λ v_i^gradient`` has it too, for any λ
that does not look at these draws. λ is kept in bins of time and is the one of least variance over the batches before.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import check_count, expand_time
from metaflowmaps.draws import Draws
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.finetuning.baseline import Baseline, Level, NoBaseline, RunningBaseline, bins_of
from metaflowmaps.finetuning.tuning_objective import (
    Regression,
    TargetBatch,
    TuningObjective,
    TuningSetup,
    figures_of,
    mean_of_finite,
)
from metaflowmaps.finetuning.tuning_problem import BaseStates, Resumable, Tilt, evaluating, student_flow
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.random import stream
from metaflowmaps.steering.problem import FIRST
from metaflowmaps.work.choices import Pick

BINS = 32  # of the inner time, for λ
RATE = 0.01  # of its averages
FORMS = ("auto", "blend", "gradient", "gradient-free")


@dataclass(frozen=True)
class MFMFT(TuningObjective):
    """The paper's objective: regression on v, weighted by its own normaliser w."""

    name: ClassVar[str] = "mfm-ft"
    title: ClassVar[str] = "MFM-FT"
    weighted: ClassVar[bool] = True
    without_gradient: ClassVar[str] = "use --set form=gradient-free"

    num_draws: int = 4
    form: Literal["auto", "blend", "gradient", "gradient-free"] = "auto"  # auto: blend where the reward has a gradient
    baseline: Annotated[Baseline, Pick(Baseline)] = field(default_factory=RunningBaseline)
    sigma_squared: Annotated[float, Field(gt=0)] | None = None  # a constant for σ_t²: the release's; moves the answer

    def __post_init__(self) -> None:
        check_count(self.num_draws, "num_draws")
        if self.form not in FORMS:
            raise unknown("form", self.form, FORMS)
        if self.sigma_squared is not None and self.form != "gradient":
            raise InputError("sigma_squared belongs to form=gradient, the only one in which σ² stands")

    def differentiates(self, declared: bool) -> bool:
        """Whether ∇r is taken: in every form but the gradient-free one."""
        return declared if self.form == "auto" else self.form != "gradient-free"

    @property
    def unbounded(self) -> bool:
        """Whether rows weigh e^r itself."""
        return isinstance(self.baseline, NoBaseline)

    def evaluations(self) -> int:
        """The student with its gradient, the base's drift, and N differentiated draws."""
        return 3 + 1 + 3 * self.num_draws

    def start(self, setup: TuningSetup) -> "WeightedRegression":
        """The regression, its baseline at log E[e^r]."""
        return WeightedRegression(self, setup, self.baseline.start(setup.problem, setup.log_evidence(), setup.seed))


@dataclass(frozen=True)
class SelfNormalised(MFMFT):
    """Regression on MFM-G's self-normalised target, all rows alike: its bias of order 1/N is learned too."""

    name: ClassVar[str] = "self-normalised"
    title: ClassVar[str] = "self-normalised"
    weighted: ClassVar[bool] = False


class WeightedRegression(Regression):
    """MFM-FT at work, in any of its forms; without ``weighted`` all rows count alike.

    Args:
        options: the objective's.
        setup: of the run.
        baseline: c(t, x) at work.
    """

    learned: ClassVar[tuple[str, ...]] = (*Regression.learned, "baseline", "mixing")

    def __init__(self, options: MFMFT, setup: TuningSetup, baseline: Level) -> None:
        super().__init__(setup)
        differentiates = options.differentiates(self.problem.reward.differentiable)
        self.form = options.form if options.form != "auto" else "blend" if differentiates else "gradient-free"
        self.num_draws, self.weighted, self.sigma_squared = options.num_draws, options.weighted, options.sigma_squared
        self.baseline, self.mixing = baseline, Mixing()

    @torch.no_grad()
    def batch(self, model: MetaFlowMap, step: int) -> TargetBatch:
        """The states of a step with targets and weights. Called once a step: baseline and λ learn from it."""
        g = stream(self.seed, "finetune", step)
        states = self.states(model, step, g)
        draws = self.problem.draws(states, self.num_draws, self.form != "gradient-free", g)
        level = self.baseline(states, g)
        target, weight, value = self.targets(states, draws, level, model)
        self.baseline.update(states, value)
        figures = figures_of(draws.rewards, weight) | {"value": mean_of_finite(value)}
        if not self.weighted:
            weight = torch.ones_like(weight)
        return TargetBatch(
            t=states.t, a=states.a, z=states.z, target=target, weight=weight, cond=states.cond, figures=figures
        )

    def targets(
        self, states: BaseStates, draws: Draws, level: Tensor, model: MetaFlowMap | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Targets from draws at a batch of states; λ learns where the student is given.

        Args:
            states: B of them.
            draws: N at each, with gradients unless gradient-free.
            level: c, (B,).
            model: the student.

        Returns:
            Targets in F (B, *event), weights w (B,) and V̂ (B,).
        """
        value, share = Tilt.of(draws.rewards)
        weight = torch.exp(value - level)
        flows = self._flows(states, draws)
        if self.form == "blend":
            free, gradient = flows
            mix = self.mixing(states.a)  # below FIRST both forms are one
            if model is not None:
                with evaluating(model):
                    now = student_flow(model, states.a, states.z, states.cond)
                self.problem.count(forwards=len(states.t))
                each = torch.exp(draws.rewards - level)
                self.mixing.update(states.a, states.t >= FIRST, each, free - now, gradient - now)
            flows = [free + expand_time(mix, states.x) * (gradient - free)]
        target = torch.einsum("nb,nbd->bd", share.to(states.x.dtype), flows[0].flatten(2)).reshape(states.x.shape)
        return target, weight, value

    def _flows(self, states: BaseStates, draws: Draws) -> list[Tensor]:
        """v_i of each form that is needed, in F: (N, B, *event)."""
        out, t = [], expand_time(states.t, states.x)
        late = (states.t >= FIRST).reshape(t.shape)
        safe = torch.where(late, t, torch.full_like(t, 0.5))
        if self.form != "gradient":
            out.append(self._free(states, draws))
        if self.form != "gradient-free":
            sigma_squared = self.problem.path.sigma_squared(safe) if self.sigma_squared is None else self.sigma_squared
            half = sigma_squared / 2
            assert draws.gradients is not None
            # what a hard constraint forbids has no weight, and may have no gradient either
            allowed = draws.rewards.isfinite().reshape(*draws.rewards.shape, *([1] * (t.ndim - 1)))
            gradients = torch.where(allowed, draws.gradients, torch.zeros_like(draws.gradients))
            by_gradient = torch.stack([states.as_flow(states.drift + half * g) for g in gradients])
            # below FIRST the map's dependence on x is 0/0 after division by β: the other form is regular there
            early = out[0] if out else self._free(states, draws)
            out.append(torch.where(late, by_gradient, early))
        return out

    def _free(self, states: BaseStates, draws: Draws) -> Tensor:
        """α̇ ε + β̇ X_i in F."""
        drifts = [self.problem.path.from_denoise(states.t, states.x, x, "drift") for x in draws.x_1]
        return torch.stack([states.as_flow(v) for v in drifts])


class Mixing(Resumable):
    """λ in bins of the inner time, from running second moments of both forms' weighted residuals.

    ``E‖(1 − λ) R_f + λ R_g‖²`` is least at ``λ = (ff − fg)/(ff + gg − 2 fg)``.
    """

    learned: ClassVar[tuple[str, ...]] = ("moments",)

    def __init__(self) -> None:
        self.moments = torch.zeros(3, BINS, dtype=torch.float64)  # ff, gg, fg

    def __call__(self, a: Tensor) -> Tensor:
        """λ at inner times a (B,)."""
        free, gradient, both = self.moments
        apart = free + gradient - 2 * both
        best = torch.where(apart > 0, (free - both) / apart, torch.zeros_like(apart)).clamp(0, 1)
        return best.to(a)[bins_of(a, BINS)]

    def update(self, a: Tensor, usable: Tensor, weight: Tensor, free: Tensor, gradient: Tensor) -> None:
        """Learn from residuals (N, B, *event) of both forms with weights (N, B), where rows (B,) are usable."""
        squared = weight.square().double()
        free, gradient = free.flatten(2).double(), gradient.flatten(2).double()
        each = torch.stack(
            [(squared * (p * q).sum(2)).mean(0) for p, q in ((free, free), (gradient, gradient), (free, gradient))]
        ).cpu()
        index, finite = bins_of(a, BINS).cpu(), each.isfinite().all(0) & usable.cpu()
        for b in index[finite].unique().tolist():
            seen = each[:, finite & (index == b)].mean(1)
            fresh = bool((self.moments[:, b] == 0).all())
            self.moments[:, b] = seen if fresh else torch.lerp(self.moments[:, b], seen, RATE)
