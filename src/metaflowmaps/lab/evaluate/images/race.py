r"""The reward race: best-of-N against steered trajectories, reward beside diversity beside cost.

For each reward, **best-of-N** keeps the best of N base samples: a pool is generated once (250-step ODE; also the map's
own one- and four-step samples, which nobody should leave out), shuffled and cut into groups of N. **Steered** samples
come from ``steer`` at strengths λ/σ, σ the reward's standard deviation over the data: one line a method, λ along it.
Methods that rescale their steering term to γ times the drift (the paper's setting for images) have γ along theirs.

Reward alone proves little: DPS can be above everything while its samples collapse. So each cell also has, in the
judge's features, mean pairwise distance, Vendi score and the Fréchet distance to the **data of the target**, the tenth
of all images with the highest reward. The last two depend on the number of samples: they are means over sets of SUBSET
samples, for every cell alike. And each cell is scored by the rewards it was not steered by (hacking).

A map that knows classes makes samples of all of them; a particle system has one class. What is dear to judge, of
latents decoded, is scored where it is made.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps.lab.evaluate.images.image_rewards import RACE, image_reward, scores_of, short
from metaflowmaps.lab.evaluate.images.judging import BATCH
from metaflowmaps.lab.evaluate.images.setup import (
    ImageEvalConfig,
    ImageSetup,
    Say,
    Timed,
    cost_of,
    cost_of_parts,
    table,
)
from metaflowmaps.lab.evaluate.images.steered import calls, image_variant, labels_of, run
from metaflowmaps.metrics.diversity import mean_pairwise_distance, vendi_score
from metaflowmaps.metrics.frechet import frechet_distance
from metaflowmaps.path import call_drift
from metaflowmaps.random import randn, stream
from metaflowmaps.rewards import Tempered
from metaflowmaps.sampling import integrate, uniform_grid
from metaflowmaps.steering import ODE
from metaflowmaps.work.shards import Shard, ranges

SUBSET = 64
SETS = 8  # of SUBSET samples, at most
TOP = 0.1  # of all images: the data of the target
METHODS = (
    "mfm-g-1",
    "mfm-g-rescale-1",
    "mfm-g-rescale-4",
    "mfm-gf-4",
    "mfm-gf-16",
    "mfm-gf-rescale-16",
    "mfm-smc-4",
    "mfm-search-4",
    "dps",
    "dps-rescale",
    "tds-64",
)
SINGLE = ("mfm-g-1", "mfm-g-plain-1", "mfm-g-rescale-1")  # MFM-G with one draw a step
POOLS = {
    "ode": "best-of-N of ODE samples",
    "map-1": "best-of-N of map samples, 1 step",
    "map-4": "best-of-N of map samples, 4 steps",
}


class RaceConfig(ImageEvalConfig):
    """Who races, for how long."""

    rewards: tuple[str, ...] = Field(RACE, min_length=1)
    methods: tuple[str, ...] = Field(METHODS, min_length=1)
    strengths: tuple[float, ...] = Field((1.0, 2.0, 4.0, 8.0, 16.0, 32.0), min_length=1)  # λσ
    rescales: tuple[float, ...] = Field((0.25, 0.5, 0.75, 1.0, 1.5, 2.0), min_length=1)  # γ, of the -rescale methods
    rescale_strength: float = Field(8.0, gt=0)  # their λσ, which only weighs several draws against each other
    samples: int = Field(256, ge=SUBSET)
    steps: int = Field(50, ge=1)
    base_steps: int = Field(250, ge=1)
    pool: int = Field(64_000, ge=2 * SUBSET)
    best_of: tuple[int, ...] = Field((1, 10, 100, 1000), min_length=1)

    @model_validator(mode="after")
    def _possible(self) -> "RaceConfig":
        if min(self.best_of) < 1 or self.pool < 2 * max(self.best_of):
            raise ValueError("best_of must be at least 1 and at most half of the pool: two groups make a mean")
        if min(*self.strengths, *self.rescales) <= 0:
            raise ValueError("strengths and rescales must be positive: without steering it is the method none")
        return self

    def calls(self) -> int:
        """Evaluations of the map's network: the pools, and every steered cell."""
        pools = self.pool * (self.base_steps + sum(int(kind.removeprefix("map-")) for kind in POOLS if kind != "ode"))
        cells = sum(
            len(self.numbers(name)) * calls(image_variant(name), self.samples, self.steps) for name in self.methods
        )
        return pools + len(self.rewards) * cells

    def numbers(self, name: str) -> tuple[float, ...]:
        """The strengths at which a method runs."""
        return (0.0,) if name == "none" else self.rescales if _rescaled(name) else self.strengths


