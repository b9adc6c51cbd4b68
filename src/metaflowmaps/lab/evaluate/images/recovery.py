r"""Are one-step draws as good as GLASS with many calls? Posterior recovery from noised held-out images.

Held-out images x_1 are noised to x_t; every sampler makes one draw for each; draws of the true posterior would have the
law of the held-out images at every t. So the Fréchet distance between all draws and the held-out images (in the judge's
features) is the error, and the **floor** is what the training images themselves are apart. Whether single posteriors
are right is another question: **spread ratio** compares the truth's distance from the mean of several draws with the
spread of those draws (1: calibrated, > 1: draws too narrow).

Of a map of latents, latents are noised and drawn, and their pictures compared: against a statistics file in Inception's
features that is posterior FID. A map that knows classes is told the image's own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps._shapes import Cond, repeat_cond, repeat_rows, select_cond
from metaflowmaps.lab.evaluate.images.setup import (
    LATENT_BATCH,
    ImageEvalConfig,
    ImageSetup,
    Say,
    Timed,
    cost_of_parts,
    table,
)
from metaflowmaps.metrics.calibration import spread_ratio
from metaflowmaps.posterior import GlassPosterior
from metaflowmaps.random import RowNoise, fresh_seeds, randn, stream
from metaflowmaps.sampling import INTEGRATORS
from metaflowmaps.work.shards import Shard, ranges


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

    def calls(self) -> int:
        """Evaluations of the map's network: a draw an image, several of some, and those of the picture."""
        each = {f"map-{k}": k for k in self.map_steps}
        each |= {f"glass-{k}": k * INTEGRATORS[self.glass_method].calls for k in self.glass_steps}
        several = self.draws * min(self.images, self.samples)
        draws = sum(k * (self.samples + several * (name in SPREAD)) for name, k in each.items())
        return len(self.times) * (draws + PICTURED)


class Recovered(NamedTuple):
    """Figures, and for one held-out image at each time: noisy state, draws, their mean and spread."""

    metrics: dict[str, Any]
    image: Tensor
    noisy: list[Tensor]
    draws: list[Tensor]
    spread: list[tuple[Tensor, Tensor]]


Push = Callable[[Tensor, float, Tensor, Cond], Tensor]
PICTURED = 256  # draws behind the picture of their mean and spread
SPREAD = ("map-1", "map-4", "glass-30", "drift-glass-30")  # whose spread is looked at


def samplers(
    setup: ImageSetup, map_steps: tuple[int, ...], glass_steps: tuple[int, ...], method: str
) -> dict[str, Push]:
    """Name -> (noise, t, x_t, cond) -> draws. glass-k: on the map's own drift; drift-glass-k: on one trained alone."""
    model = setup.model
    out: dict[str, Push] = {}
    for k in map_steps:
        out[f"map-{k}"] = lambda noise, t, x, cond=None, k=k: model.push(  # type: ignore[misc]
            noise, t, x, k, **({} if cond is None else {"cond": cond})
        )
    sources = {"glass": model.drift, **({} if setup.drift is None else {"drift-glass": setup.drift})}
    for name, drift in sources.items():
        for k in glass_steps:
            glass = GlassPosterior(model.path, drift, k, method)
            out[f"{name}-{k}"] = lambda noise, t, x, cond=None, glass=glass: glass.push(  # type: ignore[misc]
                noise, x.new_full((len(x),), t), x, cond
            )
    return out


@torch.no_grad()
def evaluate_recovery(setup: ImageSetup, config: RecoveryConfig, say: Say = lambda line: None) -> Recovered:
    """metrics.frechet[t][sampler], metrics.floor, metrics.spread_ratio[t][sampler], and pictures."""
    pushes = samplers(setup, config.map_steps, config.glass_steps, config.glass_method)
    parts = ranges(config.samples, setup.shard)
    cells: dict[str, Callable[[], Shard]] = {}
    for t in config.times:
        for name, push in pushes.items():
            for part, index in parts.items():
                cells[f"{t!r}.{name}.{part}"] = _cell(setup, config, t, push, index)
            if name in SPREAD:
                cells[f"{t!r}.{name}.spread"] = _spread_cell(setup, config, t, push)
    drawn = setup.share(cells)
    first, _ = setup.images(config.samples, "recovery", config.seed, slice(config.images))
    frechet: dict[str, dict[str, float]] = {}
    ratio: dict[str, dict[str, float]] = {}
    cost: dict[str, dict[str, float]] = {}
    for t in config.times:
        say(f"t = {t:g}")
        frechet[repr(t)], ratio[repr(t)] = {}, {}
        for name in pushes:
            made = [drawn(f"{t!r}.{name}.{part}") for part in parts]
            cost[name] = cost_of_parts(made, config.samples)
            frechet[repr(t)][name] = setup.frechet_of(torch.cat([part.tensors["features"] for part in made]))
            if name in SPREAD:
                several = drawn(f"{t!r}.{name}.spread").tensors["draws"]
                ratio[repr(t)][name] = spread_ratio(several, first)
    image, noisy, shown, spread = _pictured(setup, config)
    floor = setup.floor()
    metrics = {
        "frechet": frechet,
        "floor": floor,
        "spread_ratio": ratio,
        "cost_per_draw": cost,
        "samples": config.samples,
        "space": setup.judge.space,
        **setup.extras(),
        **_words(frechet, ratio, floor, cost, setup),
    }
    return Recovered(metrics, image, noisy, shown, spread)


