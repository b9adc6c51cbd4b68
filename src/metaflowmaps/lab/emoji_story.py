"""The emoji's story: draws for noisy emoji on the left; on the right emoji steered to a colour, to a category, to both.

Every method makes a few samples: enough to be looked at, and for what one costs. A race over strengths and hundreds of
samples is ``mfm eval steering emoji --task race``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pydantic import Field
from torch import Tensor

from metaflowmaps.lab.digits_story import noisy_images, price_of
from metaflowmaps.lab.evaluate.images.assemble import open_setup
from metaflowmaps.lab.evaluate.images.image_rewards import image_reward, scored
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig, ImageSetup, TableRows, cost_of, table
from metaflowmaps.lab.evaluate.images.steered import quiet_steer
from metaflowmaps.lab.evaluate.rows import Json
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.lab.figures.image_figures import SteeredRow, story
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.lab.story import NOISY, Steered, SteeredBy, Story, keep_story, noised_and_drawn
from metaflowmaps.metrics.diversity import mean_pairwise_distance
from metaflowmaps.random import stream
from metaflowmaps.rewards import Tempered
from metaflowmaps.steering import DPS, MFMG, MFMGF, ODE, BestOfN, Method, Process, Unsteered

SHOWN = 6


class EmojiStoryConfig(ImageEvalConfig):
    """How many samples a method makes, in how many steps."""

    samples: int = Field(12, ge=2)
    steps: int = Field(24, ge=1)
    best_of: int = Field(64, ge=2)
    strength: float = Field(8.0, gt=0)  # λσ, of methods that follow the theory
    rescale: float = Field(0.4, gt=0)  # γ, of MFM-G


class Chapter(NamedTuple):
    """A reward of the story: its file's name, what it says, and its text."""

    name: str
    wanted: str
    reward: str


class Told(NamedTuple):
    """Samples of a method with what they reached and what one cost."""

    label: str
    method: str
    samples: Tensor
    rewards: Tensor
    seeds: Tensor
    reward: float
    distance: float
    cost: dict[str, float]

    def as_row(self) -> SteeredBy:
        """As the report shows it."""
        return SteeredBy(
            title=self.label,
            method=self.method,
            rewards=tuple(self.rewards.tolist()),
            seeds=tuple(self.seeds.tolist()),
            reward=self.reward,
            diversity=self.distance,
            evaluations=self.cost["nfe"],
            seconds=self.cost["seconds"],
        )


CHAPTERS = (
    Chapter("colour", "“be blue”", "colour:blue"),
    Chapter("category", "“be a flag”", "margin:flags"),
    Chapter("both", "“be a blue flag”", "colour:blue+margin:flags"),
)
NOISED = "Left, a noisy emoji; right, eight emoji that it may have been, one network call each."
STEERED = "Emoji from noise, steered; the reward is in units of its spread over emoji that were held out."
SHOWN_FIRST = 3  # of the methods: MFM-G
SUMMARY = (
    "Every row of draws comes from one noisy emoji, one network call a draw. Steered emoji come from noise; beside "
    "them is what one sample cost in network and reward evaluations (NFE) and in time here. Best of N asks the map "
    "alone, one call a sample. Emoji of the figures are the first of each method, not chosen."
)


def tell_emoji_story(opened: OpenedModel, config: EmojiStoryConfig, out: Path, say: Callable[[str], None]) -> Json:
    """The metrics of the story; its figures go into ``out``."""
    setup, _ = open_setup(opened, config)
    noisy, tables, captions, rewards, chapters = noisy_images(setup, config.seed), {}, {}, {}, []
    for chapter in CHAPTERS:
        told = _chapter(setup, config, chapter, say)
        file = f"story-{chapter.name}.png"
        steered = [SteeredRow(t.label, t.samples[:SHOWN].cpu(), price_of(t.reward, t.distance, t.cost)) for t in told]
        picture = story(noisy, steered, f"From noisy emoji to steered emoji; the reward says {chapter.wanted}")
        figures.save(picture, out / file)
        tables[f"The reward says {chapter.wanted}: {chapter.reward}"] = _table(told)
        captions[file] = (
            "Left: an emoji that was held out, its noisy version, and six draws of what it may have been, one network "
            f"call each. Right: emoji steered by a reward that says {chapter.wanted}."
        )
        chapters.append(told)
        rewards[chapter.reward] = {t.label: {"reward": t.reward, "distance": t.distance, **t.cost} for t in told}
    turned = _turned(setup, chapters, config.seed, out)
    return {"rewards": rewards, "tables": tables, "summary": SUMMARY, "captions": captions, "story": turned}


def _turned(setup: ImageSetup, chapters: list[list[Told]], seed: int, out: Path) -> Json:
    """The story that the report lets a reader turn."""
    posterior, pictures = noised_and_drawn(setup.model, setup.images(NOISY, "turned", seed)[0], seed, NOISED)
    steered = []
    for i, (chapter, told) in enumerate(zip(CHAPTERS, chapters, strict=True)):
        pictures |= {f"steered.{i}.{j}": one.samples for j, one in enumerate(told)}
        methods = tuple(one.as_row() for one in told)
        steered.append(Steered(wanted=chapter.wanted, sentence=STEERED, methods=methods, first=SHOWN_FIRST))
    return keep_story(Story(posterior=posterior, steered=tuple(steered)), pictures, out)


def _chapter(setup: ImageSetup, config: EmojiStoryConfig, chapter: Chapter, say: Callable[[str], None]) -> list[Told]:
    """Every method on one reward, measured in its spread over the held-out images."""
    reward = image_reward(setup, chapter.reward)
    spread = float(scored(reward, setup.unseen).std())
    told = []
    for label, method, process in _methods(config):
        say(f"{chapter.wanted}: {label}")
        g = stream(config.seed, "emoji-story", chapter.name, label)
        wanted = Tempered(reward, config.strength / spread)
        result = quiet_steer(setup.model, wanted, config.samples, method, process, seed=g)
        x = result.samples
        rewards, apart = scored(reward, x) / spread, mean_pairwise_distance(setup.judge.features(x))
        reached = float(rewards.mean())
        told.append(Told(label, method.name, x, rewards, result.seeds, reached, apart, cost_of(result)))
    return told


def _methods(config: EmojiStoryConfig) -> list[tuple[str, Method, Process]]:
    """Whom the story compares: the base, the two rivals, and both of ours."""
    plain = ODE(steps=config.steps)
    rescaled = ODE(steps=config.steps, renormalize="rescale", renormalize_to=config.rescale)
    return [
        ("unsteered", Unsteered(), plain),
        (f"best of {config.best_of}", BestOfN(n=config.best_of, source="map"), plain),
        ("DPS", DPS(), plain),
        ("MFM-G, one draw", MFMG(num_draws=1), rescaled),
        ("MFM-GF, 4 draws", MFMGF(num_draws=4), plain),
    ]


def _table(told: list[Told]) -> TableRows:
    head = ["method", "reward, spreads", "mean distance", "NFE", "ms"]
    return table(head, ([t.label, t.reward, t.distance, round(t.cost["nfe"]), 1000 * t.cost["seconds"]] for t in told))