class Raced(NamedTuple):
    """Figures, and for each reward the samples that the story shows."""

    metrics: dict[str, Any]
    samples: dict[str, dict[str, Tensor]]


def evaluate_race(setup: ImageSetup, config: RaceConfig, say: Say = lambda line: None) -> Raced:
    """metrics.rewards[reward].cells: {method, strength | n, reward, others, distance, vendi, frechet, cost}, each."""
    for name in config.methods:
        image_variant(name)
    rewards = {name: image_reward(setup, name) for name in config.rewards}
    data = setup.everything()
    known = scores_of(rewards, data, setup.cond(setup.everything_told(), len(data)))
    races = {name: _Race(setup, name, rewards, data, config, known[name]) for name in rewards}
    parts = ranges(config.pool, setup.shard if setup.latent else BATCH)
    steered = [
        (race, name, number) for race in races.values() for name in config.methods for number in config.numbers(name)
    ]
    drawn = setup.share(
        {
            f"{pool}.{part}": _pool(setup, pool, config, rewards, index, say)
            for pool in POOLS
            for part, index in parts.items()
        }
        | {_key(*cell): cell[0].steer(*cell[1:], say) for cell in steered}
    )
    for pool in POOLS:
        made = [drawn(f"{pool}.{part}") for part in parts]
        images = torch.cat([part.tensors["samples"] for part in made])
        cost = cost_of_parts(made, config.pool)
        scores = _scores_in(rewards, torch.cat([part.tensors["scores"] for part in made], 1))
        for race in races.values():
            for n in config.best_of:
                race.best_of(pool, n, images, scores, cost)
    for race, name, number in steered:
        race.steered(name, number, drawn(_key(race, name, number)))
    metrics = {
        "rewards": {name: race.metrics() for name, race in races.items()},
        "steps": config.steps,
        "base_steps": config.base_steps,
        "pool": config.pool,
        "space": setup.judge.space,
        **setup.extras(),
    }
    return Raced({**metrics, **_words(metrics)}, {name: race.shown for name, race in races.items()})