class _Noised(NamedTuple):
    """Held-out images at time t, noise for a draw of each, and what the map is told of them."""

    x_t: Tensor
    noise: Tensor
    cond: Cond


def _noised(setup: ImageSetup, config: RecoveryConfig, t: float, index: slice) -> _Noised:
    """The images of these indices. Latents, which may be many, have noise by the row; images of memory one for all."""
    labels = setup.told_of(config.samples, "recovery", config.seed, index)
    if setup.latent:
        x_1, _ = setup.images(config.samples, "recovery", config.seed, index)
        seeds = fresh_seeds(config.samples, stream(config.seed, "recovery", repr(t)))[index].to(x_1.device)
        eps, noise = (RowNoise(seeds, name).normal(tuple(x_1.shape[1:])) for name in ("state", "draw"))
    else:
        x_1, _ = setup.images(config.samples, "recovery", config.seed)
        g = stream(config.seed, "recovery", repr(t))
        eps, noise = (randn(tuple(x_1.shape), g, device=x_1.device)[index] for _ in range(2))
        x_1 = x_1[index]
    return _Noised(setup.model.path.interpolate(eps, x_1, t), noise, setup.cond(labels, len(x_1)))


def _several(setup: ImageSetup, config: RecoveryConfig, t: float, shape: tuple[int, ...]) -> Tensor:
    """Noise for several draws of each of the first images: (draws, images, *event)."""
    whole = (config.samples, *shape[1:])
    g = stream(config.seed, "recovery", repr(t), *(("several",) if setup.latent else ()))
    if not setup.latent:
        for _ in range(2):  # what the states and the single draws have taken of it
            randn(whole, g, device=setup.model.device)
    return randn((config.draws, *shape), g, device=setup.model.device)


def _cell(setup: ImageSetup, config: RecoveryConfig, t: float, push: Push, index: slice) -> Callable[[], Shard]:
    """Features of a draw for each of these images."""

    @torch.no_grad()
    def make() -> Shard:
        noised = _noised(setup, config, t, index)
        with Timed(setup.model) as timed, setup.autocast():
            draws = push(noised.noise, t, noised.x_t, noised.cond)
        return Shard({"features": setup.judge.features(draws)}, {"cost": timed.meter.cost()})

    return make


def _spread_cell(setup: ImageSetup, config: RecoveryConfig, t: float, push: Push) -> Callable[[], Shard]:
    """Several draws for each of the first images: (draws, images, *event)."""

    @torch.no_grad()
    def make() -> Shard:
        x_t, _, cond = _noised(setup, config, t, slice(config.images))
        many = _several(setup, config, t, tuple(x_t.shape))
        repeated = repeat_rows(x_t, config.draws)
        told = repeat_cond(cond, config.draws)
        size = LATENT_BATCH if setup.latent else len(repeated)
        parts = []
        with setup.autocast():
            for begin in range(0, len(repeated), size):
                part = slice(begin, begin + size)
                here = select_cond(told, part)
                parts.append(push(many.flatten(0, 1)[part], t, repeated[part], here))
        return Shard({"draws": torch.cat(parts).reshape(many.shape)}, {})

    return make


def _pictured(setup: ImageSetup, config: RecoveryConfig) -> tuple[Tensor, list[Tensor], list[Tensor], list[Any]]:
    x_1, _ = setup.images(1, "picture", config.seed)
    cond = setup.cond(setup.told_of(1, "picture", config.seed), 1)
    told: dict[str, Any] = {} if cond is None else {"cond": cond}
    eps = randn(tuple(x_1.shape), stream(config.seed, "picture"), device=x_1.device)
    noisy, shown, spread = [], [], []
    for t in config.times:
        x_t = setup.model.path.interpolate(eps, x_1, t)
        g = stream(config.seed, "picture", repr(t))
        with setup.autocast():
            draws = setup.decode(setup.model.draw(t, x_t, PICTURED, generator=g, **told)[:, 0])
        noisy.append(setup.decode(x_t)[0].cpu())
        shown.append(draws[:8].cpu())
        spread.append((draws.mean(0).cpu(), draws.std(0).cpu()))
    return setup.decode(x_1)[0].cpu(), noisy, shown, spread


def _words(
    frechet: dict[str, dict[str, float]], ratio: dict[str, dict[str, float]], floor: float, cost: Any, setup: ImageSetup
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
            f"{setup.measure} of draws to {setup.compared_with}, in {setup.judge.space}": table(head, rows),
            "Spread ratio: the truth's distance over the draws' spread (1: calibrated, above: too narrow)": table(
                ["sampler", *head[2:]], judged
            ),
        },
        "summary": "Held-out images noised to t and drawn again." + claim * any(v is not None for v in best.values()),
    }


def _title(name: str) -> str:
    kind, _, steps = name.rpartition("-")
    return {"map": "map", "glass": "GLASS", "drift-glass": "GLASS on the drift alone"}[kind] + f", {steps} steps"
