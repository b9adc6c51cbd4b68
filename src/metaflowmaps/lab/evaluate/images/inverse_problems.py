r"""Inverse problems: y = A x + σ n of held-out images; samples of p(x | y) by steering with the log-likelihood of y.

For each problem and method, ``draws`` samples for each of ``images`` observations:

    psnr            of the samples' mean, and of single samples, to the truth (dB, on [−1, 1])
    accuracy        share of samples that the judge gives the truth's class
    residual        mean ‖y − A x‖²/(p σ²): 1 for samples that fit y as well as the truth does
    spread_ratio    the truth's distance from the mean over the samples' spread: 1 when calibrated, above: too narrow
    rank p          does the truth rank uniformly among the samples, pixel by pixel? (metrics.calibration)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import repeat_rows
from metaflowmaps.errors import unknown
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig, ImageSetup, Say, per_sample, table
from metaflowmaps.lab.evaluate.images.steered import CHUNK, calls, image_variant, quiet_steer
from metaflowmaps.lab.evaluate.variants import Variant
from metaflowmaps.metrics.calibration import rank_test
from metaflowmaps.metrics.image_by_image import psnr
from metaflowmaps.random import stream
from metaflowmaps.rewards import Blur, Downsample, InverseProblem, Mask
from metaflowmaps.steering import ODE
from metaflowmaps.work.shards import Shard

PROBLEMS = {
    "inpaint": "inpainting, right half hidden",
    "sr2": "super-resolution × 2",
    "sr4": "super-resolution × 4",
    "deblur": "deblurring",
}
METHODS = ("mfm-g-1", "mfm-g-4", "mfm-gf-4", "mfm-gf-16", "dps", "tds-64")


class InverseConfig(ImageEvalConfig):
    """Which problems and methods, how many images and samples."""

    problems: tuple[str, ...] = Field(tuple(PROBLEMS), min_length=1)
    methods: tuple[str, ...] = Field(METHODS, min_length=1)
    images: int = Field(64, ge=8)
    draws: int = Field(31, ge=3)
    steps: int = Field(100, ge=1)
    noise_std: float = Field(0.2, gt=0)

    def calls(self) -> int:
        """Evaluations of the map's network."""
        return len(self.problems) * sum(map(self._calls, self.methods))

    def _calls(self, name: str) -> int:
        """For all samples of one problem: a particle system has as many particles as samples at least."""
        v = _for_draws(name, self.draws)
        return calls(v, max(v.method.system or 1, self.draws) * self.images, self.steps)


class Solved(NamedTuple):
    """Figures; and for each problem the truth, what was seen, and samples of each method for the first images."""

    metrics: dict[str, Any]
    pictures: dict[str, dict[str, Tensor]]
    histograms: dict[str, dict[str, Tensor]]


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


def evaluate_inverse(setup: ImageSetup, config: InverseConfig, say: Say = lambda line: None) -> Solved:
    """metrics.problems[problem][method] = {psnr_mean, psnr, accuracy, residual, spread_ratio, rank_p, cost}."""
    for name in config.methods:
        image_variant(name)
    truth, labels = setup.images(config.images, "inverse", config.seed)
    results: dict[str, Any] = {}
    pictures: dict[str, dict[str, Tensor]] = {}
    histograms: dict[str, dict[str, Tensor]] = {}
    observed = {
        problem: InverseProblem.observe(
            operator(problem, setup.model.event_shape), truth, config.noise_std, stream(config.seed, "noise", problem)
        )
        for problem in config.problems
    }
    drawn = setup.share(
        {
            f"{problem}.{name}": _solved(setup, problem, name, seen, config, say)
            for problem, seen in observed.items()
            for name in config.methods
        }
    )
    for problem, seen in observed.items():
        results[problem], histograms[problem] = {}, {}
        pictures[problem] = {"truth": truth[:6].cpu(), "seen": _shown(problem, seen.y[:6], truth[:6])}
        for name in config.methods:
            solved = drawn(f"{problem}.{name}")
            x, cost = solved.tensors["samples"], solved.facts["cost"]
            lost = ~x.flatten(2).isfinite().all(2)
            x = torch.where(lost[..., None, None, None], 0, x)  # grey: left out, it would flatter the method
            # stored images have so many levels; what lies between two of them, or beyond the ends, says nothing
            judged = rank_test(
                x.clamp(-1, 1), truth, generator=stream(config.seed, "ranks"), resolution=2 / setup.train.top
            )
            results[problem][name] = {
                **_judge(setup, x, truth, labels, seen),
                "spread_ratio": judged.spread_ratio,
                "rank_p": judged.p_value,
                "lost": int(lost.sum()),
                "cost": cost,
            }
            pictures[problem][name] = x[:4, :6].cpu()
            histograms[problem][name] = judged.histogram
    metrics = {"problems": results, "images": config.images, "draws": config.draws, "noise_std": config.noise_std}
    return Solved({**metrics, **_words(results, config)}, pictures, histograms)


