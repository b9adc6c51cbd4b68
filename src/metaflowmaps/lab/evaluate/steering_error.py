r"""How close are steered samples to the exact tilted law, and what did they cost?

For each method and number of draws, ``seeds`` runs of ``samples`` samples. Against exact samples of the tilted mixture:

    sw2      √ mean over seeds and exact sets of SW2²       its floor: the same between two exact sets of that size
    mmd      √ max(0, mean over the first seeds of the unbiased MMD²)
    mode_l1  Σ_k |f_k − p_k|: frequencies of the nearest mean of the tilted law, all seeds pooled, against the exact
             ones of that same rule; its floor: the mean of this for exact samples of the pooled size

The cost is that of all seeds, read off the meter. A cell that would cost more than ``budget`` evaluations a seed runs
on fewer samples, which the results state together with the floor for that size.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps.lab.evaluate.variants import Variant, variant
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.metrics.finite import root
from metaflowmaps.metrics.kernels import mmd_squared
from metaflowmaps.metrics.sliced_w2 import Curves, curves, directions
from metaflowmaps.posterior import ExactModel
from metaflowmaps.random import stream
from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.steering import ODE, SDE, Glass, Method, Process, SteerResult, steer
from metaflowmaps.work.choices import choices
from metaflowmaps.work.config import Config


def default_methods() -> tuple[str, ...]:
    """Every method, and as published each that the package adds something to."""
    names: list[str] = []
    for name, method in choices(Method).items():
        names += [name, f"{name}-plain"] if method.published else [name]
    return tuple(names)


class SteeringEvalConfig(Config):
    """What to steer, how often, and how far."""

    samples: int = Field(4096, ge=2)
    seeds: int = Field(2, ge=1)
    steps: int = Field(250, ge=1)
    process: Literal["ode", "sde"] = "ode"
    integrator: str = "euler"
    renormalize: str = "none"
    methods: tuple[str, ...] = Field(default_factory=default_methods, min_length=1)
    num_draws: tuple[int, ...] = Field((1, 4), min_length=1)
    reward: str = ""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)  # of a method or variant, beyond its defaults
    glass_steps: int = Field(4, ge=1)  # midpoint steps, equal in the chart's angle
    budget: float = Field(1e7, gt=0)  # evaluations a cell and seed
    mmd_seeds: int = Field(1, ge=0)
    seed: int = Field(0, ge=0)

    def on(self) -> Process:
        """The process of methods that leave the choice."""
        moves = ODE if self.process == "ode" else SDE
        return moves(steps=self.steps, integrator=self.integrator, renormalize=self.renormalize)  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _possible(self) -> "SteeringEvalConfig":
        for name in self.methods:
            variant(name)
        if min(self.num_draws, default=1) < 1:
            raise ValueError("num_draws must be at least 1")
        return self


@dataclass
class ExactJudge:
    """The exact law and everything known about samples of it."""

    law: GaussianMixture
    reward: LinearGaussian
    seed: int = 0

    EXACT_SETS = 16
    REFERENCE = 2**20

    def __post_init__(self) -> None:
        self.tilted = self.law.tilt(self.reward)
        self.along = directions(self.law.dim)
        reference = self.tilted.sample(self.REFERENCE, stream(self.seed, "reference"))
        self.probabilities = self.frequencies(reference)
        self.exact_reward = float(self.reward(reference).mean())
        self._exact: dict[int, Curves] = {}

    def frequencies(self, x: Tensor) -> Tensor:
        """Shares of the samples nearest to each mean of the tilted law; what is not finite is near none of them."""
        means, kept = self.tilted.means, x[x.isfinite().all(1)]
        nearest = torch.cat([torch.cdist(part.double(), means).argmin(1) for part in kept.split(2**16)])
        return torch.bincount(nearest, minlength=len(means)).double() / len(x)

    def exact(self, n: int) -> Curves:
        """Sets of n exact samples."""
        if n not in self._exact:
            self._exact[n] = Curves()
            for i in range(self.EXACT_SETS):
                self._exact[n].add(curves(self.tilted.sample(n, stream(self.seed, "exact", n, i)), self.along))
        return self._exact[n]

    def floor_sw2(self, n: int) -> float:
        """√ mean SW2² between two exact sets of n samples."""
        return root(self.exact(n).floor())

    def floor_mode_l1(self, n: int) -> float:
        """Mean of the mode-weight L1 of n exact samples, over 64 sets."""
        g = stream(self.seed, "multinomial", n)
        total = 0.0
        for _ in range(64):
            drawn = torch.multinomial(self.probabilities, n, replacement=True, generator=g)
            shares = torch.bincount(drawn, minlength=len(self.probabilities)).double() / n
            total += float((shares - self.probabilities).abs().sum())
        return total / 64


FAR = 1e6  # coordinates beyond it count as it


def within_reach(x: Tensor) -> Tensor:
    """x with every coordinate at most FAR from 0; of what is not finite, all are: left out, it would be no error."""
    lost = ~x.isfinite().all(1, keepdim=True)
    return x.clamp(-FAR, FAR).masked_fill(lost, FAR)


Report = Callable[[str], None]


def evaluate_steering(
    model: Any,
    law: GaussianMixture,
    reward: LinearGaussian,
    config: SteeringEvalConfig,
    report: Report = lambda line: None,
    data_std: float | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """metrics as results.json holds them, and each cell's first samples ("method.num_draws")."""
    planned = list(cells(config, data_std))  # an option that does not exist is refused before the first hour, not after
    judge = ExactJudge(law, reward, config.seed)
    methods: dict[str, dict[str, Any]] = {}
    pictures: dict[str, Tensor] = {}
    for cell_of in planned:
        cell, samples = _cell(model, judge, config, cell_of)
        name, key = cell_of.name, str(cell_of.method.shown_draws)
        methods.setdefault(name, {})[key] = cell
        pictures[f"{name}.{key}"] = samples
        report(
            f"{name} N = {key}: {cell['sw2'] / cell['floor_sw2']:.2f} × floor, mode L1 {cell['mode_l1']:.3f}, "
            f"{cell['cost']['nfe']:,.0f} NFE a sample, {cell['cost']['seconds']:.1f} s"
        )
    pooled = config.samples * config.seeds
    metrics = {
        "methods": methods,
        "floor": {"sw2": judge.floor_sw2(config.samples), "mode_l1": judge.floor_mode_l1(pooled)},
        "mode_weights": judge.probabilities.tolist(),
        "exact_reward": judge.exact_reward,
        "log_evidence": float(law.log_evidence(reward)),
    }
    return metrics, pictures


