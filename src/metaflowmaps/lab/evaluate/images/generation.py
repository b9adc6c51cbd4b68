r"""How good are unconditional samples, by network calls? Refinement and composed jumps of the map against ODE steps.

Fréchet distance to the held-out images (judge's features) with its floor, diversity, and **copying**: the median
distance (in pixels, or in latents) from a sample to the nearest image trained on, over the same for held-out images
(well below 1: the model repeats what it has seen). Against a statistics file with Inception's features the distance is
FID, and no data are needed: without any, floor and copying are left out.

Samples are judged part by part as they are made: a part keeps its features, not its pictures.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps._shapes import Cond
from metaflowmaps.lab.evaluate.images.setup import (
    ImageEvalConfig,
    ImageSetup,
    Say,
    Timed,
    cost_of_parts,
    diversity_of,
    table,
)
from metaflowmaps.path import call_drift
from metaflowmaps.random import RowNoise, fresh_seeds, stream
from metaflowmaps.sampling import integrate, uniform_grid
from metaflowmaps.work.shards import Shard, ranges


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


SHOWN = 16  # samples of each sampler


class Generated(NamedTuple):
    """Figures and pictures of the first samples of each sampler."""

    metrics: dict[str, Any]
    samples: dict[str, Tensor]


@torch.no_grad()
def evaluate_generation(setup: ImageSetup, config: GenerationConfig, say: Say = lambda line: None) -> Generated:
    """metrics.by_sampler[name] = {frechet, distance, vendi, copying, cost}."""
    cells: dict[str, Any] = {}
    shown: dict[str, Tensor] = {}
    samplers, parts = _samplers(setup, config), ranges(config.samples, setup.shard)
    drawn = setup.share(
        {f"{name}.{part}": _cell(setup, config, name, index, say) for name in samplers for part, index in parts.items()}
    )
    known = len(setup.train) > 0
    usual = nearest(setup.unseen, setup.seen).median() if known else None
    for name in samplers:
        made = [drawn(f"{name}.{part}") for part in parts]
        features = torch.cat([part.tensors["features"] for part in made])
        cells[name] = {"frechet": setup.frechet_of(features), **diversity_of(features)}
        if usual is not None:
            cells[name]["copying"] = float(torch.cat([part.tensors["nearest"] for part in made]).median() / usual)
        cells[name]["cost"] = cost_of_parts(made, config.samples)
        first = torch.cat([part.tensors["shown"] for part in made if "shown" in part.tensors])
        shown[name] = setup.decode(first).cpu()
    floor = {"frechet": setup.floor(), **diversity_of(setup.reference)} if known else None
    metrics = {
        "by_sampler": cells,
        **({} if floor is None else {"floor": floor}),
        "samples": config.samples,
        "space": setup.judge.space,
        **setup.extras(),
    }
    return Generated({**metrics, **_words(cells, floor, setup)}, shown)


def nearest(x: Tensor, data: Tensor) -> Tensor:
    """Distance of each of x (n, *event) to the nearest of data (m, *event): (n,)."""
    flat = data.flatten(1)
    return torch.cat([torch.cdist(part, flat).amin(1) for part in x.flatten(1).split(512)])


def _cell(setup: ImageSetup, config: GenerationConfig, name: str, index: slice, say: Say) -> Callable[[], Shard]:
    """What is kept of the samples of these indices: each is a function of its own seed, and of its class."""

    @torch.no_grad()
    def make() -> Shard:
        say(f"{name}, samples {index.start} to {index.stop - 1}")
        seeds = fresh_seeds(config.samples, stream(config.seed, "generation", name))[index]
        labels = setup.labels(config.samples, "generation", config.seed)
        cond = setup.cond(None if labels is None else labels[index], len(seeds))
        with Timed(setup.model) as timed, setup.autocast():
            x = _samplers(setup, config, cond)[name](seeds)
        kept = {"features": setup.judge.features(x)}
        if len(setup.train):
            kept["nearest"] = nearest(x, setup.seen)
        if index.start < SHOWN:
            kept["shown"] = x[: SHOWN - index.start]
        return Shard(kept, {"cost": timed.meter.cost()})

    return make


def _samplers(setup: ImageSetup, config: GenerationConfig, cond: Cond = None) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> seeds (n,) -> (n, *event), under the condition of these samples."""
    model = setup.model
    told: dict[str, Any] = {} if cond is None else {"cond": cond}

    def noise(seeds: Tensor) -> Tensor:
        return RowNoise(seeds.to(model.device), "generate").normal(model.event_shape, dtype=model.dtype)

    def composed(seeds: Tensor, k: int) -> Tensor:
        x = noise(seeds)
        return model.push(x, 0.0, torch.zeros_like(x), k, **told)

    def carried(seeds: Tensor, k: int, drift: Any) -> Tensor:
        return integrate(lambda t, x: call_drift(drift, t, x, cond), noise(seeds), uniform_grid(k))

    out: dict[str, Callable[[Tensor], Tensor]] = {}
    for k in config.refine_steps:
        out[f"refine-{k}"] = lambda seeds, k=k: model.generate(len(seeds), k, seeds=seeds, **told)  # type: ignore[misc]
    for k in config.compose_steps:
        out[f"compose-{k}"] = lambda seeds, k=k: composed(seeds, k)  # type: ignore[misc]
    sources = {"ode": model.drift, **({} if setup.drift is None else {"drift-ode": setup.drift})}
    for name, drift in sources.items():
        for k in config.ode_steps:
            out[f"{name}-{k}"] = lambda seeds, k=k, drift=drift: carried(seeds, k, drift)  # type: ignore[misc]
    return out


TITLES = {
    "refine": "map, refined",
    "compose": "map, composed jumps",
    "ode": "ODE of the map's drift",
    "drift-ode": "ODE of the drift alone",
}


def _words(cells: dict[str, Any], floor: dict[str, float] | None, setup: ImageSetup) -> dict[str, Any]:
    rows = []
    for name, cell in cells.items():
        kind, _, steps = name.rpartition("-")
        rows.append(
            [
                TITLES[kind],
                int(steps),
                cell["frechet"],
                cell["distance"],
                cell["vendi"],
                cell.get("copying"),
                1000 * cell["cost"]["seconds"],
            ]
        )
    if floor is not None:
        held = [floor[k] for k in ("frechet", "distance", "vendi")]
        rows.append(["held-out images (floor: trained on)", None, *held, 1.0, None])
    head = ["sampler", "steps", setup.measure, "mean distance", "Vendi", "copying", "ms a sample"]
    title = "Unconditional samples" if setup.conditions is None else setup.conditions.title()
    copying = "" if floor is None else (" Copying: distance to the nearest training image, 1 for images never seen.")
    return {
        "tables": {f"{title}, in {setup.judge.space}": table(head, rows)},
        "summary": f"{title} by number of network calls.{copying}",
    }
