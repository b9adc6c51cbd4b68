r"""How close are a model's posterior draws to the exact posterior?

For contexts drawn from the law (x_1 ~ p_1, then x_t) by a fixed seed, and sample sets of size n,

    relative SW2 = √ mean over contexts of E[SW2²] / v,   v: the exact posterior's variance, averaged over coordinates

``E[SW2²]`` is a mean over all pairs of a model's set and an exact set (:mod:`metaflowmaps.metrics.sliced_w2`), the
**floor** the same between two exact sets on the same contexts. A ratio of 1 is indistinguishable from exact.
``spread`` is an upper estimate of the standard error of the ratio of two exact samplers, each judged with as many
sets as the model, from the scatter between groups of sets (groups scatter by 1.3 to 2 times more than the whole).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps._shapes import batch_time
from metaflowmaps.cost import Meter
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.metrics.finite import root
from metaflowmaps.metrics.sliced_w2 import Curves, curves, directions
from metaflowmaps.posterior import GlassPosterior
from metaflowmaps.random import randn, stream
from metaflowmaps.work.config import Config

TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)
GROUPS = 4


class PosteriorEvalConfig(Config):
    """What to measure, and how finely."""

    samples: int = Field(8192, ge=2)
    contexts: int = Field(32, ge=1)
    sets: int = Field(0, ge=0)  # sets a context for one map step and the floor; 0: 262,144 samples a context, >= 4
    other_sets: int = Field(1, ge=1)  # sets a context for the other samplers
    other_contexts: int = Field(8, ge=1)  # the first of the contexts, for the other samplers
    times: tuple[float, ...] = TIMES
    map_steps: tuple[int, ...] = (1, 2, 4)
    glass_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    glass_method: str = "euler"
    glass_spacing: Literal["uniform", "angle"] = "uniform"
    batch_size: int = Field(16384, ge=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _possible(self) -> "PosteriorEvalConfig":
        if self.sets == 1:
            raise ValueError("sets must be at least 2 (a floor compares two exact sets), or 0 for the default")
        if any(not 0 <= t < 1 for t in self.times):
            raise ValueError("times must lie in [0, 1): at t = 1 the posterior is a point")
        if 1 not in self.map_steps or min((*self.map_steps, *self.glass_steps), default=1) < 1:
            raise ValueError("steps must be at least 1, and map_steps must contain 1")
        return self

    @property
    def num_sets(self) -> int:
        """Sets a context for one map step and the floor."""
        return self.sets or max(4, 262_144 // self.samples)


@dataclass
class TimeResult:
    """Relative SW2 at one t: one map step and the floor on all contexts; every sampler, with a floor, on the first."""

    t: float
    floor: float
    one_step: float
    spread: float | None  # None: too few sets to tell
    by_sampler: dict[str, float]
    floor_of_others: float


@dataclass
class PosteriorResult:
    """Everything the evaluation measured."""

    at: list[TimeResult]
    calls: dict[str, float] = field(default_factory=dict)  # network evaluations a draw, by sampler
    seconds: dict[str, float] = field(default_factory=dict)  # seconds by sampler, all sets
    floor_ratio: dict[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, object]:
        """As results.json holds them; times are the keys."""
        one = {_key(r.t): r.one_step for r in self.at}
        floor = {_key(r.t): r.floor for r in self.at}
        return {
            "relative_sw2": one,
            "floor": floor,
            "ratio": {t: one[t] / floor[t] for t in one},
            "spread": {_key(r.t): r.spread for r in self.at},
            "by_sampler": {name: {_key(r.t): r.by_sampler[name] for r in self.at} for name in self.at[0].by_sampler},
            "floor_of_others": {_key(r.t): r.floor_of_others for r in self.at},
            "network_calls_per_draw": self.calls,
            "glass_calls_to_match_one_map_step": {_key(r.t): glass_calls_to_match(r) for r in self.at},
        }


def evaluate_posterior(
    model: MetaFlowMap,
    law: GaussianMixture,
    config: PosteriorEvalConfig,
    report: Callable[[str], None] = lambda line: None,
) -> PosteriorResult:
    """Judge one map step with care (all sets, all contexts) and the other samplers on fewer."""
    if model.event_shape != (law.dim,):
        raise InputError(f"the model draws samples of shape {model.event_shape}, the law lives in {law.dim} dimensions")
    samplers = _samplers(model, config)
    result = PosteriorResult([], dict.fromkeys(samplers, 0.0), dict.fromkeys(samplers, 0.0))
    drawn = dict.fromkeys(samplers, 0)
    for t in config.times:
        report(f"t = {t:g}")
        result.at.append(_at_time(model, law, config, t, samplers, result, drawn))
    for name in samplers:
        result.calls[name] /= drawn[name]
    return result


def glass_calls_to_match(result: TimeResult) -> int | None:
    """The fewest GLASS calls, of those measured, that do at least as well as one map step; None if none does."""
    target = result.by_sampler["map-1"]
    matching = [
        int(name.removeprefix("glass-"))
        for name, value in result.by_sampler.items()
        if name.startswith("glass-") and value <= target
    ]
    return min(matching, default=None)


# -- internals -----------------------------------------------------------------------------------------

Push = Callable[[Tensor, float, Tensor], Tensor]


def _key(t: float) -> str:
    return repr(float(t))


def _samplers(model: MetaFlowMap, config: PosteriorEvalConfig) -> dict[str, Push]:
    """Name -> noise (n, *event), t, contexts (n, *event) -> draws."""
    samplers: dict[str, Push] = {}
    for k in config.map_steps:
        samplers[f"map-{k}"] = lambda noise, t, x, k=k: model.push(noise, t, x, k)  # type: ignore[misc]
    for k in config.glass_steps:
        data_std = model.data_std if config.glass_spacing == "angle" else None
        glass = GlassPosterior(model.path, model.drift, k, config.glass_method, data_std)
        samplers[f"glass-{k}"] = lambda noise, t, x, glass=glass: glass.push(  # type: ignore[misc]
            noise, batch_time(t, noise), x
        )
    return samplers


@torch.no_grad()
def _at_time(
    model: MetaFlowMap,
    law: GaussianMixture,
    config: PosteriorEvalConfig,
    t: float,
    samplers: dict[str, Push],
    result: PosteriorResult,
    drawn: dict[str, int],
) -> TimeResult:
    key, along = _key(t), directions(law.dim)
    g = stream(config.seed, "eval-posterior", key)
    x_1 = law.sample(config.contexts, g)
    contexts = model.path.interpolate(randn(tuple(x_1.shape), g), x_1, t)
    posterior = law.posterior(model.path, t, contexts)
    variances = posterior.variance.mean(-1)
    floors: list[float] = []
    groups: list[list[float]] = []
    errors: dict[str, list[float]] = {name: [] for name in samplers}
    for c in range(config.contexts):
        x = contexts[c : c + 1]
        own = law.posterior(model.path, t, x)
        exact, parts = Curves(), [Curves() for _ in range(min(GROUPS, config.num_sets // 2))]
        for m in range(config.num_sets):
            sample = own.draw(config.samples, stream(config.seed, "exact", key, c, m))[:, 0]
            sorted_set = curves(sample, along)
            exact.add(sorted_set)
            parts[m % len(parts)].add(sorted_set)
        v = float(variances[c])
        floors.append(exact.floor() / v)
        groups.append([part.floor() / v for part in parts])
        for name, push in samplers.items():
            if name != "map-1" and c >= config.other_contexts:
                continue
            sets = config.num_sets if name == "map-1" else config.other_sets
            own_curves = Curves()
            for sample in _sets(model, push, config, t, x, c, sets, name, result):
                own_curves.add(curves(sample, along))
                drawn[name] += len(sample)
            errors[name].append(own_curves.squared_distance(exact) / v)
    return TimeResult(
        t=t,
        floor=_root_mean(floors),
        spread=_ratio_spread(groups),
        one_step=_root_mean(errors["map-1"]),
        by_sampler={name: _root_mean(values[: config.other_contexts]) for name, values in errors.items()},
        floor_of_others=_root_mean(floors[: config.other_contexts]),
    )


def _sets(
    model: MetaFlowMap,
    push: Push,
    config: PosteriorEvalConfig,
    t: float,
    x: Tensor,
    context: int,
    sets: int,
    name: str,
    result: PosteriorResult,
) -> Iterator[Tensor]:
    """Sets of a sampler's draws for one context. The noise is drawn set by set: no batch size enters it."""
    for m in range(sets):
        g = stream(config.seed, "noise", _key(t), context, m)
        noise = randn((config.samples, *model.event_shape), g, model.dtype, model.device)
        x_t = x.to(model.device, model.dtype)
        with Meter(model.network) as meter:
            draws = torch.cat([push(part, t, x_t.expand_as(part)) for part in noise.split(config.batch_size)])
        result.calls[name] += meter.forwards
        result.seconds[name] += meter.seconds
        yield draws


def _root_mean(values: list[float]) -> float:
    return root(sum(values) / len(values))


def _ratio_spread(groups: list[list[float]]) -> float | None:
    """Standard error of √(floor²/floor²) for two independent exact samplers, from the scatter between groups."""
    if len(groups[0]) < 2:
        return None
    by_group = torch.tensor(groups, dtype=torch.float64).mean(0)
    relative = float(by_group.std() / by_group.mean()) / math.sqrt(len(by_group))
    return relative / math.sqrt(2)  # ratio of two: ×√2; square root: ×½
