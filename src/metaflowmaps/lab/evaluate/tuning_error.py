r"""How good are the samples of a tuned model, in one step and in many, and what do they cost?

Where the tilted law is known in closed form, by sliced W2 against exact samples and by mode weights, as in
:mod:`metaflowmaps.lab.evaluate.steering_error`; for images, by the rewards that were not trained on, by diversity, by
classes under a judge that no reward uses, and beside the base model throughout.
"""

import math
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import Cond
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.images.setup import ImageSetup, table
from metaflowmaps.lab.evaluate.steering_error import ExactJudge, within_reach
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.metrics.diversity import mean_pairwise_distance, vendi_score
from metaflowmaps.metrics.finite import root
from metaflowmaps.metrics.frechet import frechet_distance
from metaflowmaps.metrics.image_by_image import class_distance
from metaflowmaps.metrics.sliced_w2 import Curves, curves
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


class Drawn(NamedTuple):
    """Samples with the conditions that they were made under, {} for none."""

    x: Tensor
    cond: dict[str, Tensor]


class SampleJudge(Protocol):
    """What samples of one sampler, a set a seed, are worth."""

    def __call__(self, sets: list[Drawn]) -> dict[str, Any]: ...

    def target(self, base: MetaFlowMap, seed: int, conditions: Conditions) -> dict[str, Any] | None:
        """The same figures for the law that is asked for, as far as it is known."""
        ...


class MixtureJudge:
    """Against exact samples of the tilted mixture."""

    def __init__(self, law: GaussianMixture, reward: LinearGaussian, seed: int = 0) -> None:
        self.exact = ExactJudge(law, reward, seed)

    def __call__(self, sets: list[Drawn]) -> dict[str, Any]:
        mine, n, judge = Curves(), len(sets[0].x), self.exact
        made = torch.cat([x for x, _ in sets]).cpu()
        pooled, whole = within_reach(made), bool(made.isfinite().all())
        for x in pooled.split(n):
            mine.add(curves(x, judge.along))
        sw2 = root(mine.squared_distance(judge.exact(n)))
        return {
            "reward": float(judge.reward(pooled.double()).mean()),
            "sw2": sw2,
            "ratio": sw2 / judge.floor_sw2(n),
            "mode_l1": float((judge.frequencies(made) - judge.probabilities).abs().sum()),
            "floor_mode_l1": judge.floor_mode_l1(len(pooled)),
            "distance": mean_pairwise_distance(pooled[:COMPARED]) if whole else math.nan,  # lost ones spread nothing
        }

    def target(self, base: MetaFlowMap, seed: int, conditions: Conditions) -> dict[str, Any]:
        """The same for exact samples."""
        return self([Drawn(self.exact.tilted.sample(4096, stream(seed, "target", i)).float(), {}) for i in range(4)])


class ImageJudge:
    """By rewards, the judge's features and, where classes are asked for, their frequencies.

    What is asked for is p_1 e^{λr} of the *base's* p_1: POOL of its samples with weights e^{λr}. Their weighted figures
    are the target's, and samples have a Fréchet distance to a resampled set of them.
    """

    def __init__(
        self,
        setup: ImageSetup,
        reward: Callable[..., Tensor],
        others: Mapping[str, Callable[..., Tensor]],
        wanted: Tensor | None = None,
    ) -> None:
        self.setup, self.reward, self.wanted = setup, checked_reward(reward), wanted
        self.others = {name: checked_reward(other) for name, other in others.items()}
        self._target: tuple[Tensor, dict[str, Any]] | None = None

    @torch.no_grad()
    def __call__(self, sets: list[Drawn]) -> dict[str, Any]:
        (x, cond), lost = _finite(sets)
        if len(x) < 64:
            return {"lost": lost}
        features = self.setup.judge.features(x)
        return {
            **self._weighted(Drawn(x, cond), torch.ones(len(x))),
            **_spread(features[:COMPARED]),
            **({} if self._target is None else {"frechet_to_target": frechet_distance(features, self._target[0])}),
            "frechet_to_data": frechet_distance(features, self.setup.reference),
            "lost": lost,
        }

    @torch.no_grad()
    def target(self, base: MetaFlowMap, seed: int, conditions: Conditions) -> dict[str, Any]:
        """Weighted figures of base samples; from here on samples are compared with them."""
        if self._target is None:
            cond = conditions(POOL, stream(seed, "tuned-target-conditions"))
            x = drawn(base, BASE_SAMPLER, POOL, seed + 1, cond)
            weights = _each(self.reward, x, cond).double().softmax(0)
            chosen = torch.multinomial(weights, COMPARED, replacement=True, generator=stream(seed, "tuned-target"))
            features = self.setup.judge.features(x[chosen.to(x.device)])
            figures = {
                **self._weighted(Drawn(x, cond), weights),
                **_spread(features),
                "frechet_to_data": frechet_distance(features, self.setup.reference),
                "ess": float(1 / weights.square().sum()),
            }
            self._target = features, figures
        return self._target[1]

    def _weighted(self, samples: Drawn, weights: Tensor) -> dict[str, Any]:
        """Mean rewards and class frequencies of weighted samples."""
        (x, cond), weights = samples, weights.double() / weights.sum()
        each = {name: _each(reward, x, cond).double() for name, reward in {"": self.reward, **self.others}.items()}
        means = {name: float(weights @ r) for name, r in each.items()}
        figures: dict[str, Any] = {f"reward_{name}" if name else "reward": mean for name, mean in means.items()}
        if self.setup.judge.classifier is not None:
            shares = torch.zeros(self.setup.train.num_classes, dtype=torch.float64)
            shares.scatter_add_(0, self.setup.judge.classes(x), weights)
            figures["class_frequencies"] = shares.tolist()
            if self.wanted is not None:
                figures["class_l2"] = class_distance(shares, self.wanted)
                figures["chance"] = math.sqrt(float((1 - self.wanted.square().sum()) * weights.square().sum()))
        return figures


