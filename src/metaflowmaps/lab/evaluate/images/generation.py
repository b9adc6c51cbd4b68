r"""How good are unconditional samples, by network calls? Refinement and composed jumps of the map against ODE steps.

Fréchet distance to the held-out images (judge's features) with its floor, diversity, and **copying**: the median
distance (in pixels, or in latents) from a sample to the nearest image trained on, over the same for held-out images
(well below 1: the model repeats what it has seen). Against a statistics file with Inception's features the distance is
FID, and no data are needed: without any, floor and copying are left out.

Samples are judged part by part as they are made: a part keeps its features, not its pictures.
"""

from dataclasses import dataclass
from functools import cached_property, partial

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps._shapes import Cond
from metaflowmaps.cost import Meter
from metaflowmaps.lab.evaluate.draws import steps_of
from metaflowmaps.lab.evaluate.images.experiment import Cells, Drawn, ImageExperiment
from metaflowmaps.lab.evaluate.images.setup import (
    ImageEvalConfig,
    ImageSetup,
    TableRows,
    cost_of_parts,
    diversity_of,
    table,
)
from metaflowmaps.lab.evaluate.rows import Json, known
from metaflowmaps.random import RowNoise, fresh_seeds, stream
from metaflowmaps.work.shards import Shard, ranges

SHOWN = 16  # samples of each sampler
TITLES = {
    "refine": "map, refined",
    "compose": "map, composed jumps",
    "ode": "ODE of the map's drift",
    "drift-ode": "ODE of the drift alone",
}


class GenerationConfig(ImageEvalConfig):
    """How many samples, in how many steps."""

    samples: int = Field(2048, ge=2)
    refine_steps: tuple[int, ...] = (1, 2, 4, 8)
    compose_steps: tuple[int, ...] = (2, 4)
    ode_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)

    @model_validator(mode="after")
    def _possible(self) -> "GenerationConfig":
        if min((*self.refine_steps, *self.compose_steps, *self.ode_steps), default=0) < 1:
            raise ValueError("give refine_steps, compose_steps or ode_steps, each at least 1")
        return self

    def calls(self) -> int:
        """Evaluations of the map's network (a drift trained alone is another network)."""
        return self.samples * sum((*self.refine_steps, *self.compose_steps, *self.ode_steps))


@dataclass(frozen=True)
class GeneratedCell:
    """The samples of one sampler, or the images trained on."""

    frechet: float
    distance: float
    vendi: float
    copying: float | None = None  # None: no data to be compared with
    cost: dict[str, float] | None = None  # None: nothing was made


@dataclass(frozen=True)
class Generated:
    """Every sampler's figures, and its first samples."""

    setup: ImageSetup
    num: int
    by_sampler: dict[str, GeneratedCell]
    floor: GeneratedCell | None  # None without data
    samples: dict[str, Tensor]

    @cached_property
    def metrics(self) -> Json:
        """metrics.by_sampler[name] = {frechet, distance, vendi, copying, cost}."""
        setup = self.setup
        title = "Unconditional samples" if setup.conditions is None else setup.conditions.title()
        copying = " Copying: distance to the nearest training image, 1 for images never seen." if self.floor else ""
        return {
            "by_sampler": {name: known(cell) for name, cell in self.by_sampler.items()},
            **({} if self.floor is None else {"floor": known(self.floor)}),
            "samples": self.num,
            "space": setup.judge.space,
            **setup.extras(),
            "tables": {f"{title}, in {setup.judge.space}": self._table()},
            "summary": f"{title} by number of network calls.{copying}",
        }

    def _table(self) -> TableRows:
        rows: list[list[object]] = []
        for name, cell in self.by_sampler.items():
            took = 1000 * cell.cost["seconds"] if cell.cost else None
            figures = [cell.frechet, cell.distance, cell.vendi, cell.copying, took]
            rows.append([TITLES[name.rpartition("-")[0]], steps_of(name), *figures])
        if self.floor is not None:
            floor = self.floor
            held_out = "held-out images (floor: trained on)"
            rows.append([held_out, None, floor.frechet, floor.distance, floor.vendi, 1.0, None])
        return table(["sampler", "steps", self.setup.measure, "mean distance", "Vendi", "copying", "ms a sample"], rows)