class _Race:
    """All cells of one reward."""

    def __init__(
        self,
        setup: ImageSetup,
        name: str,
        rewards: dict[str, Any],
        data: Tensor,
        config: RaceConfig,
        on_data: Tensor | None = None,
    ) -> None:
        self.setup, self.name, self.rewards, self.config = setup, name, rewards, config
        self.images = data
        self.on_data = scores_of({name: rewards[name]}, data)[name] if on_data is None else on_data
        self.scale = float(self.on_data.std()) or 1.0  # a reward that is the same for all data has no scale
        self.best = self.on_data.topk(min(len(data), max(2 * SUBSET, round(TOP * len(data))))).indices
        self.cells: list[dict[str, Any]] = []
        self.shown: dict[str, Tensor] = {"target data": self._picture(data[self.best[:16].to(data.device)])}

    @cached_property
    def target(self) -> Tensor:
        """Features of the data with the highest reward."""
        return self.setup.judge.features(self.images[self.best.to(self.images.device)])

    @cached_property
    def data(self) -> dict[str, Any]:
        """What the data have; only who puts the cells together needs it."""
        first = self.setup.judge.features(self.images[:BATCH])
        return {
            "target_reward": float(self.on_data[self.best].mean()),
            "reward": float(self.on_data.mean()),
            "reward_std": self.scale,
            "target_images": len(self.best),
            **self.judged(self.target),
            "base_frechet": self._subsets(first, "frechet"),
        }

    def best_of(self, pool: str, n: int, images: Tensor, scores: dict[str, Tensor], cost: dict[str, float]) -> None:
        """Groups of n, the best of each; a group costs n samples and n rewards."""
        groups = min(len(images) // n, max(self.config.samples, SUBSET))
        order = torch.randperm(len(images), generator=stream(self.config.seed, "groups", pool, n))[: groups * n]
        won = scores[self.name][order].reshape(groups, n).argmax(1, keepdim=True)
        best = order.reshape(groups, n).gather(1, won)[:, 0]
        each = {k: n * v for k, v in cost.items()}
        each |= {"reward_calls": float(n), "nfe": n * cost["nfe"] + n}
        self._add(pool, n, images[best.to(images.device)], {k: v[best] for k, v in scores.items()}, each)

    def steer(self, name: str, strength: float, say: Say = lambda line: None) -> Callable[[], Shard]:
        """Samples of one method at λ/σ, or rescaled to γ = strength."""

        def make() -> Shard:
            rescaled = _rescaled(name)
            say(f"{self.name}: {name}, {'γ' if rescaled else 'λσ'} = {strength:g}")
            weight = self.config.rescale_strength if rescaled else strength
            reward = Tempered(self.rewards[self.name], weight / self.scale) if weight else self.rewards[self.name]
            process = ODE(steps=self.config.steps)
            if rescaled:
                process = replace(process, renormalize="rescale", renormalize_to=strength)
            g = stream(self.config.seed, "race", self.name, name, repr(strength))
            labels = labels_of(name, self.setup.labels(self.config.samples, "race", self.config.seed))
            x, result = run(self.setup, image_variant(name), reward, self.config.samples, process, g, labels)
            finite = x.flatten(1).isfinite().all(1)
            kept = {"samples": x}
            if int(finite.sum()) >= SUBSET:
                cond = self.setup.cond(None if labels is None else labels[finite], int(finite.sum()))
                kept["scores"] = torch.stack([*scores_of(self.rewards, x[finite], cond).values()])
                kept["features"] = self.setup.judge.features(x[finite])
            return Shard(kept, {"cost": cost_of(result)})

        return make

    def steered(self, name: str, strength: float, made: Shard) -> None:
        """Judge these samples."""
        x = made.tensors["samples"]
        finite = x.flatten(1).isfinite().all(1)
        x = x[finite]
        if len(x) < SUBSET:  # the method broke at this strength: said so, and not scored
            self.cells.append({"method": name, "strength": strength, "lost": int((~finite).sum())})
            return
        scores = _scores_in(self.rewards, made.tensors["scores"])
        lost = int((~finite).sum())
        self._add(name, strength, x, scores, made.facts["cost"], lost, made.tensors["features"])

    def _add(
        self,
        method: str,
        number: float,
        x: Tensor,
        scores: dict[str, Tensor],
        cost: dict[str, float],
        lost: int = 0,
        features: Tensor | None = None,
    ) -> None:
        own = scores[self.name]
        self.cells.append(
            {
                "method": method,
                ("n" if method in POOLS else "strength"): number,
                "reward": float(own.mean()),
                "reward_se": float(own.std() / math.sqrt(len(own))),
                "others": {k: float(v.mean()) for k, v in scores.items() if k != self.name},
                **self.judged(self.setup.judge.features(x) if features is None else features),
                "samples": len(x),
                "lost": lost,
                "cost": cost,
            }
        )
        self.shown[f"{method} {number:g}"] = self._picture(x[:16])

    def _picture(self, x: Tensor) -> Tensor:
        return self.setup.decode(x).cpu()

    def judged(self, features: Tensor) -> dict[str, float | None]:
        """Distance, Vendi score and Fréchet distance to the target, the last two on sets of SUBSET."""
        return {
            "distance": mean_pairwise_distance(features),
            "vendi": self._subsets(features, "vendi"),
            "frechet": self._subsets(features, "frechet"),
        }

    def _subsets(self, features: Tensor, what: str) -> float | None:
        sets = [part for part in features.split(SUBSET) if len(part) == SUBSET][:SETS]
        if not sets:  # too few samples to be compared with the others
            return None
        if what == "vendi":
            return sum(vendi_score(part) for part in sets) / len(sets)
        return sum(frechet_distance(part, self.target) for part in sets) / len(sets)

    def metrics(self) -> dict[str, Any]:
        owners = {
            what: [f"{c['method']} {c.get('strength', c.get('n')):g}" for c in frontier(self.cells, what)]
            for what in ("distance", "frechet")
        }
        return {"data": self.data, "cells": self.cells, "headline": headline(self.cells), "frontier": owners}


def _key(race: _Race, name: str, number: float) -> str:
    return f"{race.name}.{name}.{number!r}"


def _rescaled(name: str) -> bool:
    return image_variant(name).rescaled


def _scores_in(rewards: dict[str, Any], rows: Tensor) -> dict[str, Tensor]:
    """Rewards by name, of a cell's rows (rewards, n)."""
    return dict(zip(rewards, rows.cpu(), strict=True))


def _pool(
    setup: ImageSetup, kind: str, config: RaceConfig, rewards: dict[str, Any], index: slice, say: Say
) -> Callable[[], Shard]:
    """Samples of the model itself, those of these indices, and their rewards."""
    model, n = setup.model, index.stop - index.start

    @torch.no_grad()
    def make() -> Shard:
        if index.start == 0:
            say(f"a pool of {config.pool:,} samples: {POOLS[kind]}")
        g = stream(config.seed, "pool", kind, index.start)
        labels = setup.labels(config.pool, "pool", config.seed)
        cond = setup.cond(None if labels is None else labels[index], n)
        with Timed(model) as timed, setup.autocast():
            if kind == "ode":
                noise = randn((n, *model.event_shape), g, model.dtype, model.device)
                x = integrate(lambda t, x: call_drift(model.drift, t, x, cond), noise, uniform_grid(config.base_steps))
            else:
                steps = int(kind.removeprefix("map-"))
                asked: dict[str, Any] = {} if cond is None else {"cond": cond}
                x = model.generate(n, steps, g, **asked)
        scores = torch.stack([*scores_of(rewards, x, cond).values()])
        return Shard({"samples": x, "scores": scores}, {"cost": timed.meter.cost()})

    return make


def headline(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """MFM-G with one draw against best-of-N of each pool: the most diverse that reaches its reward, and the ratios.

    Where none does, the one of highest reward, with ``reached`` false.
    """
    single = [c for c in cells if c["method"] in SINGLE and "reward" in c]
    out = {}
    for pool in POOLS:
        rival = max((c for c in cells if c["method"] == pool), key=lambda c: c["n"], default=None)
        if rival is None or not single:
            continue
        enough = [c for c in single if c["reward"] >= rival["reward"]]
        ours = max(enough, key=lambda c: c["distance"]) if enough else max(single, key=lambda c: c["reward"])
        out[pool] = {
            "n": rival["n"],
            "reached": bool(enough),
            "method": ours["method"],
            "strength": ours["strength"],
            "reward": ours["reward"],
            "rival_reward": rival["reward"],
            "nfe_ratio": rival["cost"]["nfe"] / ours["cost"]["nfe"],
            "seconds_ratio": rival["cost"]["seconds"] / ours["cost"]["seconds"],
            "distance": ours["distance"],
            "rival_distance": rival["distance"],
            "frechet": ours["frechet"],
            "rival_frechet": rival["frechet"],
        }
    return out


def frontier(cells: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    """The cells that no other beats in reward and in ``what`` at once (distance: more is better; frechet: less)."""
    sign = 1.0 if what == "distance" else -1.0
    usable = [c for c in cells if c.get(what) is not None]
    return [
        c
        for c in usable
        if not any(
            o["reward"] >= c["reward"]
            and sign * o[what] >= sign * c[what]
            and (o["reward"], sign * o[what]) != (c["reward"], sign * c[what])
            for o in usable
        )
    ]


def title(method: str) -> str:
    """As tables and figures call it."""
    return POOLS[method] if method in POOLS else image_variant(method).title


def _words(metrics: dict[str, Any]) -> dict[str, Any]:
    """The tables and the summary."""
    races = metrics["rewards"]
    tables = {
        "MFM-G with one draw against best-of-N": _headlines(races),
        "Cells that none beats in reward and in the other at once": _frontiers(races),
        **{f"Reward {name}": _cells_of(race, short(races)) for name, race in races.items()},
    }
    won = sum(race["headline"].get("ode", {}).get("reached", False) for race in races.values())
    return {
        "tables": tables,
        "summary": f"MFM-G with one draw a step reaches the mean reward of best-of-N over {metrics['base_steps']}-step "
        f"ODE samples on {won} of {len(races)} rewards. Reward is shown beside diversity and beside the "
        "distance to the data that have such a reward: reward alone proves little.",
    }


def _headlines(races: dict[str, Any]) -> Any:
    head = ["reward", "rival", "its reward", "MFM-G's", "reached", "by", "λσ or γ", "NFE, times fewer"]
    head += ["seconds, times fewer", "its mean distance", "MFM-G's", "its Fréchet", "MFM-G's"]
    rows = []
    for name, race in races.items():
        for pool, h in race["headline"].items():
            row = [
                name,
                f"{POOLS[pool]}, N = {h['n']}",
                h["rival_reward"],
                h["reward"],
                "yes" if h["reached"] else "no",
            ]
            row += [title(h["method"]), f"{h['strength']:g}", h["nfe_ratio"], h["seconds_ratio"]]
            rows.append([*row, h["rival_distance"], h["distance"], h["rival_frechet"], h["frechet"]])
    return table(head, rows)


def _frontiers(races: dict[str, Any]) -> Any:
    rows = []
    for name, race in races.items():
        for what, words in (("distance", "mean distance"), ("frechet", "Fréchet to target")):
            owners = Counter(title(owner.rpartition(" ")[0]) for owner in race["frontier"][what])
            rows.append([name, words, ", ".join(f"{method}: {count}" for method, count in owners.most_common())])
    return table(["reward", "against", "cells of"], rows)


def _cells_of(race: dict[str, Any], brief: dict[str, str]) -> Any:
    others, data = list(race["cells"][0]["others"]), race["data"]
    head = ["method", "λσ, γ or N", "reward", "±", *(f"{brief[o]} too" for o in others), "mean distance"]
    head += [f"Vendi of {SUBSET}", "Fréchet to target", "NFE", "ms", "samples"]
    rows = []
    for c in race["cells"]:
        if "reward" in c:
            row = [title(c["method"]), c.get("strength", c.get("n")), c["reward"], c["reward_se"]]
            row += [*(c["others"][o] for o in others), c["distance"], c["vendi"], c["frechet"]]
            rows.append([*row, round(c["cost"]["nfe"]), 1000 * c["cost"]["seconds"], c["samples"]])
    row = ["data of the target", None, data["target_reward"], None, *(None for _ in others)]
    rows.append([*row, data["distance"], data["vendi"], data["frechet"], None, None, data["target_images"]])
    return table(head, rows)
