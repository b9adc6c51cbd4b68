r"""How errors of the base model propagate: to V, to the steered law by method, and to the law of a tuned drift.

The paper's inverse problem with exact answers, and a model that is wrong by a known amount. Its draws are moved,

    x̃_1 = x_1 + δ τ_t f(x_1),        D̃_t(x) = D_t(x) + δ τ_t E[f(x_1) | x_t = x],        τ_t² = α² v/(α² + β² v)

by a smooth random field f of unit size, in units of the posterior's spread τ_t (v is the variance of a coordinate): of
the data's own at t = 0, of nothing at t = 1. That is how a network in the gaussian chart is wrong. The mean of f under
a mixture is known in closed form, so draws and drift belong together; either may be wrong alone. Every seed has a
field of its own. δ is thus the relative size of the error of the posterior mean.

What is called the error of a law is what δ adds, √(SW2²(δ) − SW2²(0)) of one method to the exact tilted law. Maps that
are there from ``python -m benchmarks fidelity``, trained for different times, are set on the same axes: by how far
their D is off in the same units.
"""

import json
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import metaflowmaps as mfm
from benchmarks import benchmark_figures
from benchmarks.common import RESULTS, RUNS, keep, say
from benchmarks.frontier import Judge
from benchmarks.provenance import commit_now
from metaflowmaps._shapes import Cond, Time, batch_time, expand_time
from metaflowmaps.draws import Draws, equal_log_weights
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.path import LinearPath, Path
from metaflowmaps.posterior import GlassPosterior
from metaflowmaps.random import stream
from metaflowmaps.recipes.tasks import steering_task
from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.steering.diagnostics import without_pilot_pool
from metaflowmaps.value import free_shift, log_mean

DELTAS = (0.0, 0.01, 0.03, 0.1, 0.3)
FITTED = (0.03, 0.1, 0.3)  # what slopes are fitted on: below, chance is larger than the error
FEATURES, LENGTH = 32, 2.0  # of the field; the modes are 4.2 apart and have a deviation of .7
SAMPLES, SEEDS, STEPS = 512, 3, 60
TIMES, STATES, DRAWS = (0.2, 0.5, 0.8), 128, 1024


def _glass(model: Any) -> GlassPosterior:
    return GlassPosterior(model.path, model.drift, 4, "midpoint")


ODE = mfm.ODE(steps=STEPS)
METHODS: dict[str, tuple[Any, ...]] = {
    "none": (mfm.Unsteered(), ODE),
    "mfm-gf": (mfm.MFMGF(), ODE),
    "mfm-g": (mfm.MFMG(posterior=_glass), ODE),
    "mfm-smc": (mfm.SMC(), mfm.SDE(steps=STEPS)),
    "mfm-anneal": (mfm.Anneal(), ODE),
    "rejection": (mfm.Rejection(bound=0.0),),
    "resampling": (mfm.Resampling(n=16),),
    "dps-scale=.03": (mfm.DPS(scale=0.03), ODE),
    "mfm-gf, 32 draws": (mfm.MFMGF(num_draws=32), ODE),  # ∇V of the wrong model all but exactly: where MFM-FT ends
}
ALONE = {"mfm-gf, drift alone": (True, False), "mfm-gf, draws alone": (False, True)}  # what is wrong: drift, draws
ON_MAPS = ("none", "mfm-gf", "rejection")


# -- a model that is wrong by a known amount ---------------------------------------------------------------------------


class Field:
    """Σ_m a_m cos(w_m · x + φ_m), smooth over LENGTH, of unit mean square a coordinate under a law."""

    def __init__(self, law: GaussianMixture, seed: int) -> None:
        g = stream(seed, "error-propagation", "field")
        self.w = torch.randn(FEATURES, law.dim, generator=g, dtype=torch.float64) / LENGTH
        self.phase = 2 * math.pi * torch.rand(FEATURES, generator=g, dtype=torch.float64)
        self.a = torch.randn(FEATURES, law.dim, generator=g, dtype=torch.float64)
        self.a /= self(law.sample(2**14, g).double()).square().mean().sqrt()

    def __call__(self, x: Tensor) -> Tensor:
        """f(x): (…, d)."""
        return torch.cos(x @ self.w.to(x).T + self.phase.to(x)) @ self.a.to(x)

    def mean(self, law: GaussianMixture) -> Tensor:
        """E f(x_1) under each row's mixture, (B, d): E cos(w·x + φ) = e^{−wᵀCw/2} cos(w·m + φ) under N(m, C)."""
        w = self.w.to(law.means)
        damping = torch.exp(-0.5 * torch.einsum("md,bkde,me->bkm", w, law.covariances, w))
        waves = damping * torch.cos(law.means @ w.T + self.phase.to(w))
        return torch.einsum("bk,bkm->bm", law.weights, waves) @ self.a.to(w)


