r"""How close are a model's posterior draws to the exact posterior?

For contexts drawn from the law (x_1 ~ p_1, then x_t) by a fixed seed, and sample sets of size n,

    relative SW2 = √ mean over contexts of E[SW2²] / v,   v: the exact posterior's variance, averaged over coordinates

``E[SW2²]`` is a mean over all pairs of a model's set and an exact set (:mod:`metaflowmaps.metrics.sliced_w2`), the
**floor** the same between two exact sets on the same contexts. A ratio of 1 is indistinguishable from exact.
``spread`` is an upper estimate of the standard error of the ratio of two exact samplers, each judged with as many
sets as the model, from the scatter between groups of sets (groups scatter by 1.3 to 2 times more than the whole).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps.cost import Meter
from metaflowmaps.errors import InputError
from metaflowmaps.lab.evaluate.draws import DrawsConfig, posteriors, spread_of, steps_of
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.metrics.finite import root
from metaflowmaps.metrics.sliced_w2 import Curves, curves, directions
from metaflowmaps.random import randn, stream
from metaflowmaps.work.progress import counted

TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)
GROUPS = 4
ONE_STEP = "map-1"  # judged with care: all sets, all contexts; of a wrapped network GLASS in most steps is


class PosteriorEvalConfig(DrawsConfig):
    """What to measure, and how finely."""

    one_step_leads: ClassVar[bool] = True

    samples: int = Field(8192, ge=2)
    contexts: int = Field(32, ge=1)
    sets: int = Field(0, ge=0)  # sets a context for one map step and the floor; 0: 262,144 samples a context, >= 4
    other_sets: int = Field(1, ge=1)  # sets a context for the other samplers
    other_contexts: int = Field(8, ge=1)  # the first of the contexts, for the other samplers
    times: tuple[float, ...] = Field(TIMES, min_length=1)
    glass_method: str = "euler"
    glass_spacing: Literal["uniform", "angle"] = "uniform"
    batch_size: int = Field(16384, ge=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _floor_exists(self) -> "PosteriorEvalConfig":
        if self.sets == 1:
            raise ValueError("sets must be at least 2 (a floor compares two exact sets), or 0 for the default")
        return self

    @property
    def num_sets(self) -> int:
        """Sets a context for one map step and the floor."""
        return self.sets or max(4, 262_144 // self.samples)


@dataclass(frozen=True)
class TimeResult:
    """Relative SW2 at one t: one map step (else what leads) on all contexts, every sampler on the first."""

    floor: float
    one_step: float
    spread: float | None  # None: too few sets to tell
    by_sampler: dict[str, float]
    floor_of_others: float


@dataclass(frozen=True)
class PosteriorResult:
    """Everything the evaluation measured."""

    at: dict[str, TimeResult]  # by time
    calls: dict[str, float]  # network evaluations a draw, by sampler
    seconds: dict[str, float]  # by sampler, all sets

    def metrics(self) -> dict[str, object]:
        """As results.json holds them; times are the keys."""
        samplers = next(iter(self.at.values())).by_sampler
        return {
            "relative_sw2": {t: r.one_step for t, r in self.at.items()},
            "floor": {t: r.floor for t, r in self.at.items()},
            "ratio": {t: r.one_step / r.floor for t, r in self.at.items()},
            "spread": {t: r.spread for t, r in self.at.items()},
            "by_sampler": {name: {t: r.by_sampler[name] for t, r in self.at.items()} for name in samplers},
            "floor_of_others": {t: r.floor_of_others for t, r in self.at.items()},
            "network_calls_per_draw": self.calls,
            "glass_calls_to_match_one_map_step": {t: glass_calls_to_match(r) for t, r in self.at.items()},
        }


@torch.no_grad()
def evaluate_posterior(
    model: Any,
    law: GaussianMixture,
    config: PosteriorEvalConfig,
    report: Callable[[str], None] = lambda line: None,
) -> PosteriorResult:
    """Judge one map step with care (all sets, all contexts) and the other samplers on fewer."""
    if model.event_shape != (law.dim,):
        raise InputError(f"the model draws samples of shape {model.event_shape}, the law lives in {law.dim} dimensions")
    measurement, at = _Measurement(model, law, config), {}
    for t in counted(config.times, report, "times"):
        report(f"t = {t:g}")
        at[_key(t)] = measurement.at(t)
    meters, drawn = measurement.meters, measurement.drawn
    calls = {name: meter.forwards / drawn[name] for name, meter in meters.items()}
    return PosteriorResult(at, calls, {name: meter.seconds for name, meter in meters.items()})


def glass_calls_to_match(result: TimeResult) -> int | None:
    """The fewest GLASS calls, of those measured, that do at least as well as one map step; None if none does."""
    errors = result.by_sampler
    if ONE_STEP not in errors:
        return None
    matching = [name for name in errors if name.startswith("glass-") and errors[name] <= errors[ONE_STEP]]
    return min(map(steps_of, matching), default=None)


# -- internals -----------------------------------------------------------------------------------------


def _key(t: float) -> str:
    return repr(float(t))


class _Exact(NamedTuple):
    """Exact sets at one context: the curves of all, the variance, and relative floors of all and of groups."""

    curves: Curves
    variance: float
    floor: float
    floors_of_groups: list[float]


class _Measurement:
    """An evaluation under way: who draws, how much was drawn, and what it cost."""

    def __init__(self, model: Any, law: GaussianMixture, config: PosteriorEvalConfig) -> None:
        self.model, self.law, self.config = model, law, config
        data_std = spread_of(model, config.glass_spacing)
        self.samplers = posteriors(model, config, config.glass_method, data_std)
        self.lead = ONE_STEP if ONE_STEP in self.samplers else max(self.samplers, key=steps_of)
        self.meters = {name: Meter(model.network) for name in self.samplers}
        self.drawn = dict.fromkeys(self.samplers, 0)
        self.along = directions(law.dim)

    def at(self, t: float) -> TimeResult:
        """Every sampler at time t."""
        config, g = self.config, stream(self.config.seed, "eval-posterior", _key(t))
        x_1 = self.law.sample(config.contexts, g)
        contexts = self.model.path.interpolate(randn(tuple(x_1.shape), g), x_1, t)
        variances = self.law.posterior(self.model.path, t, contexts).variance.mean(-1).tolist()
        exacts: list[_Exact] = []
        errors: dict[str, list[float]] = {name: [] for name in self.samplers}
        for c, variance in enumerate(variances):
            x = contexts[c : c + 1]
            exacts.append(self._exact(t, c, x, variance))
            for name in self.samplers if c < config.other_contexts else (self.lead,):
                errors[name].append(self._error(name, t, c, x, exacts[c]))
        few = slice(config.other_contexts)
        return TimeResult(
            floor=_root_mean([exact.floor for exact in exacts]),
            one_step=_root_mean(errors[self.lead]),
            spread=_ratio_spread([exact.floors_of_groups for exact in exacts]),
            by_sampler={name: _root_mean(values[few]) for name, values in errors.items()},
            floor_of_others=_root_mean([exact.floor for exact in exacts[few]]),
        )

    def _exact(self, t: float, context: int, x: Tensor, variance: float) -> _Exact:
        """Exact sets of the posterior at x (1, d)."""
        posterior, sets = self.law.posterior(self.model.path, t, x), self.config.num_sets
        whole, groups = Curves(), [Curves() for _ in range(min(GROUPS, sets // 2))]
        for m in range(sets):
            g = stream(self.config.seed, "exact", _key(t), context, m)
            sorted_set = curves(posterior.draw(self.config.samples, g)[:, 0], self.along)
            whole.add(sorted_set)
            groups[m % len(groups)].add(sorted_set)
        return _Exact(whole, variance, whole.floor() / variance, [group.floor() / variance for group in groups])

    def _error(self, name: str, t: float, context: int, x: Tensor, exact: _Exact) -> float:
        """Mean relative SW2² of a sampler's sets at x. The noise is drawn set by set: no batch size enters it."""
        config, model, found = self.config, self.model, Curves()
        x_t = x.to(model.device, model.dtype)
        for m in range(config.num_sets if name == self.lead else config.other_sets):
            g = stream(config.seed, "noise", _key(t), context, m)
            noise = randn((config.samples, *model.event_shape), g, model.dtype, model.device)
            push = self.samplers[name].push
            with self.meters[name]:
                draws = [push(part, t, x_t.expand_as(part)) for part in noise.split(config.batch_size)]
            found.add(curves(torch.cat(draws), self.along))
            self.drawn[name] += config.samples
        return found.squared_distance(exact.curves) / exact.variance


def _root_mean(values: list[float]) -> float:
    return root(sum(values) / len(values))


def _ratio_spread(groups: list[list[float]]) -> float | None:
    """Standard error of √(floor²/floor²) for two independent exact samplers, from the scatter between groups."""
    if len(groups[0]) < 2:
        return None
    by_group = torch.tensor(groups, dtype=torch.float64).mean(0)
    relative = float(by_group.std() / by_group.mean()) / math.sqrt(len(by_group))
    return relative / math.sqrt(2)  # ratio of two: ×√2; square root: ×½
