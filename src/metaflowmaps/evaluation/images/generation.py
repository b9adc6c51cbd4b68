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

from metaflowmaps.evaluation.images.stage import ImageEvalConfig, Say, Stage, Timed, table
from metaflowmaps.randomness import randn, stream
from metaflowmaps.sampling import integrate, uniform_grid


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
    seen = stage.train.tensor().to(model.device)
    usual = nearest(stage.held_out.tensor().to(model.device), seen).median()
    for name, make in _samplers(stage, config).items():
        say(name)
        with Timed(model) as timed:
            x = make(stream(config.seed, "generation", name))
        cells[name] = {
            "frechet": stage.frechet(x),
            **stage.diversity(x),
            "copying": float(nearest(x, seen).median() / usual),
            "cost": timed.cost(len(x)),
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


def _samplers(stage: Stage, config: GenerationConfig) -> dict[str, Callable[[torch.Generator], Tensor]]:
    model, n = stage.model, config.samples

    def noise(g: torch.Generator) -> Tensor:
        return randn((n, *model.event_shape), g, model.dtype, model.device)

    def composed(g: torch.Generator, k: int) -> Tensor:
        x = noise(g)
        return model.push(x, 0.0, torch.zeros_like(x), k)

    out: dict[str, Callable[[torch.Generator], Tensor]] = {}
    for k in config.refine_steps:
        out[f"refine-{k}"] = lambda g, k=k: model.generate(n, k, g)  # type: ignore[misc]
    for k in config.compose_steps:
        out[f"compose-{k}"] = lambda g, k=k: composed(g, k)  # type: ignore[misc]
    sources = {"ode": model.drift, **({} if stage.drift is None else {"drift-ode": stage.drift})}
    for name, drift in sources.items():
        for k in config.ode_steps:
            out[f"{name}-{k}"] = lambda g, k=k, drift=drift: integrate(drift, noise(g), uniform_grid(k))  # type: ignore[misc]
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
