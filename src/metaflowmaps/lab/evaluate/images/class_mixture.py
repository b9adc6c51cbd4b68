r"""The class mixture (paper §7.1.2): r = log Σ w_i p(y_i | x) should make class y_i appear with frequency ∝ w_i.

Frequencies are those that the **judge** sees, which the reward never did. ``l2`` is their distance from w, normalised;
n exact samples have √((1 − Σ w²)/n) by chance alone. A sure classifier would give p_reward(y_i) ∝ p_1(y_i) w_i, so
``l2_tilted`` counts the data's own frequencies too (a tenth each, nearly). What an exact tilt of this model, this guide
and this judge gives is measured: ODE samples weighted by e^r.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.lab.evaluate.images.experiment import Cells, Drawn, ImageExperiment
from metaflowmaps.lab.evaluate.images.image_rewards import image_reward, scored, weights
from metaflowmaps.lab.evaluate.images.judging import BATCH
from metaflowmaps.lab.evaluate.images.setup import (
    ImageEvalConfig,
    ImageSetup,
    Say,
    cost_of,
    diversity_of,
    finite_samples,
    table_of,
)
from metaflowmaps.lab.evaluate.images.steered import calls, image_variant, run
from metaflowmaps.lab.evaluate.rows import Json, known
from metaflowmaps.metrics.image_by_image import class_distance
from metaflowmaps.random import randn, stream
from metaflowmaps.steering import ODE
from metaflowmaps.work.shards import Shard, ranges

METHODS = (
    "none",
    "rejection",
    "resampling-16",
    "mfm-g-1",
    "mfm-g-4",
    "mfm-gf-1",
    "mfm-gf-4",
    "mfm-gf-16",
    "mfm-gf-plain-4",
    "mfm-gf-plain-16",
    "mfm-gf-plain-32",
    "mfm-smc-4",
    "mfm-search-4",
    "dps",
    "tds-64",
    "tds-one-64",
)
BASE = 4096  # ODE samples that are tilted by their weights
DIVERSE = 512  # samples whose diversity is looked at
SHOWN = 20


class MixtureConfig(ImageEvalConfig):
    """Which methods, how many samples; the paper has 500 steps and 4,096 samples."""

    methods: tuple[str, ...] = Field(METHODS, min_length=1)
    samples: int = Field(2048, ge=2)
    steps: int = Field(250, ge=1)
    strength: float = Field(1.0, gt=0)
    budget: float = Field(6e6, gt=0)  # network calls of a cell: a dearer one has fewer samples, and says so

    def calls(self) -> int:
        """Evaluations of the map's network."""
        return BASE * self.steps + sum(
            calls(image_variant(name), affordable(name, self), self.steps) for name in self.methods
        )


@dataclass(frozen=True, kw_only=True)
class Frequencies:
    """Class frequencies of weighted samples, their distances, and what chance alone would give."""

    l2: float
    l2_tilted: float
    chance: float
    frequencies: list[float]


@dataclass(frozen=True, kw_only=True)
class MixtureCell(Frequencies):
    """The samples of one method; of the weighted base, its frequencies alone are known."""

    samples: int
    reward: float | None = None
    distance: float | None = None
    vendi: float | None = None
    lost: int | None = None
    cost: dict[str, float] | None = None


COLUMNS: dict[str, Callable[[MixtureCell], object]] = {
    "L2": lambda cell: cell.l2,
    "by chance": lambda cell: cell.chance,
    "L2 to tilted data": lambda cell: cell.l2_tilted,
    "reward": lambda cell: cell.reward,
    "mean distance": lambda cell: cell.distance,
    "Vendi": lambda cell: cell.vendi,
    "NFE": lambda cell: cell.cost and round(cell.cost["nfe"]),
    "ms": lambda cell: cell.cost and 1000 * cell.cost["seconds"],
    "samples": lambda cell: cell.samples,
}


@dataclass(frozen=True)
class Mixed:
    """Every method's cell, the exact tilt of the model's own samples, and the first samples of each method."""

    cells: dict[str, MixtureCell]
    weighted_base: MixtureCell
    target: Tensor
    steps: int
    samples: dict[str, Tensor]

    @cached_property
    def metrics(self) -> Json:
        """metrics.methods[name] = {l2, l2_tilted, chance, frequencies, reward, distance, vendi, samples, cost}."""
        best = min(self.cells, key=lambda name: self.cells[name].l2)
        rows = {image_variant(name).title: cell for name, cell in self.cells.items()}
        rows["ODE samples weighted by e^r"] = self.weighted_base
        return {
            "methods": {name: known(cell) for name, cell in self.cells.items()},
            "weighted_base": known(self.weighted_base),
            "target": self.target.tolist(),
            "steps": self.steps,
            "tables": {
                f"Class frequencies against w, {self.steps} steps, costs a sample": table_of("method", rows, COLUMNS)
            },
            "summary": f"A mixture of classes asked for by one reward. Nearest to it: {image_variant(best).title}, L2 "
            f"{self.cells[best].l2:.3f} ({self.cells[best].chance:.3f} by chance alone).",
        }