def nearest(x: Tensor, data: Tensor) -> Tensor:
    """Distance of each of x (n, *event) to the nearest of data (m, *event): (n,)."""
    flat = data.flatten(1)
    return torch.cat([torch.cdist(part, flat).amin(1) for part in x.flatten(1).split(512)])


class Generation(ImageExperiment[GenerationConfig, Generated]):
    """Samples of every sampler."""

    @cached_property
    def samplers(self) -> list[str]:
        """``refine-K``, ``compose-K``, ``ode-K`` and, where a drift was trained alone, ``drift-ode-K``."""
        config, odes = self.config, ["ode"] if self.setup.drift is None else ["ode", "drift-ode"]
        steps = {
            "refine": config.refine_steps,
            "compose": config.compose_steps,
            **dict.fromkeys(odes, config.ode_steps),
        }
        return [f"{kind}-{k}" for kind, ks in steps.items() for k in ks]

    @cached_property
    def parts(self) -> dict[str, slice]:
        """How the samples are cut."""
        return ranges(self.config.samples, self.setup.shard)

    def cells(self) -> Cells:
        parts = self.parts.items()
        return {f"{name}.{part}": partial(self._draw, name, index) for name in self.samplers for part, index in parts}

    @torch.no_grad()
    def judge(self, drawn: Drawn) -> Generated:
        setup, cells, shown = self.setup, {}, {}
        with_data = len(setup.train) > 0
        usual = float(nearest(setup.unseen, setup.seen).median()) if with_data else None
        for name in self.samplers:
            made = [drawn(f"{name}.{part}") for part in self.parts]
            features = torch.cat([part.tensors["features"] for part in made])
            copying = None
            if usual is not None:
                copying = float(torch.cat([part.tensors["nearest"] for part in made]).median() / usual)
            cost = cost_of_parts(made, self.config.samples)
            cells[name] = GeneratedCell(setup.frechet_of(features), *diversity_of(features), copying, cost)
            first = torch.cat([part.tensors["shown"] for part in made if "shown" in part.tensors])
            shown[name] = setup.decode(first).cpu()
        floor = GeneratedCell(setup.floor(), *diversity_of(setup.reference)) if with_data else None
        return Generated(setup, self.config.samples, cells, floor, shown)

    @torch.no_grad()
    def _draw(self, name: str, index: slice) -> Shard:
        """What is kept of the samples of these indices: each is a function of its own seed, and of its class."""
        setup, config = self.setup, self.config
        self.say(f"{name}, samples {index.start} to {index.stop - 1}")
        seeds = fresh_seeds(config.samples, stream(config.seed, "generation", name))[index]
        cond = setup.cond_of_noise(config.samples, "generation", config.seed, index)
        with Meter(setup.model.network) as meter, setup.autocast():
            x = self._samples(name, seeds, cond)
        kept = {"features": setup.judge.features(x)}
        if len(setup.train):
            kept["nearest"] = nearest(x, setup.seen)
        if index.start < SHOWN:
            kept["shown"] = x[: SHOWN - index.start]
        return Shard(kept, {"cost": meter.cost()})

    def _samples(self, name: str, seeds: Tensor, cond: Cond) -> Tensor:
        """Samples of one sampler, each of its own seed: (n, *event)."""
        model, kind, steps = self.setup.model, name.rpartition("-")[0], steps_of(name)
        if kind == "refine":
            return model.generate(len(seeds), steps, seeds=seeds, cond=cond)
        noise = RowNoise(seeds.to(model.device), "generate").normal(model.event_shape, dtype=model.dtype)
        if kind == "compose":
            return model.push(noise, 0.0, torch.zeros_like(noise), steps, cond)
        return self.setup.flow(noise, steps, cond, self.setup.drift if kind == "drift-ode" else None)
