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
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.rows import Json
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
from metaflowmaps.work.progress import counted


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


@dataclass(frozen=True)
class LawDistance:
    """How far sets of samples are from a law, and what exact sets of that size are by chance."""

    sw2: float
    floor_sw2: float
    mode_l1: float
    floor_mode_l1: float
    mode_frequencies: list[float]
    reward: float
    nonfinite: int


@dataclass
class ExactJudge:
    """The exact law and everything known about samples of it."""

    law: GaussianMixture
    reward: LinearGaussian
    seed: int = 0

    EXACT_SETS = 16
    REFERENCE = 2**20
    FREQUENCIES = 64  # sets that the floor of mode weights is a mean over

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
        """Mean of the mode-weight L1 of n exact samples."""
        g = stream(self.seed, "multinomial", n)
        total = 0.0
        for _ in range(self.FREQUENCIES):
            drawn = torch.multinomial(self.probabilities, n, replacement=True, generator=g)
            shares = torch.bincount(drawn, minlength=len(self.probabilities)).double() / n
            total += float((shares - self.probabilities).abs().sum())
        return total / self.FREQUENCIES

    def distance(self, sets: list[Tensor]) -> LawDistance:
        """Of sets of n samples each, (n, d) on the CPU.

        What is not finite counts as far away, and belongs to no mode: left out, it would flatter the method.
        """
        n, mine, whole = len(sets[0]), Curves(), torch.cat(sets)
        for x in sets:
            mine.add(curves(within_reach(x), self.along))
        frequencies = self.frequencies(whole)
        return LawDistance(
            sw2=root(mine.squared_distance(self.exact(n))),
            floor_sw2=self.floor_sw2(n),
            mode_l1=float((frequencies - self.probabilities).abs().sum()),
            floor_mode_l1=self.floor_mode_l1(len(whole)),
            mode_frequencies=frequencies.tolist(),
            reward=float(self.reward(within_reach(whole).double()).mean()),
            nonfinite=int((~whole.isfinite().all(1)).sum()),
        )


FAR = 1e6  # coordinates beyond it count as it


def within_reach(x: Tensor) -> Tensor:
    """x with every coordinate at most FAR from 0; of what is not finite, all are: left out, it would be no error."""
    lost = ~x.isfinite().all(1, keepdim=True)
    return x.clamp(-FAR, FAR).masked_fill(lost, FAR)


@dataclass(frozen=True)
class SteeredCell:
    """One method with one number of draws: how far from the law, at what cost, on which process."""

    name: str
    num_draws: int
    title: str
    process: str
    steps: int
    samples: int
    seeds: int
    distance: LawDistance
    mmd: float | None
    cost: dict[str, float]
    warnings: list[str]
    trajectory: dict[str, list[float]]
    shown: Tensor  # the samples of the first seed

    def to_json(self) -> dict[str, object]:
        """As results.json holds it, by method and number of draws."""
        own = {key: value for key, value in vars(self).items() if key not in ("name", "num_draws", "distance", "shown")}
        return {**asdict(self.distance), **own}

    def line(self) -> str:
        """As the progress says it."""
        near = self.distance
        return (
            f"{self.name} N = {self.num_draws}: {near.sw2 / near.floor_sw2:.2f} × floor, mode L1 {near.mode_l1:.3f}, "
            f"{self.cost['nfe']:,.0f} NFE a sample, {self.cost['seconds']:.1f} s"
        )


def evaluate_steering(
    model: MetaFlowMap | ExactModel,
    law: GaussianMixture,
    reward: LinearGaussian,
    config: SteeringEvalConfig,
    report: Callable[[str], None] = lambda line: None,
    data_std: float | None = None,
) -> tuple[Json, dict[str, Tensor]]:
    """metrics as results.json holds them, and each cell's first samples ("method.num_draws")."""
    planned = list(cells(config, data_std))  # an option that does not exist is refused before the first hour, not after
    judge, found = ExactJudge(law, reward, config.seed), []
    for variant_of_cell in counted(planned, report, "methods", lambda cell: cell.method.calls_per_step):
        found.append(_cell(model, judge, config, variant_of_cell))
        report(found[-1].line())
    methods: dict[str, dict[str, dict[str, object]]] = {}
    for cell in found:
        methods.setdefault(cell.name, {})[str(cell.num_draws)] = cell.to_json()
    pooled = config.samples * config.seeds
    metrics = {
        "methods": methods,
        "floor": {"sw2": judge.floor_sw2(config.samples), "mode_l1": judge.floor_mode_l1(pooled)},
        "mode_weights": judge.probabilities.tolist(),
        "exact_reward": judge.exact_reward,
        "log_evidence": float(law.log_evidence(reward)),
    }
    return metrics, {f"{cell.name}.{cell.num_draws}": cell.shown for cell in found}


