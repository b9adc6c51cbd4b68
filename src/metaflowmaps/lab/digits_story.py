"""The digits' story: draws for noisy digits on the left, steered digits with their costs on the right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from metaflowmaps.lab.evaluate.images.assemble import open_setup
from metaflowmaps.lab.evaluate.images.race import RaceConfig, Raced, evaluate_race, title
from metaflowmaps.lab.evaluate.images.setup import ImageSetup, Table, table
from metaflowmaps.lab.figures import image_figures
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.random import randn, stream

HEADLINE = "MFM-G with one draw against best-of-N"
STORY_TIMES = (0.1, 0.3, 0.5, 0.7)
RACE = RaceConfig(
    rewards=("margin", "slant"),
    methods=("mfm-g-rescale-1", "mfm-gf-4", "dps"),
    strengths=(8.0,),
    rescales=(0.5, 1.5),
    samples=64,
    pool=8000,
)
GAMMA = {"margin": 1.5, "slant": 0.5}  # the length of MFM-G's steering that the story shows
STEERED = (
    ("ode 1", "unsteered"),
    ("ode 1000", "best of 1,000"),
    ("dps 8", "DPS"),
    ("mfm-g-rescale-1 {gamma:g}", "MFM-G, one draw"),
    ("mfm-gf-4 8", "MFM-GF, 4 draws"),
)
CAPTIONS = {
    "story-margin.png": "Left: a digit, its noisy version, and six draws of what it may have been, one network call "
    "each. Right: digits steered to be threes, by the log-odds of a classifier.",
    "story-slant.png": "The same, steered to lean to the right, a reward measured from pixels.",
}
SUMMARY = (
    "Every row of draws comes from one noisy digit, one network call a draw. Steered digits come from noise; beside "
    "them is what one sample cost in network and reward evaluations (NFE) and in time here."
)


def tell_story(opened: OpenedModel, config: RaceConfig, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The metrics of the race that the story shows; its figures go into ``out``."""
    setup, _ = open_setup(opened, config)
    raced = evaluate_race(setup, config, say)
    races = raced.metrics["rewards"]
    _draw(_noisy_digits(setup, config.seed), raced, out)
    tables = {HEADLINE: raced.metrics["tables"][HEADLINE]}
    tables |= {f"Reward {name}": _short(race) for name, race in races.items()}
    return {"rewards": races, "tables": tables, "summary": SUMMARY, "captions": CAPTIONS}


def _noisy_digits(setup: ImageSetup, seed: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Digits, noised to the story's times, and six draws of what they may have been."""
    model, noisy = setup.model, []
    images, _ = setup.images(len(STORY_TIMES), "story", seed)
    for i, t in enumerate(STORY_TIMES):
        g = stream(seed, "story", i)
        x_t = model.path.interpolate(randn(tuple(images[i : i + 1].shape), g), images[i : i + 1], t)
        with torch.no_grad():
            noisy.append((images[i], x_t[0], model.draw(t, x_t, 6, generator=g)[:, 0]))
    return noisy


def _draw(noisy: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], raced: Raced, out: Path) -> None:
    """A figure a reward."""
    for name, wanted in (("margin", "“be a three”"), ("slant", "“lean to the right”")):
        cells = {f"{c['method']} {c.get('strength', c.get('n')):g}": c for c in raced.metrics["rewards"][name]["cells"]}
        keys = [(key.format(gamma=GAMMA[name]), label) for key, label in STEERED]
        shown = [(label, raced.samples[name][key][:6], _price(cells[key])) for key, label in keys]
        picture = image_figures.story(noisy, shown, f"From noisy digits to steered digits; the reward says {wanted}")
        figures.save(picture, out / f"story-{name}.png")


def _price(cell: dict[str, Any]) -> str:
    seconds = cell["cost"]["seconds"]
    took = f"{1000 * seconds:.2g} ms" if seconds < 1 else f"{seconds:.2g} s"
    return f"reward {cell['reward']:.2f}, diversity {cell['distance']:.1f}\n{cell['cost']['nfe']:,.0f} NFE, {took}"


def _short(race: dict[str, Any]) -> Table:
    rows = [
        [
            title(c["method"]),
            c.get("strength", c.get("n")),
            c["reward"],
            c["distance"],
            round(c["cost"]["nfe"]),
            1000 * c["cost"]["seconds"],
        ]
        for c in race["cells"]
        if "reward" in c
    ]
    return table(["method", "λσ, γ or N", "reward", "mean distance", "NFE", "ms"], rows)
