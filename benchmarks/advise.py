"""Advice held against exact laws: does its interval hold, and is what it recommends near the best that was measured?

The problems of ``frontier`` and the judged ones of ``defaults``. Of each a hundred pilots: how many hold the true log
E[e^r] in their interval, how many say "below" alone, how wide the others are. For each budget what most of the pilots
recommend is run for as many samples as there, whose number the floor hangs on, and stands beside the best method that
``frontier.json`` or ``defaults.json`` has within that budget, where they are there; a run that finds a problem measured
already looks at these files alone.
"""

import json
import math
import statistics
import warnings
from collections import Counter
from functools import cache
from typing import Any

import torch

import metaflowmaps as mfm
from benchmarks import defaults, frontier
from benchmarks.common import RESULTS, keep, say
from benchmarks.provenance import commit_now
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.posterior import ExactModel
from metaflowmaps.random import stream
from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.steering.advise import PILOT, Advice, recommend
from metaflowmaps.steering.diagnostics import without_pilot_pool
from metaflowmaps.steering.pilot import Pilot, run_pilot

BUDGETS, PILOTS, SEEDS = (450, 2000), 100, 4
MORE = 1.02  # than a budget: methods are measured at about it


def main() -> None:
    """Benchmark: advise."""
    torch.set_num_threads(1)
    file = RESULTS / "advise.json"
    found: dict[str, Any] = json.loads(file.read_text())["problems"] if file.exists() else {}
    for name in (*(f"{dim}-D {kind}" for dim, kinds in defaults.KINDS.items() for kind in kinds), *frontier.PROBLEMS):
        if name not in found:
            say(name)
            found[name] = {**commit_now(), **measured(*problem(name), samples_of(name))}
        for budget, cell in found[name]["advised"].items():
            cell["best"] = best_measured(name, int(budget))
        keep("advise", "python -m benchmarks advise", {"problems": found})


def problem(name: str) -> tuple[GaussianMixture, LinearGaussian]:
    """A law and a reward of one of the two benchmarks."""
    if name in frontier.PROBLEMS:
        return frontier.problem(*frontier.PROBLEMS[name])
    dim, kind = int(name.split("-D ")[0]), name.split("-D ")[1]
    law = defaults.law_of("judged", dim)
    return law, defaults.REWARDS[kind](law, stream(1, "defaults", "judged", dim, kind))


def samples_of(name: str) -> int:
    """How many the other benchmark makes."""
    return frontier.SAMPLES if name in frontier.PROBLEMS else defaults.SAMPLES


def measured(
    law: GaussianMixture, reward: LinearGaussian, samples: int, pilots: int = PILOTS, seeds: int = SEEDS
) -> dict[str, Any]:
    """What pilots say of a problem, and what comes of their advice for so many samples."""
    model, exact = ExactModel(mfm.LinearPath(), law), float(law.log_evidence(reward))
    run = [run_pilot(model, reward, PILOT, None, seed) for seed in range(pilots)]
    cells = {}
    for budget in BUDGETS:
        advice = [recommend(pilot, budget, samples) for pilot in run]
        cells[str(budget)] = _advised(law, reward, advice, seeds)
    return {"log_evidence": exact, "pilots": intervals(run, exact), "advised": cells}


def intervals(pilots: list[Pilot], exact: float) -> dict[str, Any]:
    """How many hold the truth, how many are open below, how wide the others are."""
    estimates = [pilot.log_evidence for pilot in pilots]
    widths = [one.high - one.low for one in estimates if math.isfinite(one.low)]
    return {
        "pilots": len(pilots),
        "held": sum(one.low <= exact <= one.high for one in estimates),
        "below": len(estimates) - len(widths),
        "width": statistics.median(widths) if widths else None,
        "error": statistics.median(abs(one.value - exact) for one in estimates),
        "evaluations": statistics.median(pilot.evaluations for pilot in pilots),
    }


def _advised(law: GaussianMixture, reward: LinearGaussian, advice: list[Advice], seeds: int) -> dict[str, Any]:
    """What most pilots recommend, and how near it comes."""
    (most, count) = Counter(one.option.method.name for one in advice).most_common(1)[0]
    chosen = next(one for one in advice if one.option.method.name == most)
    cell = _steered(_judge(law, reward), ExactModel(mfm.LinearPath(), law), chosen, seeds)
    line = chosen.python
    say(f"  {chosen.budget}: {line}: {cell['sw2']:.2f} × floor, {cell['nfe']:.0f} NFE, {count} of {len(advice)} pilots")
    return {"method": most, "line": line, "pilots": count, "predicted_nfe": chosen.option.nfe, **cell}


@cache
def _judge(law: GaussianMixture, reward: LinearGaussian) -> frontier.Judge:
    return frontier.Judge(law, reward)


def _steered(judge: frontier.Judge, model: ExactModel, advice: Advice, seeds: int) -> dict[str, Any]:
    """The root of the mean squared SW2 in floors, and the evaluations a sample."""
    with warnings.catch_warnings(), without_pilot_pool():
        warnings.simplefilter("ignore")
        runs = [
            mfm.steer(model, judge.reward, advice.num_samples, advice.method, advice.process, seed=seed)
            for seed in range(seeds)
        ]
    alone = [judge.distance([run.samples]) for run in runs]
    return {
        "nfe": statistics.mean(run.cost["nfe"] for run in runs),
        "sw2": math.sqrt(statistics.mean((one.sw2 / one.floor_sw2) ** 2 for one in alone)),
        "mode_l1": statistics.mean(one.mode_l1 for one in alone),
    }


def best_measured(name: str, budget: int) -> dict[str, Any] | None:
    """The method of the other benchmark that is nearest to the law within a budget; None where it was not run.

    The exact method knows what no user does: it is left out.
    """
    cells = [
        cell for cell in _cells(name) if cell["nfe"] <= MORE * budget and cell["method"] not in ("exact", "`exact`")
    ]
    return min(cells, key=lambda cell: cell["sw2"], default=None)


def _cells(name: str) -> list[dict[str, Any]]:
    """Every method of the other benchmark with its cost and its SW2 in floors."""
    which, key = ("frontier", name) if name in frontier.PROBLEMS else ("defaults", f"judged: {name}")
    file = RESULTS / f"{which}.json"
    found = json.loads(file.read_text())["problems"].get(key) if file.exists() else None
    if found is None:
        return []
    if which == "defaults":
        runs = found["runs"].items()
        return [{"method": label, "nfe": run["nfe"], "sw2": run["ratio"]} for label, run in runs]
    every = ((method, cell) for method, by in found["methods"].items() for cell in by.values())
    return [{"method": method, "nfe": cell["nfe"], "sw2": cell["sw2"]} for method, cell in every]