class ClassMixture(ImageExperiment[MixtureConfig, Mixed]):
    """Samples of every method, and ODE samples of the model itself."""

    def __init__(self, setup: ImageSetup, config: MixtureConfig, say: Say = lambda line: None) -> None:
        super().__init__(setup, config, say)
        for name in config.methods:
            image_variant(name)  # what does not exist is refused before anything runs
        self.reward: Any = image_reward(setup, "mixture", config.strength)
        self.wanted, self.tilted = targets(setup)

    def cells(self) -> Cells:
        steered = {name: partial(self._steer, name) for name in self.config.methods}
        return steered | {f"base.{part}": partial(self._base, index) for part, index in ranges(BASE, BATCH).items()}

    def judge(self, drawn: Drawn) -> Mixed:
        setup, cells, shown = self.setup, {}, {}
        for name in self.config.methods:
            made = drawn(name)
            x, lost = finite_samples(made.tensors["samples"])
            if len(x) < 2:  # the method broke: said so, and not judged
                self.say(f"{name}: {lost} samples are not finite")
                continue
            distance, vendi = diversity_of(setup.judge.features(x[:DIVERSE]))
            cells[name] = MixtureCell(
                **vars(self.frequencies(x, torch.ones(len(x)))),
                samples=len(x),
                reward=float(scored(self.reward, x).mean()),
                distance=distance,
                vendi=vendi,
                lost=lost,
                cost=made.facts["cost"],
            )
            shown[name] = x[:SHOWN].cpu()
        if not cells:
            raise InputError("no method gave finite samples: lower --set strength=, or take more --set steps=")
        # ODE samples of the model with weights e^r: its own p_1 tilted exactly, which no sampler can be asked to beat
        x = torch.cat([drawn(f"base.{part}").tensors["samples"] for part in ranges(BASE, BATCH)])
        exact = self.frequencies(x, scored(self.reward, x).softmax(0))
        base = MixtureCell(**vars(exact), samples=BASE)
        return Mixed(cells, base, self.wanted, self.config.steps, shown)

    def frequencies(self, x: Tensor, weight: Tensor) -> Frequencies:
        """Of samples (n, *event) with weights (n,)."""
        weight, wanted = weight.double() / weight.sum(), self.wanted
        found = torch.zeros_like(wanted).scatter_add(0, self.setup.judge.classes(x), weight)
        chance = math.sqrt(float((1 - wanted.square().sum()) * weight.square().sum()))
        l2, l2_tilted = class_distance(found, wanted), class_distance(found, self.tilted)
        return Frequencies(l2=l2, l2_tilted=l2_tilted, chance=chance, frequencies=found.tolist())

    def _steer(self, name: str) -> Shard:
        """Samples of one method."""
        n, g = affordable(name, self.config), stream(self.config.seed, "mixture", name)
        self.say(f"{name}, {n} samples")
        x, result = run(self.setup, image_variant(name), self.reward, n, ODE(steps=self.config.steps), g)
        return Shard({"samples": x}, {"cost": cost_of(result)})

    @torch.no_grad()
    def _base(self, index: slice) -> Shard:
        """ODE samples of the model, those of these indices."""
        model, g = self.setup.model, stream(self.config.seed, "mixture-base")
        noise = randn((BASE, *model.event_shape), g, model.dtype, model.device)[index]
        return Shard({"samples": self.setup.flow(noise, self.config.steps)}, {})


def wanted_mixture(setup: ImageSetup) -> Tensor:
    """w of the class mixture, normalised."""
    w = torch.tensor(weights(setup.train.num_classes), dtype=torch.float64)
    return w / w.sum()


def targets(setup: ImageSetup) -> tuple[Tensor, Tensor]:
    """w normalised, and w times the data's own frequencies, normalised."""
    if setup.judge.classifier is None:
        raise InputError("class-mixture needs a judging classifier to count classes: give it with --set judge=RUN")
    if setup.train.labels is None:
        raise InputError("class-mixture needs images with classes: one subfolder a class, or labels= in an .npz file")
    w = wanted_mixture(setup)
    tilted = w * torch.bincount(setup.train.labels, minlength=len(w))
    return w, tilted / tilted.sum()


def affordable(name: str, config: MixtureConfig) -> int:
    """As many samples as the budget pays for; all of them where a method takes no steps, and so next to nothing."""
    variant = image_variant(name)
    method = variant.method
    rows = method.system or 1
    if calls(variant, rows, 1) == calls(variant, rows, 2):
        return config.samples
    a_step = method.copies * (1 + max(1, method.shown_draws))
    return int(min(config.samples, max(64, config.budget // (config.steps * a_step))))
