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

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import event_sum, expand_time
from metaflowmaps.draws import Draws, equal_log_weights, tilted_weights
from metaflowmaps.finetuning.baseline import Baseline, bins_of
from metaflowmaps.finetuning.problem import Cond, Place, Problem, evaluating, student_flow
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.random import randn, stream
from metaflowmaps.rewards.base import is_differentiable
from metaflowmaps.steering.problem import FIRST
from metaflowmaps.value import ess, log_mean

BINS = 32  # of the inner time, for λ
RATE = 0.01  # of its averages
Source = Callable[[MetaFlowMap, int, int, torch.Generator], tuple[Tensor, Cond]]


@dataclass(frozen=True)
class TargetBatch:
    """Inner states (a, z) with their regression targets in F, and weights; everything frozen."""

    t: Tensor
    a: Tensor
    z: Tensor
    target: Tensor
    weight: Tensor
    cond: Cond
    figures: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.t)

    def rows(self, start: int, end: int) -> "TargetBatch":
        """Rows [start, end)."""
        parts: dict[str, Any] = {name: v[start:end] for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **parts, cond={name: v[start:end] for name, v in self.cond.items()})

    def to(self, device: torch.device) -> "TargetBatch":
        """The batch on a device."""
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved, cond={name: v.to(device) for name, v in self.cond.items()})

    def about(self, rows: Tensor) -> str:
        """What these rows have in common, for a message."""
        t, weight = self.t.cpu()[rows], self.weight.cpu()[rows]
        return f"times in [{float(t.min()):.3f}, {float(t.max()):.3f}] and weights up to {float(weight.max()):.3g}"


