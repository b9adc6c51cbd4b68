"""Defaults held against exact tilted laws of many mixtures: how far they are, and whether a run that is far says so.

Draws are exact (``mfm.ExactModel``) but for GLASS, and for MFM-G, whose draws need a gradient in the state and are
those of GLASS in four midpoint steps. Defaults are chosen on one set of problems and judged on another, with laws and
rewards of other seeds. Methods other than MFM-GF run on 60 steps, as the usual preset does.

A run is a **silent failure** where SW2 is over twice the floor of exact samples and no note says anything.
"""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import metaflowmaps as mfm
from benchmarks.common import RESULTS, keep, say
from benchmarks.provenance import commit_now
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.metrics.finite import root
from metaflowmaps.metrics.sliced_w2 import Curves, curves, directions
from metaflowmaps.path import LinearPath
from metaflowmaps.posterior import ExactModel, GlassPosterior
from metaflowmaps.random import stream
from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.steering import USUAL

PATH = LinearPath()
SAMPLES, EXACT_SETS = 1024, 8
KINDS = {2: ("sharp", "quadratic"), 3: ("sharp", "linear"), 8: ("sharp", "quadratic"), 16: ("sharp", "linear")}


def _from_glass(model: Any) -> GlassPosterior:
    return GlassPosterior(model.path, model.drift, 4, "midpoint")


SHORT = mfm.ODE(steps=60)
CANDIDATES: dict[str, tuple[Any, ...]] = {
    "`steer` without a method": tuple(USUAL),
    "`mfm-gf` by name: N = 4, 250 steps": (mfm.MFMGF(), mfm.ODE()),
    "the same, log-snr": (mfm.MFMGF(), mfm.ODE(grid="log-snr")),
    "60 steps": (mfm.MFMGF(), SHORT),
    "60 steps, log-snr": (mfm.MFMGF(), mfm.ODE(steps=60, grid="log-snr")),
    "60 steps, N = 1": (mfm.MFMGF(num_draws=1), SHORT),
    "60 steps, N = 2": (mfm.MFMGF(num_draws=2), SHORT),
    "60 steps, N = 8": (mfm.MFMGF(num_draws=8), SHORT),
}
FAMILIES: dict[str, tuple[Any, ...]] = {
    "`mfm-g`": (mfm.MFMG(posterior=_from_glass), SHORT),
    "`glass`": (mfm.Glass(), SHORT),
    "`mfm-smc`": (mfm.SMC(), SHORT),
    "`mfm-anneal`": (mfm.Anneal(), SHORT),
    "`dps`": (mfm.DPS(), SHORT),
    "`tds`": (mfm.TDS(), SHORT),
    "`resampling`": (mfm.Resampling(),),
    "`rejection`": (mfm.Rejection(),),
    "`exact`": (mfm.Exact(), SHORT),
}
SETS = {"judged": {**CANDIDATES, **FAMILIES}, "chosen": CANDIDATES}
GLASS: dict[str, dict[str, Any]] = {
    "30 Euler steps, the default": {},
    "told the data's spread": {"data_std": 0.0},  # filled in
    "equal in s": {"data_std": None},
    "15 midpoint steps": {"steps": 15, "method": "midpoint"},
    "15 midpoint steps, equal in s": {"steps": 15, "method": "midpoint", "data_std": None},
}
TIMES, CONTEXTS, DRAWS = (0.05, 0.3, 0.6, 0.9, 0.97), 6, 512


def main() -> None:
    """Benchmark: defaults."""
    torch.set_num_threads(1)
    file = RESULTS / "defaults.json"
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    found, glass = kept.get("problems", {}), kept.get("glass", {})
    for which, settings in SETS.items():
        for dim, kinds in KINDS.items():
            for kind in kinds:
                name = f"{which}: {dim}-D {kind}"
                before = found.get(name, {}).get("runs", {})
                if any(label not in before for label in settings):  # what is there is not measured again
                    say(name)
                    problem = _problem(which, dim, kind)
                    runs = {label: before.get(label) or _steered(problem, how) for label, how in settings.items()}
                    commit = found.get(name, commit_now())["commit"]  # the oldest of the runs
                    found[name] = {"commit": commit, "set": which, "dimension": dim, "runs": runs}
                    keep("defaults", "python -m benchmarks defaults", {"problems": found, "glass": glass})
    glass = glass or {f"{dim}-D": _glass(law_of("judged", dim)) for dim in KINDS}
    keep("defaults", "python -m benchmarks defaults", {"problems": found, "glass": glass})


