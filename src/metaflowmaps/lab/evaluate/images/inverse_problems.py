r"""Inverse problems: y = A x + σ n of held-out images; samples of p(x | y) by steering with the log-likelihood of y.

For each problem and method, ``draws`` samples for each of ``images`` observations:

    psnr            of the samples' mean, and of single samples, to the truth (dB, on [−1, 1])
    accuracy        share of samples that the judge gives the truth's class
    residual        mean ‖y − A x‖²/(p σ²): 1 for samples that fit y as well as the truth does
    spread_ratio    the truth's distance from the mean over the samples' spread: 1 when calibrated, above: too narrow
    rank p          does the truth rank uniformly among the samples, pixel by pixel? (metrics.calibration)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import repeat_rows
from metaflowmaps.errors import unknown
from metaflowmaps.lab.evaluate.images.experiment import Cells, Drawn, ImageExperiment
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig, ImageSetup, Say, per_sample, table_of
from metaflowmaps.lab.evaluate.images.steered import CHUNK, calls, image_variant, quiet_steer
from metaflowmaps.lab.evaluate.rows import Json, known
from metaflowmaps.lab.evaluate.variants import Variant
from metaflowmaps.metrics.calibration import rank_test
from metaflowmaps.metrics.image_by_image import psnr
from metaflowmaps.random import stream
from metaflowmaps.rewards import Blur, Downsample, InverseProblem, Mask
from metaflowmaps.steering import ODE
from metaflowmaps.work.choices import options_of
from metaflowmaps.work.shards import Shard

PROBLEMS = {
    "inpaint": "inpainting, right half hidden",
    "sr2": "super-resolution × 2",
    "sr4": "super-resolution × 4",
    "deblur": "deblurring",
}
METHODS = ("resampling-100", "mfm-g-1", "mfm-g-4", "mfm-gf-4", "mfm-gf-16", "dps", "tds-64")
SHOWN_IMAGES, SHOWN_DRAWS = 6, 4


class InverseConfig(ImageEvalConfig):
    """Which problems and methods, how many images and samples."""

    problems: tuple[str, ...] = Field(tuple(PROBLEMS), min_length=1)
    methods: tuple[str, ...] = Field(METHODS, min_length=1)
    images: int = Field(64, ge=8)
    draws: int = Field(31, ge=3)
    steps: int = Field(100, ge=1)
    noise_std: float = Field(0.2, gt=0)

    def calls(self) -> int:
        """Evaluations of the map's network: a particle system has as many particles as samples at least."""
        each = 0
        for name in self.methods:
            v = for_draws(name, self.draws)
            each += calls(v, max(v.method.system or 1, self.draws) * self.images, self.steps)
        return len(self.problems) * each


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How near samples are to the truth, and to what was seen of it."""

    psnr_mean: float
    psnr: float
    residual: float
    accuracy: float | None  # None: without classes, or without a judge of them


@dataclass(frozen=True, kw_only=True)
class SolvedCell(Fit):
    """The samples of one method for one problem."""

    spread_ratio: float
    rank_p: float
    lost: int
    cost: dict[str, float]


COLUMNS: dict[str, Callable[[SolvedCell], object]] = {
    "PSNR of the mean, dB": lambda cell: cell.psnr_mean,
    "PSNR of a sample, dB": lambda cell: cell.psnr,
    "judge's accuracy": lambda cell: cell.accuracy,
    "residual": lambda cell: cell.residual,
    "spread ratio": lambda cell: cell.spread_ratio,
    "rank test p": lambda cell: cell.rank_p,
    "NFE": lambda cell: round(cell.cost["nfe"]),
    "ms": lambda cell: 1000 * cell.cost["seconds"],
}


@dataclass(frozen=True)
class Solved:
    """For each problem its cells by method, the truth, what was seen, and samples; histograms of the truth's ranks."""

    config: InverseConfig
    problems: dict[str, dict[str, SolvedCell]]
    pictures: dict[str, dict[str, Tensor]]
    histograms: dict[str, dict[str, Tensor]]

    @cached_property
    def metrics(self) -> Json:
        """metrics.problems[problem][method] = {psnr_mean, psnr, accuracy, residual, spread_ratio, rank_p, cost}."""
        config, tables = self.config, {}
        for problem, cells in self.problems.items():
            titled = {image_variant(name).title: cell for name, cell in cells.items()}
            tables[PROBLEMS[problem].capitalize()] = table_of("method", titled, COLUMNS)
        return {
            "problems": {
                problem: {name: known(cell) for name, cell in cells.items()} for problem, cells in self.problems.items()
            },
            "images": config.images,
            "draws": config.draws,
            "noise_std": config.noise_std,
            "tables": tables,
            "summary": f"{config.images} held-out images observed with noise of {config.noise_std:g}; {config.draws} "
            "samples of each posterior by every method. Residual and spread ratio are 1 for a calibrated sampler.",
        }


