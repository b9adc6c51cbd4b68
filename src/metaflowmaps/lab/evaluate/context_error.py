r"""How close are a map's draws to the exact posterior given several observations?

As :mod:`metaflowmaps.lab.evaluate.posterior_error`, by the number of observations and not by the time of a state:

    relative SW2 = √ mean over contexts of E[SW2²] / v,   v: the exact posterior's variance

and its **floor**, the same between two exact sets on the same contexts. Contexts are drawn from the process by a fixed
seed, at places where the map was trained.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field

from metaflowmaps.cost import Meter
from metaflowmaps.data import Process
from metaflowmaps.data.paths import ContextLaw, Paths
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.metrics.finite import root
from metaflowmaps.metrics.sliced_w2 import Curves, curves, directions
from metaflowmaps.random import stream
from metaflowmaps.work.config import Config
from metaflowmaps.work.progress import counted


class ContextEvalConfig(Config):
    """What to measure, and how finely."""

    samples: int = Field(4096, ge=2)
    contexts: int = Field(32, ge=1)  # for each number of observations
    sets: int = Field(4, ge=2)  # for each context
    map_steps: tuple[int, ...] = Field((1, 2, 4), min_length=1)
    seed: int = Field(0, ge=0)


@torch.no_grad()
def evaluate_contexts(
    model: MetaFlowMap,
    source: Process,
    config: ContextEvalConfig,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Relative SW2, floor and their ratio by number of observations and by steps of the map; calls and seconds."""
    law, held = source.exact(), source.held_out()
    counts = range(source.contexts.least, source.contexts.most + 1)
    ratio: dict[str, dict[str, float]] = {f"map-{k}": {} for k in config.map_steps}
    error: dict[str, dict[str, float]] = {name: {} for name in ratio}
    floors: dict[str, float] = {}
    meters = {name: Meter(model.network) for name in ratio}
    for count in counted(counts, report, "numbers of observations"):
        report(f"{count} observations")
        given = ContextLaw(**{**source.contexts.model_dump(), "least": count, "most": max(count, 1)})
        paths = Paths(held.values, held.times, given)
        context = paths.sample_given(config.contexts, stream(config.seed, "contexts", count)).context
        posterior = law.given(context)
        variances = posterior.variance.mean(1)
        exact = [Curves() for _ in variances]
        found = {name: [Curves() for _ in variances] for name in ratio}
        along = directions(model.event_shape[0])
        for number in range(config.sets):
            drawn = posterior.draw(config.samples, stream(config.seed, "exact", count, number))
            _add(exact, drawn.float(), along)
            for steps, (name, meter) in zip(config.map_steps, meters.items(), strict=True):
                g = stream(config.seed, "noise", count, number)
                with meter:
                    draws = model.draw(context, config.samples, steps=steps, generator=g)
                _add(found[name], draws, along)
        floor = [curve.floor() / float(v) for curve, v in zip(exact, variances, strict=True)]
        floors[str(count)] = root(sum(floor) / len(floor))
        for name, curves_of in found.items():
            far = [c.squared_distance(e) / float(v) for c, e, v in zip(curves_of, exact, variances, strict=True)]
            error[name][str(count)] = root(sum(far) / len(far))
            ratio[name][str(count)] = error[name][str(count)] / floors[str(count)]
    return {
        "relative_sw2": error["map-1"] if "map-1" in error else next(iter(error.values())),
        "floor": floors,
        "by_sampler": error,
        "ratio": ratio,
        "cost": {"seconds_by_sampler": {name: meter.seconds for name, meter in meters.items()}},
    }


def _add(sets: list[Curves], draws: torch.Tensor, along: torch.Tensor) -> None:
    for row, curve in enumerate(sets):
        curve.add(curves(draws[:, row], along))
