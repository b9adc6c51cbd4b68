"""Digits at twenty evaluations a sample: MFM-Anneal against best of 1,000 one-step samples, which costs 2,000.

Best-of-N knows no strength and aims at no law, so the annealed cloud is shown at several, in units of the reward's own
deviation on one-step samples: the same on every reward. What counts is the reward at a diversity, mean distance between
samples.
"""

import warnings
from typing import Any

import torch

from benchmarks import benchmark_figures
from benchmarks.common import RESULTS, keep, say
from metaflowmaps.lab.evaluate.images.assemble import open_setup
from metaflowmaps.lab.evaluate.images.image_rewards import image_reward
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.metrics import mean_pairwise_distance
from metaflowmaps.random import stream
from metaflowmaps.rewards import Tempered
from metaflowmaps.steering import ODE, Anneal, BestOfN, Preset, steer

REWARDS = ("margin:7", "margin:2", "slant")
SAMPLES, SEEDS = 512, 2
ANNEAL = Preset(Anneal(num_draws=1, n=1, pool=1), ODE(steps=9))
STRENGTHS = (2, 4, 8, 16, 32, 64)  # per standard deviation of the reward
BEST_OF = {n: 64 if n == 1000 else SAMPLES for n in (1, 10, 100, 1000)}  # of how many: samples that are made


def main() -> None:
    """Benchmark: few-evaluations."""
    torch.set_num_threads(1)
    opened = OpenedModel.open("digits", "cpu")
    setup, _ = open_setup(opened, ImageEvalConfig(judge="none", drift="none"))
    found = {name: _measured(setup, image_reward(setup, name)) for name in REWARDS}
    keep("few-evaluations", "python -m benchmarks few-evaluations", {"rewards": found})
    figures.save(benchmark_figures.few_evaluations(found), RESULTS / "few-evaluations.png")


def _measured(setup: Any, reward: Any) -> dict[str, Any]:
    best = {
        f"best of {n:,}": _cell(setup, reward, Preset(BestOfN(n, source="map"), ODE()), BEST_OF[n]) for n in BEST_OF
    }
    deviation = float(reward(setup.model.generate(1024, generator=stream(0, "few evaluations"))).std())
    annealed = {
        f"{strength}": _cell(setup, Tempered(reward, strength / deviation), ANNEAL, SAMPLES, strength / deviation)
        for strength in STRENGTHS
    }
    return {"best of": best, "annealed": annealed, "deviation": deviation}


def _cell(setup: Any, reward: Any, how: Preset, samples: int, strength: float = 1.0) -> dict[str, float]:
    runs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for seed in range(SEEDS):
            runs.append(steer(setup.model, reward, samples, *how, seed=seed, batch_size=4 * SAMPLES))
    cell = {
        "reward": sum(float(run.rewards.mean()) for run in runs) / SEEDS / strength,
        "distance": sum(float(mean_pairwise_distance(run.samples)) for run in runs) / SEEDS,
        "nfe": runs[0].cost["nfe"],
    }
    say(f"  {how[0].name} {strength:g}: {cell['reward']:.2f} at {cell['distance']:.2f}, {cell['nfe']:.0f} NFE")
    return cell
