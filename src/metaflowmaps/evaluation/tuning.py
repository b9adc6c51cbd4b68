r"""How good are the samples of a tuned model, in one step and in many, and what do they cost?

Where the tilted law is known in closed form, by sliced W2 against exact samples and by mode weights, as in
:mod:`metaflowmaps.evaluation.steering`; for images, by the rewards that were not trained on, by diversity, by classes
under a judge that no reward uses, and beside the base model throughout.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps.config import Config
from metaflowmaps.evaluation.images.stage import Stage, table
from metaflowmaps.evaluation.steering import Judge as ExactJudge
from metaflowmaps.flow_map import Cond, MetaFlowMap
from metaflowmaps.metrics.diversity import mean_pairwise_distance, vendi_score
from metaflowmaps.metrics.images import class_distance
from metaflowmaps.metrics.sliced_w2 import Curves, curves
from metaflowmaps.mixture import GaussianMixture
from metaflowmaps.randomness import randn, stream
from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.rewards.checked import checked_reward
from metaflowmaps.sampling import integrate, uniform_grid

PART = 1024  # rows at a time
COMPARED = 1024  # samples whose pairs are compared


class TunedEvalConfig(Config):
    """How a tuned model is judged at the end of its run."""

    samples: int = Field(4096, ge=64)
    seeds: int = Field(4, ge=1)
    ode_steps: int = Field(250, ge=1)


class SampleJudge(Protocol):
    """What samples of one sampler, a tensor a seed, are worth."""

    def __call__(self, sets: list[Tensor]) -> dict[str, Any]: ...


class MixtureJudge:
    """Against exact samples of the tilted mixture."""

    def __init__(self, law: GaussianMixture, reward: LinearGaussian, seed: int = 0) -> None:
        self.exact = ExactJudge(law, reward, seed)

    def __call__(self, sets: list[Tensor]) -> dict[str, Any]:
        mine, n, judge = Curves(), len(sets[0]), self.exact
        whole = [torch.where(x.isfinite(), x, torch.zeros_like(x)).clamp(-1e6, 1e6).cpu() for x in sets]
        for x in whole:
            mine.add(curves(x, judge.along))
        sw2, pooled = math.sqrt(max(0.0, mine.squared_distance(judge.exact(n)))), torch.cat(whole)
        return {
            "reward": float(judge.reward(pooled.double()).mean()),
            "sw2": sw2,
            "ratio": sw2 / judge.floor_sw2(n),
            "mode_l1": float((judge.frequencies(pooled) - judge.probabilities).abs().sum()),
            "floor_mode_l1": judge.floor_mode_l1(len(pooled)),
            "distance": mean_pairwise_distance(pooled[:COMPARED]),
        }


class ImageJudge:
    """By rewards, the judge's features and, where classes are asked for, their frequencies."""

    def __init__(
        self,
        stage: Stage,
        reward: Callable[..., Tensor],
        others: Mapping[str, Callable[..., Tensor]],
        wish: Tensor | None = None,
    ) -> None:
        self.stage, self.reward, self.wish = stage, checked_reward(reward), wish
        self.others = {name: checked_reward(other) for name, other in others.items()}

    @torch.no_grad()
    def __call__(self, sets: list[Tensor]) -> dict[str, Any]:
        x = torch.cat(sets)
        lost = ~x.flatten(1).isfinite().all(1)
        x = x[~lost]
        if len(x) < 64:
            return {"lost": int(lost.sum())}
        figures: dict[str, Any] = {
            "reward": _mean(self.reward, x),
            **{f"reward_{name}": _mean(other, x) for name, other in self.others.items()},
            **self.stage.diversity(x[:COMPARED]),
            "frechet_to_data": self.stage.frechet(x),
            "lost": int(lost.sum()),
        }
        if self.stage.judge.classifier is not None:
            classes = self.stage.judge.classes(x)
            shares = torch.bincount(classes, minlength=self.stage.train.num_classes).double() / len(x)
            figures["class_frequencies"] = shares.tolist()
            if self.wish is not None:
                figures["class_l2"] = class_distance(shares, self.wish)
                figures["chance"] = math.sqrt(float((1 - self.wish.square().sum()) / len(x)))
        return figures


class PlainJudge:
    """Reward and diversity, where nothing else is known."""

    def __init__(self, reward: Callable[..., Tensor]) -> None:
        self.reward = checked_reward(reward)

    @torch.no_grad()
    def __call__(self, sets: list[Tensor]) -> dict[str, Any]:
        x = torch.cat(sets)
        x = x[x.flatten(1).isfinite().all(1)]
        compared = x[:COMPARED].flatten(1)
        return {
            "reward": _mean(self.reward, x),
            "distance": mean_pairwise_distance(compared),
            "vendi": vendi_score(compared),
        }


def _mean(reward: Callable[..., Tensor], x: Tensor) -> float:
    return float(torch.cat([reward(part).cpu() for part in x.split(PART)]).mean())


@torch.no_grad()
def drawn(model: MetaFlowMap, sampler: str, n: int, seed: int, cond: Cond = None) -> Tensor:
    """n samples by ``map-K`` (refinement) or ``ode-K`` (Euler steps of the drift)."""
    kind, _, steps = sampler.partition("-")
    parts, g = [], stream(seed, "tuned", sampler)
    for begin in range(0, n, PART):
        rows = slice(begin, min(n, begin + PART))
        part = None if cond is None else {k: v[rows] for k, v in cond.items()}
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
    has_map: bool = True,
    has_drift: bool = True,
    conditions: Callable[[int, torch.Generator], dict[str, Tensor]] = lambda n, g: {},
) -> dict[str, Any]:
    """metrics.samplers[name] and metrics.base[name], name = map-1, map-4, ode-K."""
    ode = f"ode-{config.ode_steps}"
    names = [*(["map-1", "map-4"] if has_map else []), *([ode] if has_drift else [])]

    def judged(model: MetaFlowMap, name: str) -> dict[str, Any]:
        sets = []
        for i in range(config.seeds):
            cond = conditions(config.samples, stream(seed, "tuned-conditions", i)) or None
            sets.append(drawn(model, name, config.samples, 1000 * seed + i, cond))
        return {"calls": int(name.partition("-")[2]), **judge(sets)}

    return {
        "samplers": {name: judged(tuned, name) for name in names},
        "base": {name: judged(base, name) for name in ("map-1", ode)},
    }


WORDS = {
    "reward": "reward", "ratio": "SW2 / floor", "mode_l1": "mode L1", "distance": "mean distance", "vendi": "Vendi",
    "frechet_to_data": "Fréchet to data", "class_l2": "class L2 to w", "lost": "lost",
}  # fmt: skip


def tables(metrics: dict[str, Any]) -> dict[str, Any]:
    """The table of a tuned model beside its base."""
    cells = [("tuned", name, cell) for name, cell in metrics["samplers"].items()]
    cells += [("base", name, cell) for name, cell in metrics["base"].items()]
    keys = [key for key in cells[0][2] if key in WORDS or key.startswith("reward_")]
    head = ["model", "sampler", "calls", *(WORDS.get(k, f"{k.removeprefix('reward_')} too") for k in keys)]
    rows = [[who, sampler_title(name), cell["calls"], *(cell.get(k) for k in keys)] for who, name, cell in cells]
    return {"Samples of the tuned model and of its base": table(head, rows)}


def sampler_title(name: str) -> str:
    """As tables call it."""
    kind, _, steps = name.partition("-")
    return f"{steps} steps of the drift" if kind == "ode" else f"map, {steps} step{'s' if steps != '1' else ''}"
