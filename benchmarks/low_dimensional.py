"""Data on a plane or on points: what ∇V, its estimators, time grids and steered laws do as the data grows thin.

A mixture of six components whose means lie on a plane in 8 dimensions. Its covariance is shrunk by a factor s: across
the plane alone (``plane``, where each component keeps its spread along it) or all of it (``points``). The reward
observes one direction that lies half in the plane and half across it. ∇V is known in closed form for any s > 0; a
variance of 0 is refused by the law.

Estimators are judged at states of the steered process, x_t from exact samples of the tilted law, at times ever nearer
to 1. They run in float32, as a model does, the truth in float64. Draws are exact but where they need a gradient in the
state: those are GLASS', of the exact drift.
"""

import json
import math
import warnings
from typing import Any

import torch
from torch import Tensor

import metaflowmaps as mfm
from benchmarks import benchmark_figures
from benchmarks.common import RESULTS, keep, say
from benchmarks.frontier import Judge
from benchmarks.provenance import commit_now
from metaflowmaps.draws import DrawOptions, Draws, equal_log_weights, make_draws
from metaflowmaps.errors import InputError
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.path import LinearPath
from metaflowmaps.posterior import ExactModel, ExactPosterior, GlassPosterior
from metaflowmaps.random import stream
from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.steering.diagnostics import without_pilot_pool
from metaflowmaps.steering.mfm_g import blended

PATH = LinearPath()
DIM, PLANE, COMPONENTS, VARIANCE, NOISE = 8, 2, 6, 0.25, 0.3
KINDS = ("plane", "points")
SHRUNK = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
GAPS = (0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.03, 0.01, 0.003, 0.001, 1e-4)  # 1 − t
STATES, DRAWS = 64, 16
SAMPLES, SEEDS, STEPS = 512, 2, 40


def _glass(model: Any) -> GlassPosterior:
    return GlassPosterior(model.path, model.drift, 4, "midpoint")


METHODS: dict[str, tuple[Any, ...]] = {
    "mfm-gf": (mfm.MFMGF(), mfm.ODE(steps=STEPS)),
    "mfm-gf, no recycling": (mfm.MFMGF(recycle=1), mfm.ODE(steps=STEPS)),
    "mfm-g": (mfm.MFMG(posterior=_glass), mfm.ODE(steps=STEPS)),
    "mfm-g, plain": (mfm.MFMG(posterior=_glass, blend=False), mfm.ODE(steps=STEPS)),
    "mfm-smc": (mfm.SMC(), mfm.SDE(steps=STEPS)),
    "mfm-anneal": (mfm.Anneal(), mfm.ODE(steps=STEPS)),
    "dps": (mfm.DPS(), mfm.ODE(steps=STEPS)),
}
"""All with four draws where they draw, and their defaults otherwise."""
SCHEDULES: dict[str, Any] = {
    "ODE, uniform": mfm.ODE(steps=STEPS, grid="uniform"),
    "ODE, log-snr": mfm.ODE(steps=STEPS, grid="log-snr"),
    "ODE, power": mfm.ODE(steps=STEPS, grid="power"),
    "ODE, uniform, midpoint": mfm.ODE(steps=STEPS, grid="uniform", integrator="midpoint"),
    "SDE, uniform": mfm.SDE(steps=STEPS, grid="uniform"),
    "SDE, log-snr": mfm.SDE(steps=STEPS, grid="log-snr"),
}


def main() -> None:
    """Benchmark: low-dimensional."""
    torch.set_num_threads(1)
    file = RESULTS / "low-dimensional.json"
    found: dict[str, Any] = json.loads(file.read_text())["problems"] if file.exists() else {}
    refused = {kind: _refused(kind) for kind in KINDS}
    for kind in KINDS:
        for s in SHRUNK:
            name = f"{kind}, s = {s:g}"
            if name not in found:
                say(name)
                found[name] = {**commit_now(), "kind": kind, "s": s, **measured(kind, s)}
                keep("low-dimensional", "python -m benchmarks low-dimensional", {"problems": found, "s = 0": refused})
    figures.save(benchmark_figures.low_dimensional(found), RESULTS / "low-dimensional.png")


# -- laws --------------------------------------------------------------------------------------------------------------


