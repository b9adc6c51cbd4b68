r"""The class mixture (paper §7.1.2): r = log Σ w_i p(y_i | x) should make class y_i appear with frequency ∝ w_i.

Frequencies are those that the **judge** sees, which the reward never did. ``l2`` is their distance from w, normalised;
n exact samples have √((1 − Σ w²)/n) by chance alone. A sure classifier would give p_reward(y_i) ∝ p_1(y_i) w_i, so
``l2_tilted`` counts the data's own frequencies too (a tenth each, nearly). What an exact tilt of this model, this guide
and this judge gives is measured: ODE samples weighted by e^r.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.lab.evaluate.images.image_rewards import image_reward, scored, weights
from metaflowmaps.lab.evaluate.images.judging import BATCH
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig, ImageSetup, Say, cost_of, table
from metaflowmaps.lab.evaluate.images.steered import calls, image_variant, run
from metaflowmaps.metrics.image_by_image import class_distance
from metaflowmaps.random import randn, stream
from metaflowmaps.sampling import integrate, uniform_grid
from metaflowmaps.steering import ODE
from metaflowmaps.work.shards import Shard, ranges

METHODS = (
    "none",
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
            calls(image_variant(name), _affordable(name, self), self.steps) for name in self.methods
        )


class Mixed(NamedTuple):
    """Figures and the first samples of each method."""

    metrics: dict[str, Any]
    samples: dict[str, Tensor]


def evaluate_mixture(setup: ImageSetup, config: MixtureConfig, say: Say = lambda line: None) -> Mixed:
    """metrics.methods[name] = {l2, l2_tilted, chance, frequencies, reward, distance, vendi, samples, cost}."""
    for name in config.methods:
        image_variant(name)  # what does not exist is refused before anything runs
    reward, (wanted, tilted) = image_reward(setup, "mixture", config.strength), _targets(setup)
    cells: dict[str, Any] = {}
    shown: dict[str, Tensor] = {}
    base = ranges(BASE, BATCH)
    drawn = setup.share(
        {name: _steered(setup, name, reward, config, say) for name in config.methods}
        | {f"base.{part}": _base(setup, config, index) for part, index in base.items()}
    )
    for name in config.methods:
        made = drawn(name)
        x = made.tensors["samples"]
        finite = x.flatten(1).isfinite().all(1)
        lost, x = int((~finite).sum()), x[finite]
        if len(x) < 2:  # the method broke: said so, and not judged
            say(f"{name}: {lost} samples are not finite")
            continue
        cells[name] = {
            **_judged(setup, x, torch.ones(len(x)), wanted, tilted),
            "reward": float(scored(reward, x).mean()),
            **setup.diversity(x[:512]),
            "samples": len(x),
            "lost": lost,
            "cost": made.facts["cost"],
        }
        shown[name] = x[:20].cpu()
    if not cells:
        raise InputError("no method gave finite samples: lower --set strength=, or take more --set steps=")
    # ODE samples of the model with weights e^r: its own p_1 tilted exactly, which no sampler can be asked to beat
    x = torch.cat([drawn(f"base.{part}").tensors["samples"] for part in base])
    exact = {**_judged(setup, x, scored(reward, x).softmax(0), wanted, tilted), "samples": BASE}
    metrics = {"methods": cells, "weighted_base": exact, "target": wanted.tolist(), "steps": config.steps}
    return Mixed({**metrics, **_words(cells, exact, config)}, shown)


def _judged(setup: ImageSetup, x: Tensor, weight: Tensor, wanted: Tensor, tilted: Tensor) -> dict[str, Any]:
    """Class frequencies of weighted samples, their distances, and what chance alone would give."""
    weight = weight.double() / weight.sum()
    found = torch.zeros_like(wanted).scatter_add(0, setup.judge.classes(x), weight)
    return {
        "l2": class_distance(found, wanted),
        "l2_tilted": class_distance(found, tilted),
        "chance": math.sqrt(float((1 - wanted.square().sum()) * weight.square().sum())),
        "frequencies": found.tolist(),
    }


def _steered(setup: ImageSetup, name: str, reward: Any, config: MixtureConfig, say: Say) -> Callable[[], Shard]:
    """Samples of one method."""

    def make() -> Shard:
        n = _affordable(name, config)
        say(f"{name}, {n} samples")
        x, result = run(
            setup, image_variant(name), reward, n, ODE(steps=config.steps), stream(config.seed, "mixture", name)
        )
        return Shard({"samples": x}, {"cost": cost_of(result)})

    return make


def _base(setup: ImageSetup, config: MixtureConfig, index: slice) -> Callable[[], Shard]:
    """ODE samples of the model, those of these indices."""
    model = setup.model

    @torch.no_grad()
    def make() -> Shard:
        noise = randn((BASE, *model.event_shape), stream(config.seed, "mixture-base"), model.dtype, model.device)
        return Shard({"samples": integrate(model.drift, noise[index], uniform_grid(config.steps))}, {})

    return make


def wanted_mixture(setup: ImageSetup) -> Tensor:
    """w of the class mixture, normalised."""
    w = torch.tensor(weights(setup.train.num_classes), dtype=torch.float64)
    return w / w.sum()


def _targets(setup: ImageSetup) -> tuple[Tensor, Tensor]:
    """w normalised, and w times the data's own frequencies, normalised."""
    if setup.judge.classifier is None:
        raise InputError("class-mixture needs a judging classifier to count classes: give it with --set judge=RUN")
    if setup.train.labels is None:
        raise InputError("class-mixture needs images with classes: one subfolder a class, or labels= in an .npz file")
    w = wanted_mixture(setup)
    tilted = w * torch.bincount(setup.train.labels, minlength=len(w))
    return w, tilted / tilted.sum()


def _affordable(name: str, config: MixtureConfig) -> int:
    method = image_variant(name).method
    a_step = method.copies * (1 + max(1, method.shown_draws))
    return int(min(config.samples, max(64, config.budget // (config.steps * a_step))))


def _words(cells: dict[str, Any], exact: dict[str, Any], config: MixtureConfig) -> dict[str, Any]:
    head = [
        "method",
        "L2",
        "by chance",
        "L2 to tilted data",
        "reward",
        "mean distance",
        "Vendi",
        "NFE",
        "ms",
        "samples",
    ]
    rows = [
        [
            image_variant(name).title,
            c["l2"],
            c["chance"],
            c["l2_tilted"],
            c["reward"],
            c["distance"],
            c["vendi"],
            round(c["cost"]["nfe"]),
            1000 * c["cost"]["seconds"],
            c["samples"],
        ]
        for name, c in cells.items()
    ]
    rows.append(
        ["ODE samples weighted by e^r", exact["l2"], exact["chance"], exact["l2_tilted"], *[None] * 5, exact["samples"]]
    )
    best = min(cells, key=lambda name: cells[name]["l2"])
    return {
        "tables": {f"Class frequencies against w, {config.steps} steps, costs a sample": table(head, rows)},
        "summary": f"A mixture of classes asked for by one reward. Nearest to it: {image_variant(best).title}, L2 "
        f"{cells[best]['l2']:.3f} ({cells[best]['chance']:.3f} by chance alone).",
    }