def cells(config: SteeringEvalConfig, data_std: float | None = None) -> Iterator[Variant]:
    """Each method with each number of draws; once where it does not draw, or its name says how often."""
    for name in config.methods:
        v = variant(name)
        options = {**config.options.get(v.method.name, {}), **config.options.get(name, {})}
        if isinstance(v.method, Glass):
            spacing = {"glass_steps": config.glass_steps, "glass_integrator": "midpoint"}
            if data_std is not None:
                spacing["data_std"] = data_std
            options = {**spacing, **options}
        v = v.using(options)
        said = any(word.isdecimal() for word in name.split("-"))
        for n in config.num_draws if v.method.draws and not said else (0,):
            yield replace(v, method=v.method.with_draws(n)) if n else v


def _cell(model: MetaFlowMap | ExactModel, judge: ExactJudge, config: SteeringEvalConfig, cell: Variant) -> SteeredCell:
    base = ExactModel(model.path, judge.law) if cell.method.exact else model
    samples, process, runs = _affordable(config, cell.method), cell.process(config.on()), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(config.seeds):
            generator = stream(config.seed, "steer", seed)
            runs.append(steer(base, judge.reward, samples, cell.method, process, seed=generator))
            if runs[-1].interrupted:
                raise KeyboardInterrupt
    sets = [run.samples.cpu() for run in runs]
    return SteeredCell(
        name=cell.name,
        num_draws=cell.method.shown_draws,
        title=cell.title,
        process=cell.method.moved_by or process.name,
        steps=config.steps,
        samples=samples,
        seeds=len(runs),
        distance=judge.distance(sets),
        mmd=_mmd(judge, sets[: config.mmd_seeds]),
        cost=_cost(runs),
        warnings=sorted({str(w.message) for w in caught}),
        trajectory=_trajectory(runs),
        shown=sets[0],
    )


def _affordable(config: SteeringEvalConfig, method: Method) -> int:
    """As many samples as the budget pays for, by the paper's counts; whole systems of particles."""
    affordable = min(config.samples, max(64, int(config.budget / (method.calls_per_step * config.steps))))
    unit = method.system
    return affordable if unit is None else max(unit, affordable // unit * unit)


def _mmd(judge: ExactJudge, sets: list[Tensor]) -> float | None:
    """√ mean MMD² to exact sets of that size; None for no sets."""
    exact = [judge.tilted.sample(len(x), stream(judge.seed, "mmd", i)).to(x) for i, x in enumerate(sets)]
    squares = [mmd_squared(within_reach(x), y) for x, y in zip(sets, exact, strict=True)]
    return root(sum(squares) / len(squares)) if squares else None


def _cost(runs: list[SteerResult]) -> dict[str, float]:
    """Of all seeds together; NFE is per sample, memory the highest."""
    cost = {key: sum(run.cost[key] for run in runs) for key in runs[0].cost}
    peak = max(run.cost["peak_memory_bytes"] for run in runs)
    return {**cost, "nfe": cost["nfe"] / len(runs), "peak_memory_bytes": peak}


def _trajectory(runs: list[SteerResult]) -> dict[str, list[float]]:
    """ESS and gradient norm along the way, mean over seeds, at no more than 50 times."""
    kept: dict[str, list[float]] = {}
    for name in ("time", "ess", "gradient_norm", "particle_ess"):
        if name in runs[0].info:
            mean = torch.stack([run.info[name] for run in runs]).double().mean(0)
            kept[name] = mean[:: max(1, len(mean) // 50)].tolist()
    return kept
