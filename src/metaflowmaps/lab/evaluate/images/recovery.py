r"""Are one-step draws as good as GLASS with many calls? Posterior recovery from noised held-out images.

Held-out images x_1 are noised to x_t; every sampler makes one draw for each; draws of the true posterior would have the
law of the held-out images at every t. So the Fréchet distance between all draws and the held-out images (in the judge's
features) is the error, and the **floor** is what the training images themselves are apart. Whether single posteriors
are right is another question: **spread ratio** compares the truth's distance from the mean of several draws with the
spread of those draws (1: calibrated, > 1: draws too narrow).

Of a map of latents, latents are noised and drawn, and their pictures compared: against a statistics file in Inception's
features that is posterior FID. A map that knows classes is told the image's own.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import Cond, repeat_cond, repeat_rows, select_cond
from metaflowmaps.cost import Meter
from metaflowmaps.lab.evaluate.draws import DrawsConfig, DrawsPosterior, posteriors, steps_of, title_of
from metaflowmaps.lab.evaluate.images.experiment import Cells, Drawn, ImageExperiment
from metaflowmaps.lab.evaluate.images.setup import (
    LATENT_BATCH,
    ImageEvalConfig,
    ImageSetup,
    TableRows,
    cost_of_parts,
    table,
)
from metaflowmaps.lab.evaluate.rows import Json
from metaflowmaps.metrics.calibration import spread_ratio
from metaflowmaps.random import RowNoise, fresh_seeds, randn, stream
from metaflowmaps.sampling import INTEGRATORS
from metaflowmaps.work.shards import Shard, ranges

PICTURED = 256  # draws behind the picture of their mean and spread
SHOWN = 8  # draws in the picture of draws
SPREAD = ("map-1", "map-4", "glass-30", "drift-glass-30")  # whose spread is looked at
ByTime = dict[str, dict[str, float]]  # by time, by sampler


class RecoveryConfig(DrawsConfig, ImageEvalConfig):
    """What to noise, how far, and who draws."""

    one_step_leads: ClassVar[bool] = True

    samples: int = Field(2048, ge=2)
    times: tuple[float, ...] = Field((0.0, 0.1, 0.2, 0.5, 0.8), min_length=1)
    glass_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 30, 32)
    glass_method: str = "euler"
    draws: int = Field(16, ge=2)  # for spread, and for the picture
    images: int = Field(128, ge=2)  # whose spread is looked at

    def calls(self) -> int:
        """Evaluations of the map's network: a draw an image, several of some, and those of the picture."""
        each = {f"map-{k}": k for k in self.map_steps}
        each |= {f"glass-{k}": k * INTEGRATORS[self.glass_method].calls for k in self.glass_steps}
        several = self.draws * min(self.images, self.samples)
        draws = sum(k * (self.samples + several * (name in SPREAD)) for name, k in each.items())
        return len(self.times) * (draws + PICTURED)


@dataclass(frozen=True)
class Recovered:
    """Distances and calibration of every sampler, and one held-out image at each time."""

    frechet: ByTime
    floor: float
    spread_ratio: ByTime
    cost: dict[str, dict[str, float]]  # of a draw, by sampler
    samples: int
    setup: ImageSetup
    image: Tensor
    noisy: list[Tensor]
    draws: list[Tensor]
    spread: list[tuple[Tensor, Tensor]]  # mean and standard deviation of draws

    @cached_property
    def metrics(self) -> Json:
        """metrics.frechet[t][sampler], metrics.floor, metrics.spread_ratio[t][sampler]."""
        setup = self.setup
        return {
            "frechet": self.frechet,
            "floor": self.floor,
            "spread_ratio": self.spread_ratio,
            "cost_per_draw": self.cost,
            "samples": self.samples,
            "space": setup.judge.space,
            **setup.extras(),
            "tables": {
                f"{setup.measure} of draws to {setup.compared_with}, in {setup.judge.space}": self._distances(),
                "Spread ratio: the truth's distance over the draws' spread (1: calibrated, above: too narrow)": (
                    _by_time(self.spread_ratio)
                ),
            },
            "summary": self._summary(),
        }

    def _distances(self) -> TableRows:
        times, found = list(self.frechet), _by_time(self.frechet)
        for name, row in zip(self.cost, found["rows"], strict=True):
            row.insert(1, self.cost[name]["forwards"] or float(steps_of(name)))
        floor = ["images trained on (floor)", None, *(self.floor for _ in times)]
        head, *when = found["head"]
        return table([head, "calls a draw", *when], [*found["rows"], floor])

    def _summary(self) -> str:
        won, compared = 0, 0
        for by_sampler in self.frechet.values():
            rivals = [value for name, value in by_sampler.items() if name.endswith("glass-30")]
            compared += bool(rivals)
            won += bool(rivals) and by_sampler["map-1"] <= min(rivals)
        told = "Held-out images noised to t and drawn again."
        if not compared:
            return told
        times = len(self.frechet)
        return f"{told} One map step is at least as close to the data as 30 calls of GLASS at {won} of {times} times."


def _by_time(figures: ByTime) -> TableRows:
    """One row a sampler, one column a time."""
    names = next(iter(figures.values()))
    head = ["sampler", *(f"t = {float(t):g}" for t in figures)]
    return table(head, [[title_of(name), *(at[name] for at in figures.values())] for name in names])


class _Noised(NamedTuple):
    """Held-out images at time t, noise for a draw of each, and what the map is told of them."""

    x_t: Tensor
    noise: Tensor
    cond: Cond