@dataclass(frozen=True)
class WrongModel:
    """A mixture's exact drift and draws, moved by δ times a field: a model to steer.

    Args:
        path: the interpolant.
        law: of the data.
        field: f.
        delta: δ.
        drift_too: whether the drift is wrong.
        draws_too: whether the draws are wrong.
    """

    path: Path
    law: GaussianMixture
    field: Field
    delta: float
    drift_too: bool = True
    draws_too: bool = True
    pathwise = False

    @property
    def event_shape(self) -> tuple[int, ...]:
        """(d,)."""
        return (self.law.dim,)

    @property
    def dtype(self) -> torch.dtype:
        """The law's."""
        return self.law.dtype

    def drift(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """b + c_t δ τ_t E[f | x], whose factor c_t τ_t = (α β̇ − β α̇) √(v/(α² + β² v)) is finite up to t = 1."""
        exact = self.law.drift(self.path, t, x)
        if not (self.drift_too and self.delta):
            return exact
        at = expand_time(batch_time(t, x), x)
        alpha, beta = self.path.alpha(at), self.path.beta(at)
        crossed = alpha * self.path.beta_dot(at) - beta * self.path.alpha_dot(at)
        gain = crossed * (self._variance / (alpha**2 + beta**2 * self._variance)).sqrt()
        return exact + (self.delta * gain).to(x) * self.field.mean(self.law.posterior(self.path, t, x)).to(x)

    def draw(
        self, t: Time, x_t: Tensor, num_draws: int, generator: torch.Generator | None = None, cond: Cond = None
    ) -> Tensor:
        """Exact draws, moved: (num_draws, B, d)."""
        drawn = self.law.posterior(self.path, t, x_t).draw(num_draws, generator)
        return self.moved(drawn, t, x_t) if self.draws_too and self.delta else drawn

    def moved(self, drawn: Tensor, t: Time, x_t: Tensor) -> Tensor:
        """x_1 + δ τ_t f(x_1)."""
        at = expand_time(batch_time(t, x_t), x_t)
        return drawn + (self.delta * spread_of(self.path, self._variance, at)).to(drawn) * self.field(drawn)

    @property
    def _variance(self) -> float:
        return float(self.law.variance.mean())


def spread_of(path: Path, variance: float, t: Time) -> Tensor:
    """τ_t, the posterior's deviation for Gaussian data of that variance: α √v/√(α² + β² v)."""
    alpha, beta = path.alpha(t), path.beta(t)
    return alpha * (variance / (alpha**2 + beta**2 * variance)) ** 0.5


# -- the benchmark -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Benchmark: error-propagation."""
    torch.set_num_threads(1)
    file = RESULTS / "error-propagation.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    found = kept.get("problems", {})
    task = steering_task("gmm-inverse")
    law, reward = task.law, task.reward("")
    fields, judge = [Field(law, seed) for seed in range(SEEDS)], Judge(law, reward)
    base = Judge(law, LinearGaussian(reward.A, reward.y, 1.0, strength=0.0))  # no reward: the law itself
    for delta in DELTAS:
        name = f"δ = {delta:g}"
        if name not in found:
            say(name)
            models = [WrongModel(LinearPath(), law, field, delta) for field in fields]
            methods = {label: _cell(models, base if label == "none" else judge, how) for label, how in METHODS.items()}
            for label, (drift, draws) in ALONE.items():
                wrong = [WrongModel(LinearPath(), law, field, delta, drift, draws) for field in fields]
                methods[label] = _cell(wrong, judge, METHODS["mfm-gf"])
            found[name] = {**commit_now(), "delta": delta, "values": _values(models, reward), "methods": methods}
            _keep(found)
    for name, model in trained_maps().items():
        if name not in found:
            say(name)
            methods = {label: _cell([model] * SEEDS, base if label == "none" else judge, METHODS[label])
                       for label in ON_MAPS}  # fmt: skip
            found[name] = {**commit_now(), "map_delta": map_error(model, law), "methods": methods}
            _keep(found)
    figures.save(benchmark_figures.error_propagation(found, slopes(found)), RESULTS / "error-propagation.png")


def _keep(found: dict[str, Any]) -> None:
    keep("error-propagation", "python -m benchmarks error-propagation", {"problems": found, "slopes": slopes(found)})


def _cell(models: list[Any], judge: Judge, how: tuple[Any, ...]) -> dict[str, float]:
    """One method on the model of each seed: mean SW2² to the exact law as a root, its floor, mode weights, reward."""
    with warnings.catch_warnings(), without_pilot_pool():
        warnings.simplefilter("ignore")
        sets = [mfm.steer(model, judge.reward, SAMPLES, *how, seed=seed).samples for seed, model in enumerate(models)]
    near = judge.distance([x.cpu() for x in sets])
    say(f"  {how[0].name}: {near.sw2 / near.floor_sw2:.2f} × floor, mode L1 {near.mode_l1:.3f}")
    cell = {"sw2": near.sw2, "floor": near.floor_sw2, "mode_l1": near.mode_l1, "reward": near.reward}
    return {key: float(f"{value:.5g}") for key, value in cell.items()}


@torch.no_grad()
def _values(models: list[WrongModel], reward: LinearGaussian) -> dict[str, dict[str, float]]:
    """What moving one set of draws does to V̂ and, relative to its size, to D* − D, at states of the tilted law."""
    out = {}
    for t in TIMES:
        of_value, of_shift, size = 0.0, 0.0, 0.0
        for seed, model in enumerate(models):
            g = stream(seed, "error-propagation", "values", t)
            x_1 = model.law.tilt(reward).sample(STATES, g).float()
            x = model.path.interpolate(torch.randn(x_1.shape, generator=g), x_1, t)
            drawn = model.law.posterior(model.path, t, x).draw(DRAWS, g)
            (value, shift), (wrong, moved) = (
                _estimated(at, reward) for at in (drawn, model.moved(drawn, t, x) if model.delta else drawn)
            )
            of_value += float((wrong - value).square().mean()) / len(models)
            of_shift, size = of_shift + float((moved - shift).square().sum()), size + float(shift.square().sum())
        out[f"{t:g}"] = {"value": math.sqrt(of_value), "shift": math.sqrt(of_shift / size)}
    return out


def _estimated(draws: Tensor, reward: LinearGaussian) -> tuple[Tensor, Tensor]:
    """V̂ and the gradient-free shift of draws (N, B, d)."""
    made = Draws(draws, reward(draws.flatten(0, 1)).reshape(draws.shape[:2]))
    equal = equal_log_weights(made.rewards)
    return log_mean(made.rewards, equal), free_shift(made, equal)


def slopes(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each method what δ adds to the error, by δ, and the slope of its logarithm against that of δ."""
    by_delta = {cell["delta"]: cell for cell in found.values() if "delta" in cell}
    out: dict[str, dict[str, float]] = {}
    for name in by_delta.get(0.0, {"methods": {}})["methods"]:
        added = {delta: _added(by_delta, name, delta) for delta in by_delta if delta}
        out[name] = {f"{delta:g}": value for delta, value in added.items()}
        fitted = [(math.log(d), math.log(added[d])) for d in FITTED if added.get(d, 0.0) > 0]
        if len(fitted) > 1:
            out[name]["slope"] = slope(fitted)
    return out


def _added(by_delta: dict[float, Any], name: str, delta: float) -> float:
    squared = by_delta[delta]["methods"][name]["sw2"] ** 2 - by_delta[0.0]["methods"][name]["sw2"] ** 2
    return math.sqrt(max(0.0, squared))


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares."""
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


# -- maps that were trained for different times ------------------------------------------------------------------------


def trained_maps() -> dict[str, MetaFlowMap]:
    """The maps of the mixture that ``fidelity`` has left, by recipe and steps."""
    files = sorted(RUNS.glob("fidelity-*/checkpoints/step-*"))
    return {
        f"{file.parts[-3].removeprefix('fidelity-')}, {int(file.name[5:]):,} steps": MetaFlowMap.from_pretrained(file)
        for file in files
    }


@torch.no_grad()
def map_error(model: MetaFlowMap, law: GaussianMixture) -> float:
    """By how much a map's D is off, in units of τ_t, over all times: its δ."""
    g, variance = stream(0, "error-propagation", "maps"), float(law.variance.mean())
    x_1 = law.sample(4096, g)
    t = torch.rand(4096, generator=g)
    x = model.path.interpolate(torch.randn(x_1.shape, generator=g), x_1, t)
    off = model.path.to_denoise(t, x, model.drift(t, x), "drift") - law.denoise(model.path, t, x)
    return float((off / expand_time(spread_of(model.path, variance, t), x)).square().mean().sqrt())