def frame() -> Tensor:
    """Orthonormal directions (8, 8), columns; the first two span the plane."""
    g = stream(0, "low-dimensional", "frame")
    basis: Tensor = torch.linalg.qr(torch.randn(DIM, DIM, generator=g, dtype=torch.float64))[0]
    return basis


def law_of(kind: str, s: float) -> GaussianMixture:
    """The mixture with its variance shrunk by s, across the plane or everywhere."""
    basis, variances = frame(), torch.full((DIM,), VARIANCE * s, dtype=torch.float64)
    if kind == "plane":
        variances[:PLANE] = VARIANCE
    g = stream(0, "low-dimensional", "means")
    means = 2 * torch.randn(COMPONENTS, PLANE, generator=g, dtype=torch.float64) @ basis[:, :PLANE].T
    return GaussianMixture(means.float(), basis @ variances.diag() @ basis.T)


def reward_on(law: GaussianMixture) -> LinearGaussian:
    """One direction observed, half along the plane, between the first two means."""
    basis = frame()
    a = (basis[:, 0] + basis[:, PLANE]) / math.sqrt(2)
    return LinearGaussian(a, float(a @ law.means[:2].mean(0)), NOISE)


def thickness(kind: str, law: GaussianMixture, x: Tensor) -> float:
    """Root mean square distance of samples from the set that the data shrinks to, a coordinate."""
    if kind == "plane":
        across = x.double() @ frame()[:, PLANE:]
    else:
        across = x.double() - law.means[torch.cdist(x.double(), law.means).argmin(1)]
    return float(across.square().mean().sqrt())


def _refused(kind: str) -> str:
    """What the law says to a variance of 0."""
    try:
        law_of(kind, 0.0)
    except InputError as error:
        return str(error)
    return "accepted"


def measured(kind: str, s: float) -> dict[str, Any]:
    """Everything about one law."""
    law = law_of(kind, s)
    reward = reward_on(law)
    judge = Judge(law, reward)
    return {
        "log_evidence": float(law.log_evidence(reward)),
        "estimates": {
            f"{gap:g}": {"steepest": steepest(law, reward, gap), **_estimates(law, reward, gap)} for gap in GAPS
        },
        "schedules": {name: _steered(kind, judge, mfm.Exact(), process) for name, process in SCHEDULES.items()},
        "methods": {name: _steered(kind, judge, *how) for name, how in METHODS.items()},
    }


# -- estimators --------------------------------------------------------------------------------------------------------