class Recovery(ImageExperiment[RecoveryConfig, Recovered]):
    """Draws of every sampler for noised held-out images."""

    @cached_property
    def samplers(self) -> dict[str, DrawsPosterior]:
        """Who draws, by name."""
        return posteriors(self.setup.model, self.config, self.config.glass_method, drift_alone=self.setup.drift)

    @cached_property
    def parts(self) -> dict[str, slice]:
        """How the images are cut."""
        return ranges(self.config.samples, self.setup.shard)

    def cells(self) -> Cells:
        cells: dict[str, partial[Shard]] = {}
        for t in self.config.times:
            for name in self.samplers:
                for part, index in self.parts.items():
                    cells[f"{t!r}.{name}.{part}"] = partial(self._features, t, name, index)
                if name in SPREAD:
                    cells[f"{t!r}.{name}.spread"] = partial(self._several, t, name)
        return cells

    def judge(self, drawn: Drawn) -> Recovered:
        setup, config = self.setup, self.config
        first, _ = setup.images(config.samples, "recovery", config.seed, slice(config.images))
        frechet: ByTime = {repr(t): {} for t in config.times}
        ratio: ByTime = {repr(t): {} for t in config.times}
        cost: dict[str, dict[str, float]] = {}
        for t in config.times:
            self.say(f"t = {t:g}")
            for name in self.samplers:
                made = [drawn(f"{t!r}.{name}.{part}") for part in self.parts]
                cost[name] = cost_of_parts(made, config.samples)
                frechet[repr(t)][name] = setup.frechet_of(torch.cat([part.tensors["features"] for part in made]))
                if name in SPREAD:
                    ratio[repr(t)][name] = spread_ratio(drawn(f"{t!r}.{name}.spread").tensors["draws"], first)
        return Recovered(frechet, setup.floor(), ratio, cost, config.samples, setup, *self._picture())

    def _noised(self, t: float, index: slice) -> _Noised:
        """The images of these indices. Latents, which may be many, have noise by the row; images one for all."""
        setup, samples, seed = self.setup, self.config.samples, self.config.seed
        cond, g = setup.cond_of_images(samples, "recovery", seed, index), stream(seed, "recovery", repr(t))
        x_1, _ = setup.images(samples, "recovery", seed, index)
        if setup.latent:
            seeds = fresh_seeds(samples, g)[index].to(x_1.device)
            eps, noise = (RowNoise(seeds, name).normal(tuple(x_1.shape[1:])) for name in ("state", "draw"))
        else:
            whole = (samples, *x_1.shape[1:])
            eps, noise = (randn(whole, g, device=x_1.device)[index] for _ in range(2))
        return _Noised(setup.model.path.interpolate(eps, x_1, t), noise, cond)

    def _noise_of_several(self, t: float, shape: tuple[int, ...]) -> Tensor:
        """Noise for several draws of each of the first images: (draws, images, *event)."""
        setup, config = self.setup, self.config
        g = stream(config.seed, "recovery", repr(t), *(("several",) if setup.latent else ()))
        if not setup.latent:
            for _ in range(2):  # what the states and the single draws have taken of it
                randn((config.samples, *shape[1:]), g, device=setup.model.device)
        return randn((config.draws, *shape), g, device=setup.model.device)

    @torch.no_grad()
    def _features(self, t: float, name: str, index: slice) -> Shard:
        """Of a draw for each of these images."""
        noised = self._noised(t, index)
        with Meter(self.setup.model.network) as meter, self.setup.autocast():
            draws = self.samplers[name].push(noised.noise, t, noised.x_t, noised.cond)
        return Shard({"features": self.setup.judge.features(draws)}, {"cost": meter.cost()})

    @torch.no_grad()
    def _several(self, t: float, name: str) -> Shard:
        """Several draws for each of the first images: (draws, images, *event)."""
        draws = self.config.draws
        x_t, _, cond = self._noised(t, slice(self.config.images))
        noise = self._noise_of_several(t, tuple(x_t.shape))
        repeated, told = repeat_rows(x_t, draws), repeat_cond(cond, draws)
        size, parts = LATENT_BATCH if self.setup.latent else len(repeated), []
        with self.setup.autocast():
            for begin in range(0, len(repeated), size):
                rows = slice(begin, begin + size)
                here = noise.flatten(0, 1)[rows]
                parts.append(self.samplers[name].push(here, t, repeated[rows], select_cond(told, rows)))
        return Shard({"draws": torch.cat(parts).reshape(noise.shape)}, {})

    @torch.no_grad()
    def _picture(self) -> tuple[Tensor, list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]:
        """One held-out image; at each time its noisy state, draws for it, and their mean and spread."""
        setup, seed = self.setup, self.config.seed
        x_1, _ = setup.images(1, "picture", seed)
        cond = setup.cond_of_images(1, "picture", seed)
        eps = randn(tuple(x_1.shape), stream(seed, "picture"), device=x_1.device)
        noisy, shown, spread = [], [], []
        for t in self.config.times:
            x_t = setup.model.path.interpolate(eps, x_1, t)
            g = stream(seed, "picture", repr(t))
            with setup.autocast():
                draws = setup.decode(setup.model.draw(t, x_t, PICTURED, generator=g, cond=cond)[:, 0])
            noisy.append(setup.decode(x_t)[0].cpu())
            shown.append(draws[:SHOWN].cpu())
            spread.append((draws.mean(0).cpu(), draws.std(0).cpu()))
        return setup.decode(x_1)[0].cpu(), noisy, shown, spread