def _solved(
    setup: ImageSetup, problem: str, name: str, seen: InverseProblem, config: InverseConfig, say: Say
) -> Callable[[], Shard]:
    def make() -> Shard:
        say(f"{problem}: {name}")
        x, cost = _solve(setup, name, seen, config)
        return Shard({"samples": x}, {"cost": cost})

    return make


def _solve(
    setup: ImageSetup, name: str, seen: InverseProblem, config: InverseConfig
) -> tuple[Tensor, dict[str, float]]:
    """(draws, images, *event) samples and their cost; a particle system takes one observation at a time."""
    v, g, draws = _for_draws(name, config.draws), stream(config.seed, "inverse", name), config.draws
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


def _for_draws(name: str, draws: int) -> Variant:
    """A variant whose particle systems, where it has some, are returned whole and hold as many samples as asked for."""
    v = image_variant(name)
    return (
        v
        if v.method.row_by_row
        else v.using({"particles": max(v.method.system or v.method.copies, draws), "returns": "all"})
    )


@torch.no_grad()
def _judge(
    setup: ImageSetup, x: Tensor, truth: Tensor, labels: Tensor | None, seen: InverseProblem
) -> dict[str, float]:
    flat = x.flatten(0, 1)
    repeated = repeat_rows(truth, len(x))
    residual = (seen.operator(flat) - repeat_rows(seen.y, len(x))) / seen.noise_std
    cell = {
        "psnr_mean": float(psnr(x.mean(0), truth).mean()),
        "psnr": float(psnr(flat, repeated).mean()),
        "residual": float(residual.square().mean()),
    }
    if labels is not None and setup.judge.classifier is not None:
        cell["accuracy"] = float((setup.judge.classes(flat) == labels.repeat(len(x))).double().mean())
    return cell


def _shown(problem: str, y: Tensor, truth: Tensor) -> Tensor:
    """An observation as an image of the truth's size: hidden pixels grey, small images enlarged."""
    if problem == "inpaint":
        picture = torch.zeros_like(truth)
        width = truth.shape[-1] // 2
        picture[..., :width] = y.reshape(*truth.shape[:-1], width)
        return picture.cpu()
    factor = truth.shape[-1] // y.shape[-1]
    return y.repeat_interleave(factor, -1).repeat_interleave(factor, -2).cpu()


def _words(results: dict[str, Any], config: InverseConfig) -> dict[str, Any]:
    head = [
        "method",
        "PSNR of the mean, dB",
        "PSNR of a sample, dB",
        "judge's accuracy",
        "residual",
        "spread ratio",
        "rank test p",
        "NFE",
        "ms",
    ]
    tables = {}
    for problem, cells in results.items():
        rows = [
            [
                image_variant(name).title,
                c["psnr_mean"],
                c["psnr"],
                c.get("accuracy"),
                c["residual"],
                c["spread_ratio"],
                c["rank_p"],
                round(c["cost"]["nfe"]),
                1000 * c["cost"]["seconds"],
            ]
            for name, c in cells.items()
        ]
        tables[PROBLEMS[problem].capitalize()] = table(head, rows)
    return {
        "tables": tables,
        "summary": f"{config.images} held-out images observed with noise of {config.noise_std:g}; {config.draws} "
        "samples of each posterior by every method. Residual and spread ratio are 1 for a calibrated sampler.",
    }