class PlainJudge:
    """Reward and diversity, where nothing else is known."""

    def __init__(self, reward: Callable[..., Tensor]) -> None:
        self.reward = checked_reward(reward)

    @torch.no_grad()
    def __call__(self, sets: list[Drawn]) -> dict[str, Any]:
        (x, cond), lost = _finite(sets)
        if len(x) < 2:
            return {"lost": lost}
        return {"reward": float(_each(self.reward, x, cond).mean()), **_spread(x[:COMPARED].flatten(1)), "lost": lost}

    def target(self, base: MetaFlowMap, seed: int, conditions: Conditions) -> None:
        """Nothing is known of it."""
        return


def _finite(sets: list[Drawn]) -> tuple[Drawn, int]:
    """The finite samples of all sets, and how many are not."""
    x = torch.cat([s.x for s in sets])
    kept = x.flatten(1).isfinite().all(1)
    cond = {name: torch.cat([s.cond[name] for s in sets])[kept] for name in sets[0].cond}
    return Drawn(x[kept], cond), int((~kept).sum())


def _each(reward: Callable[..., Tensor], x: Tensor, cond: dict[str, Tensor]) -> Tensor:
    rows = [slice(i, i + PART) for i in range(0, len(x), PART)]
    return torch.cat([reward(x[s], {k: v[s] for k, v in cond.items()} or None).cpu() for s in rows])


def _spread(features: Tensor) -> dict[str, float]:
    return {"distance": mean_pairwise_distance(features), "vendi": vendi_score(features)}


@torch.no_grad()
def drawn(model: MetaFlowMap, sampler: str, n: int, seed: int, cond: Cond = None) -> Tensor:
    """n samples by ``map-K`` (refinement) or ``ode-K`` (Euler steps of the drift)."""
    kind, _, steps = sampler.partition("-")
    parts, g = [], stream(seed, "tuned", sampler)
    for begin in range(0, n, PART):
        rows = slice(begin, min(n, begin + PART))
        part = {k: v[rows] for k, v in cond.items()} if cond else None
        if kind == "map":
            parts.append(model.generate(rows.stop - begin, int(steps), g, part))
        else:
            noise = randn((rows.stop - begin, *model.event_shape), g, model.dtype, model.device)
            parts.append(integrate(lambda t, x, c=part: model.drift(t, x, c), noise, uniform_grid(int(steps))))  # type: ignore[misc]
    return torch.cat(parts)


def evaluate_tuned(
    tuned: MetaFlowMap,
    base: MetaFlowMap,
    judge: SampleJudge,
    config: TunedEvalConfig,
    seed: int,
    parts: Mapping[str, bool] = MappingProxyType({"drift": True, "map": True}),
    conditions: Conditions = lambda n, g: {},
) -> dict[str, Any]:
    """metrics.samplers[name] and metrics.base[name], name = map-1, map-4, ode-K; metrics.target where it is known.

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
    names = [*(["map-1", "map-4"] if parts["map"] else []), *([ode] if parts["drift"] else [])]

    target = judge.target(base, seed, conditions)

    def judged(model: MetaFlowMap, name: str) -> dict[str, Any]:
        sets, began = [], time.perf_counter()
        for i in range(config.seeds):
            cond = conditions(config.samples, stream(seed, "tuned-conditions", i))
            sets.append(Drawn(drawn(model, name, config.samples, 1000 * seed + i, cond), cond))
        seconds = (time.perf_counter() - began) / (config.samples * config.seeds)
        return {"calls": int(name.partition("-")[2]), "seconds": seconds, **judge(sets)}

    return {
        "samplers": {name: judged(tuned, name) for name in names},
        "base": {name: judged(base, name) for name in ("map-1", ode)},
        **({} if target is None else {"target": target}),
    }


WORDS = {
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


def tables(metrics: dict[str, Any]) -> dict[str, Any]:
    """The table of a tuned model beside its base."""
    cells = [("tuned", name, cell) for name, cell in metrics["samplers"].items()]
    cells += [("base", name, cell) for name, cell in metrics["base"].items()]
    keys = [key for key in cells[0][2] if key in WORDS or key.startswith("reward_")]
    head = ["model", "sampler", "calls", *(WORDS.get(k, f"{k.removeprefix('reward_')} too") for k in keys)]
    rows = [[who, sampler_title(name), cell["calls"], *(cell.get(k) for k in keys)] for who, name, cell in cells]
    if "target" in metrics:
        rows.append(["what is asked for", "", None, *(metrics["target"].get(k) for k in keys)])
    return {"Samples of the tuned model and of its base": table(head, rows)}


def sampler_title(name: str) -> str:
    """As tables call it."""
    kind, _, steps = name.partition("-")
    return f"{steps} steps of the drift" if kind == "ode" else f"map, {steps} step{'s' if steps != '1' else ''}"
