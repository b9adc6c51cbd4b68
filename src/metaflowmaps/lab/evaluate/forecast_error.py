r"""How good are forecasts of what a map of general contexts was not trained on?

Targets and contexts are drawn from the part of the data that was held out, as in training. The map draws each in one
call and in several, and by the ODE of its own drift in many (``ode-k``: flow matching with the same network).
Rivals that need no network: ``gaussian``, the Gaussian process with the data's mean and covariance (state-space models
and autoregressions are such processes), ``last``, the observation nearest in time as a point, and ``climate``, the law
of X_r without any observation. Of a process ``exact`` is its own posterior.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import expand_time, repeat_cond
from metaflowmaps.context import Context, beside, ordered
from metaflowmaps.cost import Meter
from metaflowmaps.data import ContextSource, Process
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.metrics.scores import coverage, crps, energy_score
from metaflowmaps.posterior import GlassPosterior
from metaflowmaps.random import randn, stream
from metaflowmaps.work.config import Config
from metaflowmaps.work.progress import counted


class ForecastEvalConfig(Config):
    """What to measure, and how finely."""

    samples: int = Field(128, ge=2)  # draws a forecast
    forecasts: int = Field(512, ge=1)
    map_steps: tuple[int, ...] = (1, 2, 4)
    ode_steps: tuple[int, ...] = (8, 32)
    seed: int = Field(0, ge=0)


@torch.no_grad()
def evaluate_forecasts(
    model: MetaFlowMap,
    source: ContextSource,
    config: ForecastEvalConfig,
    report: Callable[[str], None] = lambda line: None,
    rivals: "Mapping[str, Forecaster] | None" = None,
) -> dict[str, Any]:
    """CRPS, energy score, coverage, calls and seconds of each forecaster, and of ``rivals`` from outside."""
    truth, context = source.held_out().sample_given(config.forecasts, stream(config.seed, "forecasts"))
    forecasters = _forecasters(model, source, config) | dict(rivals or {})
    found: dict[str, dict[str, Any]] = {}
    for name, forecaster in counted(forecasters.items(), report, "forecasters"):
        report(name)
        with Meter(model.network) as meter:
            draws = forecaster(context, config.samples)
        scores = crps(draws, truth)
        found[name] = {
            "crps": float(scores.mean()),
            "crps_std_err": float(scores.std() / len(scores) ** 0.5),
            "energy": float(energy_score(draws, truth).mean()),
            **({"coverage": coverage(draws, truth)} if len(draws) > 1 else {}),
            "calls": meter.forwards / draws.shape[0] / draws.shape[1],
            "seconds": meter.seconds,
        }
    counts = context.mask.sum(1).double()
    return {"forecasts": found, "num_forecasts": len(truth), "mean_observations": float(counts.mean())}


def ode_draws(model: MetaFlowMap, context: Context, num_draws: int, steps: int, generator: torch.Generator) -> Tensor:
    """Draws by the ODE of a map's own drift given a context, ``steps`` calls each: (num_draws, B, *event).

    Args:
        model: a map of general contexts, or the drift that taught one.
        context: what was observed, and the time that is asked for.
        num_draws: of each row.
        steps: of the ODE.
        generator: of the noise.
    """
    encoded = dict(model.encode(model.conditions_of(context)) or {})
    spread = float(encoded["prior_std"].mean())  # the ODE's steps are equal in the angle of such a spread
    noise = randn((num_draws * len(context), *model.event_shape), generator, model.dtype)
    ode = GlassPosterior(model.path, model.drift, steps, data_std=max(spread, 1e-6))
    drawn = ode.push(noise, 0.0, torch.zeros_like(noise), repeat_cond(encoded, num_draws))
    return drawn.reshape(num_draws, -1, *model.event_shape)


Forecaster = Callable[[Context, int], Tensor]


def _forecasters(model: MetaFlowMap, source: ContextSource, config: ForecastEvalConfig) -> dict[str, Forecaster]:
    def of_map(steps: int) -> Forecaster:
        return lambda context, n: model.draw(context, n, steps=steps, generator=stream(config.seed, "noise"))

    def by_ode(steps: int) -> Forecaster:
        return lambda context, n: ode_draws(model, context, n, steps, stream(config.seed, "noise"))

    def gaussian(context: Context, n: int) -> Tensor:
        known = model.encode(context.conditions()) or {}
        mean, std = known["prior_mean"], known["prior_std"]
        return mean + expand_time(std, mean) * randn((n, *mean.shape), stream(config.seed, "gaussian"))

    def climate(context: Context, n: int) -> Tensor:
        empty = Context(context.values, context.times, torch.zeros_like(context.mask), context.query)
        return gaussian(empty, n)

    found = {f"map-{k}": of_map(k) for k in config.map_steps} | {f"ode-{k}": by_ode(k) for k in config.ode_steps}
    found |= {"gaussian": gaussian, "climate": climate}
    if getattr(model.network, "observed_shape", None) == model.event_shape:
        found["last"] = lambda context, n: _nearest(context, climate(context, 64).mean(0))[None]
    if isinstance(source, Process):
        law = source.exact()
        found["exact"] = lambda context, n: law.given(context).draw(n, stream(config.seed, "exact")).float()
    return found


def _nearest(context: Context, without: Tensor) -> Tensor:
    """The observation nearest in time to what is asked for; ``without``: where there is none."""
    seen, query = ordered(context.conditions(), 1), context.query
    assert query is not None, "contexts of data ask for a time"
    far = torch.where(seen.mask, (seen.times - query[:, None]).abs(), torch.inf)
    place = far.argmin(1)
    nearest = seen.values[torch.arange(len(place)), place]
    return torch.where(beside(seen.mask.any(1)[:, None], nearest[:, None])[:, 0], nearest, without)
