r"""How good are the samples of a tuned model, in one step and in many, and what do they cost?

Where the tilted law is known in closed form, by sliced W2 against exact samples and by mode weights, as in
:mod:`metaflowmaps.lab.evaluate.steering_error`; for images, by the rewards that were not trained on, by diversity, by
classes under a judge that no reward uses, and beside the base model throughout.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import Cond, select_cond
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.images.image_rewards import scored, scores_of
from metaflowmaps.lab.evaluate.images.setup import ImageSetup, TableRows, table
from metaflowmaps.lab.evaluate.steering_error import FAR, ExactJudge
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.metrics.diversity import mean_pairwise_distance, vendi_score
from metaflowmaps.metrics.frechet import frechet_distance
from metaflowmaps.metrics.image_by_image import class_distance
from metaflowmaps.random import randn, stream
from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.rewards.checked import checked_reward
from metaflowmaps.sampling import integrate, uniform_grid
from metaflowmaps.work.config import Config

PART = 1024  # rows at a time
COMPARED = 1024  # samples whose pairs are compared
POOL = 8192  # base samples that the tilted law of images is made of, by
BASE_SAMPLER = "ode-50"


class TunedEvalConfig(Config):
    """How a tuned model is judged at the end of its run."""

    samples: int = Field(4096, ge=64)
    seeds: int = Field(4, ge=1)
    ode_steps: int = Field(250, ge=1)


Conditions = Callable[[int, torch.Generator], dict[str, Tensor]]
Reward = Callable[..., Tensor]


class Drawn(NamedTuple):
    """Samples with the conditions that they were made under, {} for none."""

    x: Tensor
    cond: dict[str, Tensor]


@dataclass(frozen=True)
class Judgement:
    """What samples of one sampler, or a law, are worth; None for what the judge cannot tell.

    Args:
        reward: mean λr.
        others: means of rewards that were not trained on.
        sw2: sliced W2 to the tilted law, ``ratio`` over that of exact samples.
        mode_l1: of mode weights to the exact ones, ``floor_mode_l1`` of exact samples.
        class_frequencies: by the judge, with their distance to what is wanted, and what chance alone would give.
        distance: between samples, in the judge's features.
        vendi: the effective number of samples.
        frechet_to_target: to the base's samples, weighted by e^{λr}.
        frechet_to_data: to held-out images.
        lost: samples that are not finite.
        ess: of the weights that a law is made by.
    """

    reward: float | None = None
    others: dict[str, float] = field(default_factory=dict)
    sw2: float | None = None
    ratio: float | None = None
    mode_l1: float | None = None
    floor_mode_l1: float | None = None
    class_frequencies: list[float] | None = None
    class_l2: float | None = None
    chance: float | None = None
    distance: float | None = None
    vendi: float | None = None
    frechet_to_target: float | None = None
    frechet_to_data: float | None = None
    lost: int | None = None
    ess: float | None = None

    def to_json(self) -> dict[str, object]:
        """What is known, as results.json holds it."""
        others = {f"reward_{name}": value for name, value in self.others.items()}
        figures = {"reward": self.reward, **others, **asdict(self), "others": None}
        return {key: value for key, value in figures.items() if value is not None}


class SampleJudge(Protocol):
    """What samples of one sampler, a set a seed, are worth."""

    def __call__(self, sets: list[Drawn]) -> Judgement: ...

    def target(self, base: MetaFlowMap, seed: int, conditions: Conditions) -> Judgement | None:
        """The same figures for the law that is asked for, as far as it is known."""
        ...


class MixtureJudge:
    """Against exact samples of the tilted mixture."""

    def __init__(self, law: GaussianMixture, reward: LinearGaussian, seed: int = 0) -> None:
        self.exact = ExactJudge(law, reward, seed)

    def __call__(self, sets: list[Drawn]) -> Judgement:
        sets_of_samples = [x.cpu() for x, _ in sets]
        found, few = self.exact.distance(sets_of_samples), torch.cat(sets_of_samples)[:COMPARED].clamp(-FAR, FAR)
        apart = math.nan if found.nonfinite else mean_pairwise_distance(few)  # lost ones spread nothing
        return Judgement(
            reward=found.reward,
            sw2=found.sw2,
            ratio=found.sw2 / found.floor_sw2,
            mode_l1=found.mode_l1,
            floor_mode_l1=found.floor_mode_l1,
            distance=apart,
        )

    def target(self, base: MetaFlowMap, seed: int, conditions: Conditions) -> Judgement:
        """The same for exact samples."""
        return self([Drawn(self.exact.tilted.sample(4096, stream(seed, "target", i)).float(), {}) for i in range(4)])


class ImageJudge:
    """By rewards, the judge's features and, where classes are asked for, their frequencies.

    What is asked for is p_1 e^{λr} of the *base's* p_1: POOL of its samples with weights e^{λr}. Their weighted figures
    are the target's, and samples have a Fréchet distance to a resampled set of them.
    """

    def __init__(
        self, setup: ImageSetup, reward: Reward, others: Mapping[str, Reward], wanted: Tensor | None = None
    ) -> None:
        self.setup, self.wanted = setup, wanted
        self.rewards = {name: checked_reward(each) for name, each in {"": reward, **others}.items()}
        self._target: tuple[Tensor, Judgement] | None = None

    @torch.no_grad()
    def __call__(self, sets: list[Drawn]) -> Judgement:
        samples, lost = _finite(sets)
        if len(samples.x) < 64:
            return Judgement(lost=lost)
        features = self.setup.judge.features(samples.x)
        near = None if self._target is None else frechet_distance(features, self._target[0])
        scores = scores_of(self.rewards, samples.x, samples.cond or None)
        found = self._weighted(samples.x, scores, torch.ones(len(samples.x)), features)
        return replace(found, frechet_to_target=near, lost=lost)

    @torch.no_grad()
    def target(self, base: MetaFlowMap, seed: int, conditions: Conditions) -> Judgement:
        """Weighted figures of base samples; from here on samples are compared with them."""
        if self._target is None:
            cond = conditions(POOL, stream(seed, "tuned-target-conditions"))
            x = drawn(base, BASE_SAMPLER, POOL, seed + 1, cond)
            scores = scores_of(self.rewards, x, cond or None)
            weights = scores[""].double().softmax(0)
            chosen = torch.multinomial(weights, COMPARED, replacement=True, generator=stream(seed, "tuned-target"))
            features = self.setup.judge.features(x[chosen.to(x.device)])
            found = self._weighted(x, scores, weights, features)
            self._target = features, replace(found, ess=float(1 / weights.square().sum()))
        return self._target[1]

    def _weighted(self, x: Tensor, scores: Mapping[str, Tensor], weights: Tensor, features: Tensor) -> Judgement:
        """Mean rewards and class frequencies of weighted samples, and what their features say."""
        weights, judge = weights.double() / weights.sum(), self.setup.judge
        means = {name: float(weights @ score.double()) for name, score in scores.items()}
        found = Judgement(
            reward=means.pop(""),
            others=means,
            distance=mean_pairwise_distance(features[:COMPARED]),
            vendi=vendi_score(features[:COMPARED]),
            frechet_to_data=frechet_distance(features, self.setup.reference),
        )
        if judge.classifier is None:
            return found
        shares = torch.zeros(self.setup.train.num_classes, dtype=torch.float64)
        shares.scatter_add_(0, judge.classes(x), weights)
        found = replace(found, class_frequencies=shares.tolist())
        if self.wanted is None:
            return found
        chance = math.sqrt(float((1 - self.wanted.square().sum()) * weights.square().sum()))
        return replace(found, class_l2=class_distance(shares, self.wanted), chance=chance)


class PlainJudge:
    """Reward and diversity, where nothing else is known."""

    def __init__(self, reward: Reward) -> None:
        self.reward = checked_reward(reward)

    @torch.no_grad()
    def __call__(self, sets: list[Drawn]) -> Judgement:
        (x, cond), lost = _finite(sets)
        if len(x) < 2:
            return Judgement(lost=lost)
        flat, reward = x[:COMPARED].flatten(1), float(scored(self.reward, x, cond or None).mean())
        return Judgement(reward, distance=mean_pairwise_distance(flat), vendi=vendi_score(flat), lost=lost)

    def target(self, base: MetaFlowMap, seed: int, conditions: Conditions) -> None:
        """Nothing is known of it."""
        return


def _finite(sets: list[Drawn]) -> tuple[Drawn, int]:
    """The finite samples of all sets, and how many are not."""
    x = torch.cat([s.x for s in sets])
    kept = x.flatten(1).isfinite().all(1)
    cond = {name: torch.cat([s.cond[name] for s in sets])[kept] for name in sets[0].cond}
    return Drawn(x[kept], cond), int((~kept).sum())


@torch.no_grad()
def drawn(model: MetaFlowMap, sampler: str, n: int, seed: int, cond: Cond = None) -> Tensor:
    """n samples by ``map-K`` (refinement) or ``ode-K`` (Euler steps of the drift)."""
    kind, _, steps = sampler.partition("-")
    parts, g = [], stream(seed, "tuned", sampler)
    for begin in range(0, n, PART):
        rows = slice(begin, min(n, begin + PART))
        part = select_cond(cond, rows) if cond else None
        if kind == "map":
            parts.append(model.generate(rows.stop - begin, int(steps), g, part))
        else:
            noise = randn((rows.stop - begin, *model.event_shape), g, model.dtype, model.device)
            parts.append(integrate(lambda t, x, c=part: model.drift(t, x, c), noise, uniform_grid(int(steps))))  # type: ignore[misc]
    return torch.cat(parts)


# -- a tuned model beside its base -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplerResult:
    """The samples of one sampler, and what a sample took."""

    calls: int
    seconds: float
    judged: Judgement


@dataclass(frozen=True)
class TunedResult:
    """Samplers of the tuned model and of its base by name, and the target where it is known."""

    samplers: dict[str, SamplerResult]
    base: dict[str, SamplerResult]
    target: Judgement | None

    def to_json(self) -> dict[str, object]:
        """metrics.samplers[name], metrics.base[name], metrics.target and the table."""

        def cells(by_name: dict[str, SamplerResult]) -> dict[str, object]:
            return {n: {"calls": r.calls, "seconds": r.seconds, **r.judged.to_json()} for n, r in by_name.items()}

        target = {} if self.target is None else {"target": self.target.to_json()}
        title = "Samples of the tuned model and of its base"
        return {"samplers": cells(self.samplers), "base": cells(self.base), **target, "tables": {title: self.table()}}

    def table(self) -> TableRows:
        """One row a sampler, tuned ones first; columns are what the judge of the first can tell."""
        of_whom = [("tuned", self.samplers), ("base", self.base)]
        rows: list[tuple[list[object], Judgement]] = [
            ([whom, sampler_title(name), cell.calls], cell.judged)
            for whom, by_name in of_whom
            for name, cell in by_name.items()
        ]
        keys = [key for key in rows[0][1].to_json() if key in COLUMNS or key.startswith("reward_")]
        if self.target is not None:
            rows.append((["what is asked for", "", None], self.target))
        head = ["model", "sampler", "calls", *(COLUMNS.get(k, f"{k.removeprefix('reward_')} too") for k in keys)]
        return table(head, [[*first, *map(judged.to_json().get, keys)] for first, judged in rows])


COLUMNS = {
    "reward": "reward",
    "ratio": "SW2 / floor",
    "mode_l1": "mode L1",
    "distance": "mean distance",
    "vendi": "Vendi",
    "frechet_to_target": "Fréchet to target",
    "frechet_to_data": "Fréchet to data",
    "class_l2": "class L2 to w",
    "lost": "lost",
}


def evaluate_tuned(
    tuned: MetaFlowMap,
    base: MetaFlowMap,
    judge: SampleJudge,
    config: TunedEvalConfig,
    seed: int,
    parts: Mapping[str, bool] = MappingProxyType({"drift": True, "map": True}),
    conditions: Conditions = lambda n, g: {},
) -> TunedResult:
    """The tuned model by map-1, map-4 and ode-K, beside its base.

    Args:
        tuned: the tuned model.
        base: what it was tuned from.
        judge: of the samples of either.
        config: how many samples.
        seed: of the samples.
        parts: whether the ``drift`` and the ``map`` were tuned: only these are sampled.
        conditions: ``(n, generator)`` -> those of n samples.
    """
    ode = f"ode-{config.ode_steps}"
    names = ["map-1", "map-4"] * parts["map"] + [ode] * parts["drift"]
    target = judge.target(base, seed, conditions)

    def judged(model: MetaFlowMap, name: str) -> SamplerResult:
        sets, began = [], time.perf_counter()
        for i in range(config.seeds):
            cond = conditions(config.samples, stream(seed, "tuned-conditions", i))
            sets.append(Drawn(drawn(model, name, config.samples, 1000 * seed + i, cond), cond))
        seconds = (time.perf_counter() - began) / (config.samples * config.seeds)
        return SamplerResult(int(name.partition("-")[2]), seconds, judge(sets))

    of_tuned = {name: judged(tuned, name) for name in names}
    return TunedResult(of_tuned, {name: judged(base, name) for name in ("map-1", ode)}, target)


def sampler_title(name: str) -> str:
    """As tables call it."""
    kind, _, steps = name.partition("-")
    return f"{steps} steps of the drift" if kind == "ode" else f"map, {steps} step{'s' if steps != '1' else ''}"
