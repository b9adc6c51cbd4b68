"""Digits at one setting: README's preset, with one length of the steering term, on twelve rewards, none tuned to.

The race (``mfm eval steering digits --task race``) shows for each reward the length γ that does best on it, a choice
made afterwards. Here γ is 1 everywhere, beside best-of-N on one-step samples at the same cost and at eight times it.
"""

import warnings
from typing import Any

import torch

from benchmarks.common import keep, say
from metaflowmaps.lab.evaluate.images.assemble import open_setup
from metaflowmaps.lab.evaluate.images.image_rewards import image_reward
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.metrics import mean_pairwise_distance
from metaflowmaps.random import stream
from metaflowmaps.steering import IMAGES, MFMGF, ODE, BestOfN, Preset, Unsteered, steer

REWARDS = (*(f"margin:{digit}" for digit in range(10)), "slant", "half")
METHODS = {
    "MFM-G, 1 draw, γ = 1": IMAGES,
    "MFM-GF, 4 draws": Preset(MFMGF(num_draws=4), ODE(steps=50)),
    "best of 125 in one step": Preset(BestOfN(125, source="map"), ODE()),
    "best of 1,000 in one step": Preset(BestOfN(1000, source="map"), ODE()),
    "unsteered": Preset(Unsteered(), ODE(steps=50)),
}
SAMPLES = 48


def main() -> None:
    """Benchmark: digits-one-setting."""
    torch.set_num_threads(1)
    opened = OpenedModel.open("digits", "cpu")
    setup, _ = open_setup(opened, ImageEvalConfig(judge="none", drift="none"))
    found: dict[str, dict[str, Any]] = {}
    for reward in REWARDS:
        found[reward] = {title: _cell(setup, reward, preset) for title, preset in METHODS.items()}
        say(f"{reward}: " + ", ".join(f"{title} {cell['reward']:.2f}" for title, cell in found[reward].items()))
    keep("digits-one-setting", "python -m benchmarks digits-one-setting", {"samples": SAMPLES, "rewards": found})


def _cell(setup: Any, reward: str, preset: Preset) -> dict[str, float]:
    method, process = preset
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        seed = stream(0, "one setting", reward)
        result = steer(setup.model, image_reward(setup, reward), SAMPLES, method, process, seed=seed)
    return {
        "reward": float(result.rewards.mean()),
        "error": float(result.rewards.std()) / SAMPLES**0.5,
        "distance": float(mean_pairwise_distance(result.samples)),
        "nfe": result.cost["nfe"],
    }
