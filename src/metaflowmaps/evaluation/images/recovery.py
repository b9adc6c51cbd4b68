r"""Are one-step draws as good as GLASS with many calls? Posterior recovery from noised held-out images.

Held-out images x_1 are noised to x_t; every sampler makes one draw for each; draws of the true posterior would have the
law of the held-out images at every t. So the Fréchet distance between all draws and the held-out images (in the judge's
features) is the error, and the **floor** is what the training images themselves are apart. Whether single posteriors
are right is another question: **spread ratio** compares the truth's distance from the mean of several draws with the
spread of those draws (1: calibrated, > 1: draws too narrow).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps.evaluation.images.stage import ImageEvalConfig, Say, Stage, Timed, cost_of_parts, table
from metaflowmaps.metrics.calibration import spread_ratio
from metaflowmaps.posterior import GlassPosterior
from metaflowmaps.randomness import randn, stream
from metaflowmaps.sharding import Made, ranges


class RecoveryConfig(ImageEvalConfig):
    """What to noise, how far, and who draws."""

    samples: int = Field(2048, ge=2)
    times: tuple[float, ...] = Field((0.0, 0.1, 0.2, 0.5, 0.8), min_length=1)
    map_steps: tuple[int, ...] = (1, 2, 4)
    glass_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 30, 32)
    glass_method: str = "euler"
    draws: int = Field(16, ge=2)  # for spread, and for the picture
    images: int = Field(128, ge=2)  # whose spread is looked at

    @model_validator(mode="after")
    def _possible(self) -> "RecoveryConfig":
        if any(not 0 <= t < 1 for t in self.times):
            raise ValueError("times must lie in [0, 1): at t = 1 the posterior is a point")
        if 1 not in self.map_steps or min((*self.map_steps, *self.glass_steps)) < 1:
            raise ValueError("steps must be at least 1, and map_steps must contain 1")
        return self


class Recovered(NamedTuple):
    """Figures, and for one held-out image at each time: noisy state, draws, their mean and spread."""

    metrics: dict[str, Any]
    image: Tensor
    noisy: list[Tensor]
    draws: list[Tensor]
    spread: list[tuple[Tensor, Tensor]]


Push = Callable[[Tensor, float, Tensor], Tensor]
SPREAD = ("map-1", "map-4", "glass-30", "drift-glass-30")  # whose spread is looked at


def samplers(stage: Stage, map_steps: tuple[int, ...], glass_steps: tuple[int, ...], method: str) -> dict[str, Push]:
    """Name -> (noise, t, x_t) -> draws. glass-k: on the map's own drift; drift-glass-k: on a drift trained alone."""
    model = stage.model
    out: dict[str, Push] = {}
    for k in map_steps:
        out[f"map-{k}"] = lambda noise, t, x, k=k: model.push(noise, t, x, k)  # type: ignore[misc]
    sources = {"glass": model.drift, **({} if stage.drift is None else {"drift-glass": stage.drift})}
    for name, drift in sources.items():
        for k in glass_steps:
            glass = GlassPosterior(model.path, drift, k, method)
            out[f"{name}-{k}"] = lambda noise, t, x, glass=glass: glass.push(  # type: ignore[misc]
                noise, x.new_full((len(x),), t), x
            )
    return out


@torch.no_grad()
def evaluate_recovery(stage: Stage, config: RecoveryConfig, say: Say = lambda line: None) -> Recovered:
    """metrics.frechet[t][sampler], metrics.floor, metrics.spread_ratio[t][sampler], and pictures."""
    pushes = samplers(stage, config.map_steps, config.glass_steps, config.glass_method)
    parts = ranges(config.samples, stage.shard)
    cells: dict[str, Callable[[], Made]] = {}
    for t in config.times:
        for name, push in pushes.items():
            for part, index in parts.items():
                cells[f"{t!r}.{name}.{part}"] = _cell(stage, config, t, push, index)
            if name in SPREAD:
                cells[f"{t!r}.{name}.spread"] = _spread_cell(stage, config, t, push)
    drawn = stage.share(cells)
    x_1, _ = stage.images(config.samples, "recovery", config.seed)
    frechet: dict[str, dict[str, float]] = {}
    ratio: dict[str, dict[str, float]] = {}
    cost: dict[str, dict[str, float]] = {}
    for t in config.times:
        say(f"t = {t:g}")
        frechet[repr(t)], ratio[repr(t)] = {}, {}
        for name in pushes:
            made = [drawn(f"{t!r}.{name}.{part}") for part in parts]
            cost[name] = cost_of_parts(made, config.samples)
            frechet[repr(t)][name] = stage.frechet(torch.cat([part.tensors["draws"] for part in made]))
            if name in SPREAD:
                several = drawn(f"{t!r}.{name}.spread").tensors["draws"]
                ratio[repr(t)][name] = spread_ratio(several, x_1[: config.images])
    image, noisy, shown, spread = _pictured(stage, config)
    floor = stage.floor()
    metrics = {
        "frechet": frechet,
        "floor": floor,
        "spread_ratio": ratio,
        "cost_per_draw": cost,
        "samples": config.samples,
        "space": stage.judge.space,
        **_words(frechet, ratio, floor, cost, stage.judge.space),
    }
    return Recovered(metrics, image, noisy, shown, spread)


