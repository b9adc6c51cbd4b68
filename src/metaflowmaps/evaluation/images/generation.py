r"""How good are unconditional samples, by network calls? Refinement and composed jumps of the map against ODE steps.

Fréchet distance to the held-out images (judge's features) with its floor, diversity, and **copying**: the median
distance in pixels from a sample to the nearest image trained on, over the same for held-out images (well below 1: the
model repeats what it has seen).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps.evaluation.images.stage import ImageEvalConfig, Say, Stage, Timed, cost_of_parts, table
from metaflowmaps.randomness import RowNoise, fresh_seeds, stream
from metaflowmaps.sampling import integrate, uniform_grid
from metaflowmaps.sharding import Made, ranges


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


class Generated(NamedTuple):
    """Figures and the first samples of each sampler."""

    metrics: dict[str, Any]
    samples: dict[str, Tensor]


@torch.no_grad()
def evaluate_generation(stage: Stage, config: GenerationConfig, say: Say = lambda line: None) -> Generated:
    """metrics.by_sampler[name] = {frechet, distance, vendi, copying, cost}."""
    model, cells, shown = stage.model, {}, {}
    samplers, parts = _samplers(stage, config), ranges(config.samples, stage.shard)
    drawn = stage.share(
        {f"{name}.{part}": _cell(stage, config, name, index, say) for name in samplers for part, index in parts.items()}
    )
    seen = stage.train.tensor().to(model.device)
    usual = nearest(stage.held_out.tensor().to(model.device), seen).median()
    for name in samplers:
        made = [drawn(f"{name}.{part}") for part in parts]
        x = torch.cat([part.tensors["samples"] for part in made])
        cells[name] = {
            "frechet": stage.frechet(x),
            **stage.diversity(x),
            "copying": float(nearest(x, seen).median() / usual),
            "cost": cost_of_parts(made, len(x)),
        }
        shown[name] = x[:16].cpu()
    held = stage.held_out.tensor().to(model.device)
    floor = {"frechet": stage.floor(), **stage.diversity(held)}
    metrics = {"by_sampler": cells, "floor": floor, "samples": config.samples, "space": stage.judge.space}
    return Generated({**metrics, **_words(cells, floor, stage.judge.space)}, shown)


def nearest(x: Tensor, data: Tensor) -> Tensor:
    """Distance of each of x (n, *event) to the nearest of data (m, *event): (n,)."""
    flat = data.flatten(1)
    return torch.cat([torch.cdist(part, flat).amin(1) for part in x.flatten(1).split(512)])


def _cell(stage: Stage, config: GenerationConfig, name: str, index: slice, say: Say) -> Callable[[], Made]:
    """Samples of these indices: each is a function of its own seed."""

    @torch.no_grad()
    def make() -> Made:
        say(f"{name}, samples {index.start} to {index.stop - 1}")
        seeds = fresh_seeds(config.samples, stream(config.seed, "generation", name))[index]
        with Timed(stage.model) as timed:
            x = _samplers(stage, config)[name](seeds)
        return Made({"samples": x}, {"cost": timed.meter.cost()})

    return make


def _samplers(stage: Stage, config: GenerationConfig) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> seeds (n,) -> (n, *event)."""
    model = stage.model

    def noise(seeds: Tensor) -> Tensor:
        return RowNoise(seeds.to(model.device), "generate").normal(model.event_shape, dtype=model.dtype)

    def composed(seeds: Tensor, k: int) -> Tensor:
        x = noise(seeds)
        return model.push(x, 0.0, torch.zeros_like(x), k)

    out: dict[str, Callable[[Tensor], Tensor]] = {}
    for k in config.refine_steps:
        out[f"refine-{k}"] = lambda seeds, k=k: model.generate(len(seeds), k, seeds=seeds)  # type: ignore[misc]
    for k in config.compose_steps:
        out[f"compose-{k}"] = lambda seeds, k=k: composed(seeds, k)  # type: ignore[misc]
    sources = {"ode": model.drift, **({} if stage.drift is None else {"drift-ode": stage.drift})}
    for name, drift in sources.items():
        for k in config.ode_steps:
            grid = uniform_grid(k)
            out[f"{name}-{k}"] = lambda seeds, grid=grid, drift=drift: integrate(drift, noise(seeds), grid)  # type: ignore[misc]
    return out


TITLES = {
    "refine": "map, refined",
    "compose": "map, composed jumps",
    "ode": "ODE of the map's drift",
    "drift-ode": "ODE of the drift alone",
}


def _words(cells: dict[str, Any], floor: dict[str, float], space: str) -> dict[str, Any]:
    rows = []
    for name, cell in cells.items():
        kind, _, steps = name.rpartition("-")
        rows.append(
            [
                TITLES[kind], int(steps), cell["frechet"], cell["distance"], cell["vendi"], cell["copying"],
                1000 * cell["cost"]["seconds"],
            ]
        )  # fmt: skip
    held = [floor[k] for k in ("frechet", "distance", "vendi")]
    rows.append(["held-out images (floor: trained on)", None, *held, 1.0, None])
    head = ["sampler", "steps", "Fréchet distance", "mean distance", "Vendi", "copying", "ms a sample"]
    return {
        "tables": {f"Unconditional samples, in {space}": table(head, rows)},
        "summary": "Unconditional samples by number of network calls. Copying: distance to the nearest training image, "
        "1 for images never seen.",
    }