class Regression:
    """w ‖F̂ − F‖² on targets that a subclass makes; counts the student's own calls."""

    def __init__(self, problem: Problem, source: Source, batch_size: int, seed: int) -> None:
        self.problem, self.source, self.batch_size, self.seed = problem, source, batch_size, seed

    def __call__(self, model: MetaFlowMap, batch: TargetBatch) -> Tensor:
        """Per-row losses, (B,)."""
        n = len(batch)
        self.problem.count(forwards=n, backwards=n)
        f = student_flow(model, batch.a, batch.z, batch.z, batch.cond)
        return batch.weight * event_sum((f - batch.target).square())

    def place(self, model: MetaFlowMap, step: int, generator: torch.Generator) -> Place:
        """The states of a step."""
        n = self.batch_size
        x_1, cond = self.source(model, step, n, generator)
        noise = randn(tuple(x_1.shape), generator, x_1.dtype, x_1.device)
        return self.problem.at(self.problem.times(n, generator).to(x_1), x_1, noise, cond)

    def state_dict(self) -> dict[str, Any]:
        held = self.source.state_dict() if hasattr(self.source, "state_dict") else {}
        return {"source": held, "calls": dict(self.problem.calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if hasattr(self.source, "load_state_dict"):
            self.source.load_state_dict(state["source"])
        self.problem.calls = dict(state["calls"])


class MFMFT(Regression):
    """The paper's objective in its three forms; ``weighted=False`` is the self-normalised regression."""

    def __init__(
        self,
        problem: Problem,
        source: Source,
        baseline: Baseline,
        num_draws: int,
        batch_size: int,
        seed: int,
        form: str = "auto",
        weighted: bool = True,
        sigma_squared: float | None = None,
    ) -> None:
        super().__init__(problem, source, batch_size, seed)
        if form == "auto":
            form = "blend" if is_differentiable(problem.reward) else "gradient-free"
        self.baseline, self.num_draws, self.form, self.weighted = baseline, num_draws, form, weighted
        self.sigma_squared, self.mixing = sigma_squared, Mixing()

    @torch.no_grad()
    def batch(self, model: MetaFlowMap, step: int) -> TargetBatch:
        """The states of a step with targets and weights. Called once a step: baseline and λ learn from it."""
        g = stream(self.seed, "finetune", step)
        place = self.place(model, step, g)
        made = self.problem.draws(place, self.num_draws, self.form != "gradient-free", g)
        level = self.baseline(place, g)
        target, weight, value = self.targets(place, made, level, model)
        self.baseline.update(place, value)
        share = tilted_weights(made.rewards, equal_log_weights(made.rewards))
        figures = figures_of(made.rewards, share, weight) | {"value": mean_of_finite(value)}
        if not self.weighted:
            weight = torch.ones_like(weight)
        return TargetBatch(place.t, place.a, place.z, target, weight, place.cond, figures)

    def targets(
        self, place: Place, made: Draws, level: Tensor, model: MetaFlowMap | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Targets in F, weights and V̂ at a batch of states, from draws; λ learns where the student is given."""
        log_base = equal_log_weights(made.rewards)
        value = log_mean(made.rewards, log_base)
        weight = torch.exp(value - level)
        share = tilted_weights(made.rewards, log_base)
        flows = self._flows(place, made)
        if self.form == "blend":
            free, gradient = flows
            mix = torch.where(place.t >= FIRST, self.mixing(place.a), torch.zeros_like(place.t))
            if model is not None:
                with evaluating(model):
                    now = student_flow(model, place.a, place.z, place.x, place.cond)
                self.problem.count(forwards=len(place.t))
                each = torch.exp(made.rewards - level)
                self.mixing.update(place.a, place.t >= FIRST, each, free - now, gradient - now)
            flows = [free + expand_time(mix, place.x) * (gradient - free)]
        target = torch.einsum("nb,nbd->bd", share.to(place.x.dtype), flows[0].flatten(2)).reshape(place.x.shape)
        return target, weight, value

    def _flows(self, place: Place, made: Draws) -> list[Tensor]:
        """v_i of each form that is needed, in F: (N, B, *event)."""
        path = self.problem.path
        out, t = [], expand_time(place.t, place.x)
        late = (place.t >= FIRST).reshape(t.shape)
        safe = torch.where(late, t, torch.full_like(t, 0.5))
        if self.form != "gradient":
            out.append(self._free(place, made))
        if self.form != "gradient-free":
            half = path.sigma_squared(safe) / 2 if self.sigma_squared is None else self.sigma_squared / 2
            assert made.gradients is not None
            # what a hard constraint forbids has no weight, and may have no gradient either
            allowed = made.rewards.isfinite().reshape(*made.rewards.shape, *([1] * (t.ndim - 1)))
            gradients = torch.where(allowed, made.gradients, torch.zeros_like(made.gradients))
            by_gradient = torch.stack([place.carried(place.drift + half * g) for g in gradients])
            # below FIRST the map's dependence on x is 0/0 after division by β: the other form is regular there
            early = out[0] if out else self._free(place, made)
            out.append(torch.where(late, by_gradient, early))
        return out

    def _free(self, place: Place, made: Draws) -> Tensor:
        """α̇ ε + β̇ X_i in F."""
        drifts = [self.problem.path.from_denoise(place.t, place.x, x, "drift") for x in made.x_1]
        return torch.stack([place.carried(v) for v in drifts])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "baseline": self.baseline.state_dict(), "mixing": self.mixing.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.baseline.load_state_dict(state["baseline"])
        self.mixing.load_state_dict(state["mixing"])


def figures_of(rewards: Tensor, share: Tensor, weight: Tensor) -> dict[str, float]:
    """What a batch reports of its draws (N, B), with their shares, and of its rows' weights (B,)."""
    return {
        "ess_of_draws": float(ess(share).mean()) / len(share),
        "ess_of_rows": share_of_rows(weight),
        "weight": float(weight.mean()),
        "reward_of_draws": mean_of_finite(rewards),
    }


def share_of_rows(weight: Tensor) -> float:
    """(Σ w)²/Σ w² over the number of rows: how many of them a batch rests on."""
    w = weight.double()
    squares = float(w.square().sum())
    return float(w.sum()) ** 2 / squares / len(w) if squares > 0 else 0.0


def mean_of_finite(values: Tensor) -> float:
    """Their mean; 0 where a hard constraint leaves none."""
    kept = values[values.isfinite()]
    return float(kept.mean()) if len(kept) else 0.0


class Mixing:
    """λ in bins of the inner time, from running second moments of both forms' weighted residuals.

    ``E‖(1 − λ) R_f + λ R_g‖²`` is least at ``λ = (ff − fg)/(ff + gg − 2 fg)``.
    """

    def __init__(self) -> None:
        self.moments = torch.zeros(3, BINS, dtype=torch.float64)  # ff, gg, fg

    def __call__(self, a: Tensor) -> Tensor:
        free, gradient, both = self.moments
        apart = free + gradient - 2 * both
        best = torch.where(apart > 0, (free - both) / apart, torch.zeros_like(apart)).clamp(0, 1)
        return best.to(a)[bins_of(a, BINS)]

    def update(self, a: Tensor, usable: Tensor, weight: Tensor, free: Tensor, gradient: Tensor) -> None:
        """Residuals (N, B, *event) with weights (N, B)."""
        squared = weight.square().double()
        free, gradient = free.flatten(2).double(), gradient.flatten(2).double()
        each = torch.stack([(squared * (p * q).sum(2)).mean(0) for p, q in
                            ((free, free), (gradient, gradient), (free, gradient))]).cpu()  # fmt: skip
        index, finite = bins_of(a, BINS).cpu(), each.isfinite().all(0) & usable.cpu()
        for b in index[finite].unique().tolist():
            seen = each[:, finite & (index == b)].mean(1)
            fresh = bool((self.moments[:, b] == 0).all())
            self.moments[:, b] = seen if fresh else torch.lerp(self.moments[:, b], seen, RATE)

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self.moments.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments = state["moments"]