def exact_gradient(law: GaussianMixture, reward: LinearGaussian, t: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """V (B,) and ∇V (B, d) by the closed form."""
    at = x.double().requires_grad_(True)
    value = law.value(PATH, t, at, reward)
    return value.detach(), torch.autograd.grad(value.sum(), at)[0]


def steepest(law: GaussianMixture, reward: LinearGaussian, gap: float) -> float:
    """The largest ‖∇V‖ between two components, where the posterior passes from one to the other.

    Between β μ_i and β μ_j, of one covariance, the log-odds are linear, with slope β²|Δ|²/v in units of Δ = μ_j − μ_i
    and v the noisy variance along Δ: they go from 0 to 1 over an α²th of the way where the data has no spread.
    """
    t, pairs = 1 - gap, torch.combinations(torch.arange(len(law.means)))
    alpha, beta = float(PATH.alpha(t)), float(PATH.beta(t))
    start, step = law.means[pairs[:, 0]], law.means[pairs[:, 1]] - law.means[pairs[:, 0]]
    along = torch.nn.functional.normalize(step, dim=1)
    variance = alpha**2 + beta**2 * torch.einsum("pd,de,pe->p", along, law.covariances[0], along)
    log_odds = torch.linspace(-8, 8, 129, dtype=torch.float64)
    share = 0.5 + log_odds[:, None] * variance / (beta**2 * step.square().sum(1))
    x = beta * (start + share[..., None] * step)
    return float(f"{float(exact_gradient(law, reward, t, x.flatten(0, 1))[1].norm(dim=1).max()):.5g}")


def plugged_in(law: GaussianMixture, reward: LinearGaussian, t: float, x: Tensor) -> Tensor:
    """∇_x r(D_t(x)), what DPS puts in place of ∇V: (B, d)."""
    at = x.clone().requires_grad_(True)
    return torch.autograd.grad(reward(law.denoise(PATH, t, at)).sum(), at)[0]


def _estimates(law: GaussianMixture, reward: LinearGaussian, gap: float) -> dict[str, Any]:
    """Sizes and root-mean-square errors at 1 − t = gap."""
    t, g = 1 - gap, stream(1, "low-dimensional", gap)
    x_1 = law.tilt(reward).sample(STATES, g).double()
    x = PATH.interpolate(torch.randn(x_1.shape, generator=g, dtype=torch.float64), x_1, t).float()
    value, gradient = exact_gradient(law, reward, t, x)
    free = mfm.value_gradient(ExactPosterior(PATH, law), reward, t, x, DRAWS, "gradient-free", g)
    made = {
        "gradient-free": free.gradient,
        **_by_gradients(law, reward, t, x, g),
        "plug-in": plugged_in(law, reward, t, x),
    }
    errors = {name: (estimate.double() - gradient).square().sum(1) for name, estimate in made.items()}
    drawn = GlassPosterior(PATH, _drift(law), 4, "midpoint").draw(t, x, DRAWS, g).double()
    spread = law.posterior(PATH, t, x.double()).variance.mean().sqrt()
    return {
        "gradient": _root(gradient.square().sum(1)),
        "value": _root((free.value.double() - value).square()),
        "errors": {name: _root(squares) for name, squares in errors.items()},
        "spread": float(spread),
        "glass_spread": _root((drawn - drawn.mean(0)).square().sum(0).mean(1) / (DRAWS - 1)),
        "finite": all(bool(squares.isfinite().all()) for squares in errors.values()),
    }


def _by_gradients(
    law: GaussianMixture, reward: LinearGaussian, t: float, x: Tensor, g: torch.Generator
) -> dict[str, Tensor]:
    """∇V from gradients of draws that GLASS makes in 4 and in 16 midpoint steps, and blended as MFM-G blends it."""
    out, to_shift = {}, float(PATH.alpha(t)) ** 2 / float(PATH.beta(t))
    for steps in (4, 16):
        posterior = GlassPosterior(PATH, _drift(law), steps, "midpoint")
        made = make_draws(posterior, lambda x, cond=None: reward(x), t, x, DrawOptions(DRAWS, True), g)
        base, gradients = equal_log_weights(made.rewards), made.gradients
        assert gradients is not None
        weights = (base + made.rewards).softmax(0)
        out[f"gradient, GLASS {steps}"] = torch.einsum("nb,nbd->bd", weights, gradients)
        if steps == 16:
            in_shifts = Draws(made.x_1, made.rewards, to_shift * gradients)
            shift, _ = blended(in_shifts, in_shifts, base, law.denoise(PATH, t, x))
            out["blend"] = shift / to_shift
    return out


def _drift(law: GaussianMixture) -> Any:
    return lambda t, x: law.drift(PATH, t, x)


def _root(squares: Tensor) -> float:
    return float(f"{float(squares.mean().sqrt()):.5g}")


# -- steering ----------------------------------------------------------------------------------------------------------


def _steered(kind: str, judge: Judge, *how: Any) -> dict[str, float]:
    """Sliced W2 over its floor, thickness over the tilted law's own, and what is not finite."""
    with warnings.catch_warnings(), without_pilot_pool():
        warnings.simplefilter("ignore")
        runs = [mfm.steer(ExactModel(PATH, judge.law), judge.reward, SAMPLES, *how, seed=seed) for seed in range(SEEDS)]
    sets = [run.samples for run in runs]
    near, samples = judge.distance(sets), torch.cat(sets)
    finite = samples[samples.isfinite().all(1)]
    true = thickness(kind, judge.law, judge.tilted.sample(2**14, stream(0, "thickness")))
    cell = {
        "ratio": near.sw2 / near.floor_sw2,
        "mode_l1": near.mode_l1,
        "thickness": thickness(kind, judge.law, finite) / true if len(finite) else math.nan,
        "nonfinite": near.nonfinite,
        "nfe": sum(run.cost["nfe"] for run in runs) / SEEDS,
    }
    say(f"  {how[0].name}, {how[1].name}: {cell['ratio']:.2f} × floor, thickness {cell['thickness']:.3g} of its own")
    return {key: float(f"{value:.4g}") for key, value in cell.items()}