class _Noised(NamedTuple):
    """Held-out images at time t, noise for a draw of each, and for several draws of the first of them."""

    x_t: Tensor
    noise: Tensor
    many: Tensor


def _noised(stage: Stage, config: RecoveryConfig, t: float) -> _Noised:
    x_1, _ = stage.images(config.samples, "recovery", config.seed)
    g = stream(config.seed, "recovery", repr(t))
    x_t = stage.model.path.interpolate(randn(tuple(x_1.shape), g, device=x_1.device), x_1, t)
    noise = randn(tuple(x_1.shape), g, device=x_1.device)
    return _Noised(x_t, noise, randn((config.draws, *x_1[: config.images].shape), g, device=x_1.device))


def _cell(stage: Stage, config: RecoveryConfig, t: float, push: Push, index: slice) -> Callable[[], Made]:
    """A draw for each of these images."""

    @torch.no_grad()
    def make() -> Made:
        noised = _noised(stage, config, t)
        with Timed(stage.model) as timed:
            draws = push(noised.noise[index], t, noised.x_t[index])
        return Made({"draws": draws}, {"cost": timed.meter.cost()})

    return make


def _spread_cell(stage: Stage, config: RecoveryConfig, t: float, push: Push) -> Callable[[], Made]:
    """Several draws for each of the first images: (draws, images, *event)."""

    @torch.no_grad()
    def make() -> Made:
        x_t, _, many = _noised(stage, config, t)
        repeated = x_t[: config.images].repeat(config.draws, *([1] * (x_t.ndim - 1)))
        return Made({"draws": push(many.flatten(0, 1), t, repeated).reshape(many.shape)}, {})

    return make


def _pictured(stage: Stage, config: RecoveryConfig) -> tuple[Tensor, list[Tensor], list[Tensor], list[Any]]:
    x_1, _ = stage.images(1, "picture", config.seed)
    eps = randn(tuple(x_1.shape), stream(config.seed, "picture"), device=x_1.device)
    noisy, shown, spread = [], [], []
    for t in config.times:
        x_t = stage.model.path.interpolate(eps, x_1, t)
        draws = stage.model.draw(t, x_t, 256, generator=stream(config.seed, "picture", repr(t)))[:, 0]
        noisy.append(x_t[0].cpu())
        shown.append(draws[:8].cpu())
        spread.append((draws.mean(0).cpu(), draws.std(0).cpu()))
    return x_1[0].cpu(), noisy, shown, spread


def _words(
    frechet: dict[str, dict[str, float]], ratio: dict[str, dict[str, float]], floor: float, cost: Any, space: str
) -> dict[str, Any]:
    times = list(frechet)
    names = list(frechet[times[0]])
    rows: list[list[Any]] = [
        [_title(name), cost[name]["forwards"] or float(name.rpartition("-")[2]), *(frechet[t][name] for t in times)]
        for name in names
    ]
    rows.append(["images trained on (floor)", None, *(floor for _ in times)])
    head = ["sampler", "calls a draw", *(f"t = {float(t):g}" for t in times)]
    judged = [[_title(name), *(ratio[t][name] for t in times)] for name in ratio[times[0]]]
    best = {t: min((v for k, v in frechet[t].items() if k.endswith("glass-30")), default=None) for t in times}
    won = [t for t in times if best[t] is not None and frechet[t]["map-1"] <= best[t]]  # type: ignore[operator]
    claim = f" One map step is at least as close to the data as 30 calls of GLASS at {len(won)} of {len(times)} times."
    return {
        "tables": {
            f"Fréchet distance of draws to held-out images, in {space}": table(head, rows),
            "Spread ratio: the truth's distance over the draws' spread (1: calibrated, above: too narrow)": table(
                ["sampler", *head[2:]], judged
            ),
        },
        "summary": "Held-out images noised to t and drawn again." + claim * any(v is not None for v in best.values()),
    }


def _title(name: str) -> str:
    kind, _, steps = name.rpartition("-")
    return {"map": "map", "glass": "GLASS", "drift-glass": "GLASS on the drift alone"}[kind] + f", {steps} steps"