def cells(config: SteeringEvalConfig, data_std: float | None = None) -> Iterator[Variant]:
    """Each method with each number of draws; once where it does not draw, or its name says how often."""
    for name in config.methods:
        v = variant(name)
        options = {**config.options.get(v.method.name, {}), **config.options.get(name, {})}
        if isinstance(v.method, Glass):
            spacing = {"glass_steps": config.glass_steps, "glass_integrator": "midpoint", "data_std": data_std}
            options = {**spacing, **options}
        v = v.using(**options)
        said = any(word.isdecimal() for word in name.split("-"))
        for n in config.num_draws if v.method.draws and not said else (0,):
            yield v._replace(method=v.method.with_draws(n)) if n else v


def _cell(model: Any, judge: ExactJudge, config: SteeringEvalConfig, cell: Variant) -> tuple[dict[str, Any], Tensor]:
    base = ExactModel(model.path, judge.law) if cell.method.exact else model
    samples = _affordable(config, cell.method)
    process = cell.process(config.on())
    runs, said = [], set()
    for seed in range(config.seeds):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generator = stream(config.seed, "steer", seed)
            run = steer(base, judge.reward, samples, cell.method, process, seed=generator)
        if run.interrupted:
            raise KeyboardInterrupt
        runs.append(run)
        said |= {str(w.message) for w in caught}
    title = {"process": cell.method.moved_by or process.name, "title": cell.title}
    return {**_judged(judge, config, runs, samples, sorted(said)), **title}, runs[0].samples.cpu()


def _affordable(config: SteeringEvalConfig, method: Method) -> int:
    """As many samples as the budget pays for, by the paper's counts; whole systems of particles."""
    affordable = min(config.samples, max(64, int(config.budget / (method.calls_per_step * config.steps))))
    unit = method.system
    return affordable if unit is None else max(unit, affordable // unit * unit)


def _judged(
    judge: ExactJudge, config: SteeringEvalConfig, runs: list[SteerResult], samples: int, said: list[str]
) -> dict[str, Any]:
    mine, pooled, lost, mmd = Curves(), [], 0, []
    for i, run in enumerate(runs):
        lost += int((~run.samples.isfinite().all(1)).sum())
        x = within_reach(run.samples.cpu())
        mine.add(curves(x, judge.along))
        pooled.append(x)
        if i < config.mmd_seeds:
            mmd.append(mmd_squared(x, judge.tilted.sample(samples, stream(judge.seed, "mmd", i)).to(x)))
    everything = torch.cat(pooled)
    frequencies = judge.frequencies(torch.cat([run.samples.cpu() for run in runs]))
    rewards = judge.reward(everything.double())
    cost = {k: sum(run.cost[k] for run in runs) for k in runs[0].cost if k not in ("nfe", "peak_memory_bytes")}
    cost["nfe"] = sum(run.cost["nfe"] for run in runs) / len(runs)
    cost["peak_memory_bytes"] = max(run.cost["peak_memory_bytes"] for run in runs)
    return {
        "sw2": root(mine.squared_distance(judge.exact(samples))),
        "floor_sw2": judge.floor_sw2(samples),
        "mmd": root(sum(mmd) / len(mmd)) if mmd else None,
        "mode_l1": float((frequencies - judge.probabilities).abs().sum()),
        "floor_mode_l1": judge.floor_mode_l1(samples * len(runs)),
        "mode_frequencies": frequencies.tolist(),
        "reward": float(rewards.mean()),
        "cost": cost,
        "steps": config.steps,
        "samples": samples,
        "seeds": len(runs),
        "nonfinite": lost,
        "warnings": said,
        "trajectory": _trajectory(runs),
    }


def _trajectory(runs: list[SteerResult]) -> dict[str, list[float]]:
    """ESS and gradient norm along the way, mean over seeds, at no more than 50 times."""
    kept: dict[str, list[float]] = {}
    for name in ("time", "ess", "gradient_norm", "particle_ess"):
        if name in runs[0].info:
            mean = torch.stack([run.info[name] for run in runs]).double().mean(0)
            kept[name] = mean[:: max(1, len(mean) // 50)].tolist()
    return kept
