"""The digits' story: draws for noisy digits on the left, steered digits with their costs on the right."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from metaflowmaps.lab.evaluate.images.assemble import open_setup
from metaflowmaps.lab.evaluate.images.race import Race, RaceConfig, Raced
from metaflowmaps.lab.evaluate.images.race_cells import COLUMNS, RaceCell, title
from metaflowmaps.lab.evaluate.images.setup import ImageSetup, table
from metaflowmaps.lab.evaluate.rows import Json
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.lab.figures.image_figures import Noisy, Steered, story
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
WANTED = {"margin": "“be a three”", "slant": "“lean to the right”"}
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
SHORT: dict[str, Callable[[RaceCell], object]] = {
    "λσ, γ or N": lambda cell: cell.number,
    "reward": lambda cell: cell.reward,
    "mean distance": lambda cell: cell.distance,
    "NFE": COLUMNS["NFE"],
    "ms": COLUMNS["ms"],
}


def tell_story(opened: OpenedModel, config: RaceConfig, out: Path, say: Callable[[str], None]) -> Json:
    """The metrics of the race that the story shows; its figures go into ``out``."""
    setup, _ = open_setup(opened, config)
    raced = Race(setup, config, say).run()
    _draw(noisy_images(setup, config.seed), raced, out)
    tables = {HEADLINE: raced.headlines()}
    for name, race in raced.races.items():
        rows = [[title(cell.method), *(shown(cell) for shown in SHORT.values())] for cell in race.scored]
        tables[f"Reward {name}"] = table(["method", *SHORT], rows)
    return {"rewards": raced.metrics["rewards"], "tables": tables, "summary": SUMMARY, "captions": CAPTIONS}


@torch.no_grad()
def noisy_images(setup: ImageSetup, seed: int) -> list[Noisy]:
    """One held-out image for each of the times, with draws of what it may be."""
    model, noisy = setup.model, []
    images, _ = setup.images(len(STORY_TIMES), "story", seed)
    for i, t in enumerate(STORY_TIMES):
        g = stream(seed, "story", i)
        x_t = model.path.interpolate(randn(tuple(images[i : i + 1].shape), g), images[i : i + 1], t)
        noisy.append(Noisy(images[i], x_t[0], model.draw(t, x_t, 6, generator=g)[:, 0]))
    return noisy


def _draw(noisy: list[Noisy], raced: Raced, out: Path) -> None:
    """A figure a reward."""
    for name, wanted in WANTED.items():
        race, shown = raced.races[name], []
        cells = {cell.key: cell for cell in race.scored}
        for key, label in STEERED:
            cell = cells[key.format(gamma=GAMMA[name])]
            price = price_of(cell.reward, cell.distance, cell.cost)
            shown.append(Steered(label, race.shown[cell.key][:6], price))
        picture = story(noisy, shown, f"From noisy digits to steered digits; the reward says {wanted}")
        figures.save(picture, out / f"story-{name}.png")


def price_of(reward: float, distance: float, cost: Mapping[str, float]) -> str:
    """What stands beside samples: their mean reward and distance, and what one of them cost."""
    seconds = cost["seconds"]
    took = f"{1000 * seconds:.2g} ms" if seconds < 1 else f"{seconds:.2g} s"
    return f"reward {reward:.2f}, diversity {distance:.1f}\n{cost['nfe']:,.0f} NFE, {took}"