@dataclass(frozen=True)
class Problem:
    """A law, a reward, and curves of exact samples of the tilted law."""

    law: GaussianMixture
    reward: LinearGaussian
    exact: Curves


def law_of(which: str, dim: int) -> GaussianMixture:
    """Four components about 4 apart, with deviations of .4 to .8 and weights of .1 to .5."""
    g = stream(0, "defaults", which, dim)
    means = 3 / math.sqrt(dim) * torch.randn(4, dim, generator=g, dtype=torch.float64)
    deviations = 0.4 + 0.4 * torch.rand(4, generator=g, dtype=torch.float64)
    weights = 0.25 + torch.rand(4, generator=g, dtype=torch.float64)
    return GaussianMixture(means.float(), deviations.square(), weights / weights.sum())


def _quadratic(law: GaussianMixture, g: torch.Generator) -> LinearGaussian:
    """One projection of a sample, observed with noise .5."""
    a = _unit(1, law.dim, g)
    return LinearGaussian(a, a @ law.sample(1, g)[0].to(a), 0.5)


def _linear(law: GaussianMixture, g: torch.Generator) -> LinearGaussian:
    """e^{a·x} up to a factor: an observation far away with as much noise."""
    noise = 10.0
    return LinearGaussian(_unit(1, law.dim, g), noise**2, noise)


def _sharp(law: GaussianMixture, g: torch.Generator) -> LinearGaussian:
    """Two projections of a sample, observed with noise .2."""
    a = _unit(2, law.dim, g)
    return LinearGaussian(a, a @ law.sample(1, g)[0].to(a), 0.2)


REWARDS: dict[str, Callable[[GaussianMixture, torch.Generator], LinearGaussian]] = {
    "quadratic": _quadratic,
    "linear": _linear,
    "sharp": _sharp,
}


def _unit(rows: int, dim: int, g: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=g, dtype=torch.float64), dim=1)


def _problem(which: str, dim: int, kind: str) -> Problem:
    law = law_of(which, dim)
    reward, exact = REWARDS[kind](law, stream(1, "defaults", which, dim, kind)), Curves()
    for i in range(EXACT_SETS):
        exact.add(curves(law.tilt(reward).sample(SAMPLES, stream(2, "defaults", i)), directions(dim)))
    return Problem(law, reward, exact)


def _steered(problem: Problem, how: tuple[Any, ...]) -> dict[str, Any]:
    """One run: SW2 in floors, what it cost a sample, what it said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = mfm.steer(ExactModel(PATH, problem.law), problem.reward, SAMPLES, *how, seed=0)
    mine, along = Curves(), directions(problem.law.dim)
    mine.add(curves(result.samples, along))
    ratio = root(mine.squared_distance(problem.exact)) / root(problem.exact.floor())
    say(f"  {how[0].name}: {ratio:.2f} × the floor, {len(result.notes)} notes")
    return {"ratio": float(f"{ratio:.4g}"), "nfe": round(result.cost["nfe"], 1), "notes": list(result.notes)}


def _glass(law: GaussianMixture) -> dict[str, dict[str, float]]:
    """Error of GLASS' draws in floors, by settings and time."""
    spread = float(law.variance.mean().sqrt())
    found = {}
    for label, options in GLASS.items():
        told = {"data_std": spread} if options.get("data_std") == 0 else options
        posterior = GlassPosterior(PATH, lambda t, x: law.drift(PATH, t, x), **told)
        found[label] = {str(t): float(f"{_posterior_error(posterior, law, t):.4g}") for t in TIMES}
    say(f"GLASS in {law.dim} dimensions: {found}")
    return found


def _posterior_error(posterior: GlassPosterior, law: GaussianMixture, t: float) -> float:
    """√ of summed SW2² over contexts, in posterior variances, to the same between exact sets."""
    g, along = stream(0, "glass", t), directions(law.dim)
    x_1 = law.sample(CONTEXTS, g).float()
    x_t = PATH.interpolate(torch.randn(x_1.shape, generator=g), x_1, t)
    exact = law.posterior(PATH, t, x_t)
    drawn = posterior.draw(t, x_t, DRAWS, g)
    sets = [exact.draw(DRAWS, stream(1, "glass", i)) for i in range(EXACT_SETS)]
    squared = floor = 0.0
    for context, variance in enumerate(exact.variance.mean(1).tolist()):
        mine, theirs = Curves(), Curves()
        mine.add(curves(drawn[:, context], along))
        for x in sets:
            theirs.add(curves(x[:, context], along))
        squared += mine.squared_distance(theirs) / variance
        floor += theirs.floor() / variance
    return root(squared) / root(floor)
