"""The digits' story: what noisy digits may be, and steered digits with their costs; to be turned in the report, and one
picture a reward to be shared.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from metaflowmaps.lab.evaluate.images.assemble import open_setup
from metaflowmaps.lab.evaluate.images.race import Race, RaceConfig
from metaflowmaps.lab.evaluate.images.race_cells import COLUMNS, POOLS, RaceCell, RewardResult, ShownSamples, title
from metaflowmaps.lab.evaluate.images.setup import ImageSetup, table
from metaflowmaps.lab.evaluate.images.steered import image_variant
from metaflowmaps.lab.evaluate.rows import Json
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.lab.figures.image_figures import Noisy, SteeredRow, story
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.lab.story import NOISY, Steered, SteeredBy, Story, keep_story, noised_and_drawn
from metaflowmaps.random import randn, stream
from metaflowmaps.steering import BestOfN

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
    ("map-1 1000", "best of 1,000, a call each"),
    ("dps 8", "DPS"),
    ("mfm-g-rescale-1 {gamma:g}", "MFM-G, one draw"),
    ("mfm-gf-4 8", "MFM-GF, 4 draws"),
)
SHOWN_FIRST = 4  # of STEERED: MFM-G
NOISED = "Left, a noisy digit; right, eight digits that it may have been, one network call each."
STEERED_BY = {
    "margin": "Digits from noise, steered to be threes; the reward is a classifier's log-odds of a three.",
    "slant": "Digits from noise, steered to lean to the right; the reward is the shear of the strokes, columns a row.",
}
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
    shown = {name: [_shown_cell(race, name, key) for key, _ in STEERED] for name, race in raced.races.items()}
    _draw(noisy_images(setup, config.seed), shown, out)
    tables = {HEADLINE: raced.headlines()}
    for name, race in raced.races.items():
        rows = [[title(cell.method), *(column(cell) for column in SHORT.values())] for cell in race.scored]
        tables[f"Reward {name}"] = table(["method", *SHORT], rows)
    return {
        "rewards": raced.metrics["rewards"],
        "tables": tables,
        "summary": SUMMARY,
        "captions": CAPTIONS,
        "story": _turned(setup, shown, config.seed, out),
    }


ShownCell = tuple[RaceCell, ShownSamples]


def _shown_cell(race: RewardResult, name: str, key: str) -> ShownCell:
    """A cell of the race, with its first samples."""
    key = key.format(gamma=GAMMA[name])
    return next(cell for cell in race.scored if cell.key == key), race.shown[key]


def _turned(setup: ImageSetup, shown: Mapping[str, list[ShownCell]], seed: int, out: Path) -> Json:
    """The story that the report lets a reader turn."""
    posterior, pictures = noised_and_drawn(setup.model, setup.images(NOISY, "turned", seed)[0], seed, NOISED)
    steered: list[Steered] = []
    for i, (name, cells) in enumerate(shown.items()):
        for j, (_, samples) in enumerate(cells):
            pictures[f"steered.{i}.{j}"] = samples.pictures
        methods = tuple(_told(label, *cell) for (_, label), cell in zip(STEERED, cells, strict=True))
        steered.append(Steered(wanted=WANTED[name], sentence=STEERED_BY[name], methods=methods, first=SHOWN_FIRST))
    return keep_story(Story(posterior=posterior, steered=tuple(steered)), pictures, out)


def _told(label: str, cell: RaceCell, samples: ShownSamples) -> SteeredBy:
    return SteeredBy(
        title=label,
        method=BestOfN.name if cell.method in POOLS else image_variant(cell.method).method.name,
        rewards=tuple(samples.rewards.tolist()),
        seeds=() if samples.seeds is None else tuple(samples.seeds.tolist()),
        reward=cell.reward,
        diversity=cell.distance,
        evaluations=cell.cost["nfe"],
        seconds=cell.cost["seconds"],
    )


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


def _draw(noisy: list[Noisy], shown: Mapping[str, list[ShownCell]], out: Path) -> None:
    """A figure a reward."""
    for name, cells in shown.items():
        rows = [
            SteeredRow(label, samples.pictures[:6], price_of(cell.reward, cell.distance, cell.cost))
            for (_, label), (cell, samples) in zip(STEERED, cells, strict=True)
        ]
        picture = story(noisy, rows, f"From noisy digits to steered digits; the reward says {WANTED[name]}")
        figures.save(picture, out / f"story-{name}.png")


def price_of(reward: float, distance: float, cost: Mapping[str, float]) -> str:
    """What stands beside samples: their mean reward and distance, and what one of them cost."""
    seconds = cost["seconds"]
    took = f"{1000 * seconds:.{0 if seconds > 0.1 else 1}f} ms" if seconds < 1 else f"{seconds:.2g} s"
    return f"reward {reward:.2f}, diversity {distance:.1f}\n{cost['nfe']:,.0f} NFE, {took}"
