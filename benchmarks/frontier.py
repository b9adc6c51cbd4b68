"""Where rejection dies: error against evaluations, on rewards that one-step samples all but never meet.

Mixtures of eight full covariances, two projections observed with noise .2, so far out that log E[e^{r − max r}] is
what the problem's name says; and a linear reward, which has no largest value. Draws are exact (``mfm.ExactModel``), the
truth is in closed form. Two more problems are of shipped digits (``frontier_digits``). A method has one setting for a
budget, the same on all problems; nothing is picked afterwards.
"""

import json
import math
import warnings
from typing import Any

import torch
from torch import Tensor

import metaflowmaps as mfm
from benchmarks import benchmark_figures, frontier_digits
from benchmarks.common import RESULTS, keep, say
from benchmarks.provenance import commit_now
from metaflowmaps.lab.evaluate.steering_error import ExactJudge
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.posterior import ExactModel
from metaflowmaps.random import stream
from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.steering.diagnostics import without_pilot_pool

SAMPLES, SEEDS, NOISE, DIRECTIONS = 512, 4, 0.2, 16
PROBLEMS = {"16-D, −5": (16, -5), "16-D, −10": (16, -10), "16-D, −20": (16, -20), "16-D, −40": (16, -40),
            "16-D, linear": (16, None), "64-D, −20": (64, -20), "256-D, −20": (256, -20)}  # fmt: skip
BUDGETS = (50, 150, 450, 1000, 2000)
ROWS = 16 * SAMPLES


class Judge(ExactJudge):
    """With a reference that fits into memory in 64 dimensions; frequencies to .002 are enough here."""

    REFERENCE = 2**16


def settings(budget: int) -> dict[str, tuple[Any, ...]]:
    """Every method at about so many evaluations a sample, network and reward together."""
    particles = {50: 1, 150: 1, 450: 2, 1000: 4, 2000: 8}[budget]
    draws = 4 if budget <= 450 else 16
    guided = mfm.ODE(steps=max(2, round(budget / (1 + 2 * draws))))
    return {
        "resampling": (mfm.Resampling(n=budget // 2),),
        "dps": (mfm.DPS(), mfm.ODE(steps=budget // 4)),
        "dps-scale=.03": (mfm.DPS(scale=0.03), mfm.ODE(steps=budget // 4)),
        "tds": (mfm.TDS(temper=0.5, scale=0.1), mfm.SDE(steps=budget // 4)),
        "mfm-gf": (mfm.MFMGF(num_draws=draws), guided),
        "mfm-smc": (mfm.SMC(num_draws=draws), mfm.SDE(steps=guided.steps)),
        "mfm-anneal": (
            mfm.Anneal(num_draws=2, n=particles),
            mfm.ODE(steps=round((budget / (2 * particles) - 4) / 2)),
        ),
    }


def main() -> None:
    """Benchmark: frontier."""
    torch.set_num_threads(1)
    file = RESULTS / "frontier.json"
    found: dict[str, Any] = json.loads(file.read_text())["problems"] if file.exists() else {}
    for name in (*PROBLEMS, *frontier_digits.PROBLEMS):
        if name not in found:
            say(name)
            found[name] = {**commit_now(), **_measured(*_opened(name))}
            keep("frontier", "python -m benchmarks frontier", {"problems": found})
    figures.save(benchmark_figures.frontier(found), RESULTS / "frontier.png")


def problem(dim: int, rarity: float | None) -> tuple[GaussianMixture, LinearGaussian]:
    """A mixture, and the reward on two projections whose log-evidence is ``rarity``; None: a linear one.

    Of several directions of the observation the one that leaves most modes.
    """
    g = stream(0, "frontier", dim)
    means = 2 * torch.randn(8, dim, generator=g, dtype=torch.float64) * min(1.0, (16 / dim) ** 0.25)
    factors = torch.randn(8, dim, dim, generator=g, dtype=torch.float64) / math.sqrt(2 * dim)
    law = GaussianMixture(means, factors @ factors.mT + 0.1 * torch.eye(dim, dtype=torch.float64))
    if rarity is None:  # r = 5 a·x up to a constant: an observation far away with as much noise
        return law, LinearGaussian(_unit(1, dim, g), torch.tensor([5 * 20.0**2], dtype=torch.float64), 20.0)
    a = _unit(2, dim, g)
    candidates = [_far_out(law, a, direction, rarity) for direction in _unit(DIRECTIONS, 2, g)]
    return law, max(candidates, key=lambda reward: float(torch.special.entr(law.tilt(reward).weights).sum()))


def _far_out(law: GaussianMixture, a: Tensor, direction: Tensor, rarity: float) -> LinearGaussian:
    """An observation in a direction from the middle of the means, as far as it takes to be so rare."""

    def reward(distance: float) -> LinearGaussian:
        return LinearGaussian(a, a @ law.means.to(a).mean(0) + distance * direction, NOISE)

    near, far = 0.0, 100.0
    for _ in range(60):
        between = (near + far) / 2
        near, far = (near, between) if float(law.log_evidence(reward(between))) < rarity else (between, far)
    return reward(near)


def _unit(rows: int, dim: int, g: torch.Generator) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, dim, generator=g, dtype=torch.float64), dim=1)


def _opened(name: str) -> tuple[Any, Any, float]:
    """A problem's model, its judge, and log E[e^{r − max r}] (of a linear reward log E[e^r])."""
    if name in frontier_digits.PROBLEMS:
        model, judge = frontier_digits.problem(name, SAMPLES)
        return model, judge, judge.log_evidence
    law, reward = problem(*PROBLEMS[name])
    return ExactModel(mfm.LinearPath(), law), Judge(law, reward), float(law.log_evidence(reward))


def _measured(model: Any, judge: Any, log_evidence: float) -> dict[str, Any]:
    methods: dict[str, dict[str, Any]] = {}
    for budget in BUDGETS:
        for name, how in settings(budget).items():
            cell = _cell(judge, model, how)
            methods.setdefault(name, {})[str(budget)] = cell
            say(f"  {name}, {cell['nfe']:.0f}: {cell['sw2']:.2f} × floor")
    return {"log_evidence": log_evidence, "methods": methods}


def _cell(judge: Any, model: Any, how: tuple[Any, ...]) -> dict[str, Any]:
    runs = []
    with warnings.catch_warnings(), without_pilot_pool():
        warnings.simplefilter("ignore")
        for seed in range(SEEDS):
            runs.append(mfm.steer(model, judge.reward, SAMPLES, *how, seed=seed, batch_size=ROWS))
    alone = [judge.distance([run.samples]) for run in runs]
    ratios = [one.sw2 / one.floor_sw2 for one in alone]
    return {
        "nfe": sum(run.cost["nfe"] for run in runs) / SEEDS,
        "sw2": math.sqrt(sum(ratio**2 for ratio in ratios) / SEEDS),
        "by_seed": [float(f"{ratio:.4g}") for ratio in ratios],
        "reward": sum(one.reward for one in alone) / SEEDS,
        "notes": sorted({note for run in runs for note in run.notes}),
    }