def operator(problem: str, event_shape: tuple[int, ...]) -> Any:
    """A of a problem, for images of this shape."""
    if problem not in PROBLEMS:
        raise unknown("problem", problem, PROBLEMS)
    if problem == "inpaint":
        mask = torch.zeros(event_shape)
        mask[..., : event_shape[-1] // 2] = 1
        return Mask(mask)
    if problem == "deblur":
        return Blur(event_shape[-1] / 8)
    return Downsample(int(problem.removeprefix("sr")))


class Inverse(ImageExperiment[InverseConfig, Solved]):
    """Samples of every method for every problem."""

    def __init__(self, setup: ImageSetup, config: InverseConfig, say: Say = lambda line: None) -> None:
        super().__init__(setup, config, say)
        for name in config.methods:
            image_variant(name)  # what does not exist is refused before anything runs
        self.truth, self.labels = setup.images(config.images, "inverse", config.seed)
        self.observed = {problem: self._observe(problem) for problem in config.problems}

    def cells(self) -> Cells:
        names = [(problem, name) for problem in self.observed for name in self.config.methods]
        return {f"{problem}.{name}": partial(self._solve, problem, name) for problem, name in names}

    def judge(self, drawn: Drawn) -> Solved:
        solved, few = Solved(self.config, {}, {}, {}), self.truth[:SHOWN_IMAGES]
        # stored images have so many levels; what lies between two of them, or beyond the ends, says nothing
        level = 2 / self.setup.train.top
        for problem, seen in self.observed.items():
            cells, histograms = solved.problems.setdefault(problem, {}), solved.histograms.setdefault(problem, {})
            pictures = solved.pictures.setdefault(problem, {"truth": few.cpu()})
            pictures["seen"] = shown(problem, seen.y[:SHOWN_IMAGES], few)
            for name in self.config.methods:
                made = drawn(f"{problem}.{name}")
                x = made.tensors["samples"]
                lost = ~x.flatten(2).isfinite().all(2)
                x = torch.where(lost[..., None, None, None], 0, x)  # grey: left out, it would flatter the method
                g = stream(self.config.seed, "ranks")
                ranks = rank_test(x.clamp(-1, 1), self.truth, generator=g, resolution=level)
                cells[name] = SolvedCell(
                    **vars(fit(self.setup, x, self.truth, self.labels, seen)),
                    spread_ratio=ranks.spread_ratio,
                    rank_p=ranks.p_value,
                    lost=int(lost.sum()),
                    cost=made.facts["cost"],
                )
                pictures[name], histograms[name] = x[:SHOWN_DRAWS, :SHOWN_IMAGES].cpu(), ranks.histogram
        return solved

    def _observe(self, problem: str) -> InverseProblem:
        config, seen_by = self.config, operator(problem, self.setup.model.event_shape)
        return InverseProblem.observe(seen_by, self.truth, config.noise_std, stream(config.seed, "noise", problem))

    def _solve(self, problem: str, name: str) -> Shard:
        self.say(f"{problem}: {name}")
        x, cost = solve(self.setup, name, self.observed[problem], self.config)
        return Shard({"samples": x}, {"cost": cost})


def solve(setup: ImageSetup, name: str, seen: InverseProblem, config: InverseConfig) -> tuple[Tensor, dict[str, float]]:
    """(draws, images, *event) samples and their cost; a particle system takes one observation at a time."""
    v, g, draws = for_draws(name, config.draws), stream(config.seed, "inverse", name), config.draws
    system = not v.method.row_by_row  # particles replace each other: one observation at a time
    # on a processor a few observations at a time: their states and draws should stay in its cache
    together = 1 if system else max(1, 2 * CHUNK // draws) if setup.model.device.type == "cpu" else len(seen.y)
    parts: list[Tensor] = []
    totals: dict[str, float] = {}
    for ys in seen.y.split(together):
        rows = ys[0] if system else repeat_rows(ys, draws)
        n = (v.method.system or draws) if system else draws * len(ys)
        problem = InverseProblem(seen.operator, rows, seen.noise_std)
        result = quiet_steer(setup.model, problem, n, v.method, v.process(ODE(steps=config.steps)), seed=g)
        parts.append(result.samples[: draws * len(ys)].reshape(draws, len(ys), *setup.model.event_shape))
        totals = {k: totals.get(k, 0.0) + c for k, c in result.cost.items()}
    return torch.cat(parts, 1), per_sample(totals, draws * config.images)


def for_draws(name: str, draws: int) -> Variant:
    """A variant whose systems, where it has some, hold as many samples as asked for: all particles, or of one pool."""
    v = image_variant(name)
    if v.method.row_by_row:
        return v
    if "returns" not in options_of(type(v.method)):
        return v.using({"particles": draws})
    return v.using({"particles": max(v.method.system or v.method.copies, draws), "returns": "all"})


@torch.no_grad()
def fit(setup: ImageSetup, x: Tensor, truth: Tensor, labels: Tensor | None, seen: InverseProblem) -> Fit:
    """Of samples (draws, images, *event)."""
    flat = x.flatten(0, 1)
    residual = (seen.operator(flat) - repeat_rows(seen.y, len(x))) / seen.noise_std
    accuracy = None
    if labels is not None and setup.judge.classifier is not None:
        accuracy = float((setup.judge.classes(flat) == labels.repeat(len(x))).double().mean())
    return Fit(
        psnr_mean=float(psnr(x.mean(0), truth).mean()),
        psnr=float(psnr(flat, repeat_rows(truth, len(x))).mean()),
        residual=float(residual.square().mean()),
        accuracy=accuracy,
    )


def shown(problem: str, y: Tensor, truth: Tensor) -> Tensor:
    """An observation as an image of the truth's size: hidden pixels grey, small images enlarged."""
    if problem == "inpaint":
        picture = torch.zeros_like(truth)
        width = truth.shape[-1] // 2
        picture[..., :width] = y.reshape(*truth.shape[:-1], width)
        return picture.cpu()
    factor = truth.shape[-1] // y.shape[-1]
    return y.repeat_interleave(factor, -1).repeat_interleave(factor, -2).cpu()
