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
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps.cost import Meter
from metaflowmaps.lab.evaluate.images.experiment import Cells, Drawn, ImageExperiment
from metaflowmaps.lab.evaluate.images.image_rewards import RACE, image_reward, scores_of, short
from metaflowmaps.lab.evaluate.images.judging import BATCH
from metaflowmaps.lab.evaluate.images.race_cells import (
    FRONTIERS,
    POOLS,
    SUBSET,
    Cell,
    RaceCell,
    RewardResult,
    ShownSamples,
    Spread,
    TargetData,
    frontier,
    title,
)
from metaflowmaps.lab.evaluate.images.setup import (
    ImageEvalConfig,
    ImageSetup,
    Say,
    TableRows,
    cost_of,
    cost_of_parts,
    finite_samples,
    table,
)
from metaflowmaps.lab.evaluate.images.steered import calls, image_variant, labels_of, run
from metaflowmaps.lab.evaluate.rows import Json
from metaflowmaps.metrics.diversity import mean_pairwise_distance, vendi_score
from metaflowmaps.metrics.frechet import frechet_distance
from metaflowmaps.random import randn, stream
from metaflowmaps.rewards import Tempered
from metaflowmaps.steering import ODE
from metaflowmaps.work.shards import Shard, ranges

SETS = 8  # of SUBSET samples, at most
TOP = 0.1  # of all images: the data of the target
PICTURED = 16
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
        pools = self.pool * sum(map(self.steps_of, POOLS))
        cells = sum(
            len(self.numbers(name)) * calls(image_variant(name), self.samples, self.steps) for name in self.methods
        )
        return pools + len(self.rewards) * cells

    def steps_of(self, pool: str) -> int:
        """Network calls of a sample of a pool."""
        return self.base_steps if pool == "ode" else int(pool.removeprefix("map-"))

    def numbers(self, name: str) -> tuple[float, ...]:
        """The strengths at which a method runs."""
        return (0.0,) if name == "none" else self.rescales if image_variant(name).rescaled else self.strengths


@dataclass(frozen=True)
class Raced:
    """Every reward."""

    setup: ImageSetup
    config: RaceConfig
    races: dict[str, RewardResult]

    @property
    def samples(self) -> dict[str, dict[str, Tensor]]:
        """For each reward the samples that pictures show, by :attr:`RaceCell.key`."""
        return {name: {key: shown.pictures for key, shown in race.shown.items()} for name, race in self.races.items()}

    @cached_property
    def metrics(self) -> Json:
        """metrics.rewards[reward].cells, and tables."""
        config, races, brief = self.config, self.races, short(self.races)
        won = sum("ode" in race.headline and race.headline["ode"].reached for race in races.values())
        return {
            "rewards": {name: race.to_json() for name, race in races.items()},
            "steps": config.steps,
            "base_steps": config.base_steps,
            "pool": config.pool,
            "space": self.setup.judge.space,
            **self.setup.extras(),
            "tables": {
                "MFM-G with one draw against best-of-N": self.headlines(),
                "Cells that none beats in reward and in the other at once": self._frontiers(),
                **{f"Reward {name}": race.table(brief) for name, race in races.items()},
            },
            "summary": f"MFM-G with one draw a step reaches the mean reward of best-of-N over {config.base_steps}-step "
            f"ODE samples on {won} of {len(races)} rewards. Reward is shown beside diversity and beside the "
            "distance to the data that have such a reward: reward alone proves little.",
        }

    def headlines(self) -> TableRows:
        """MFM-G with one draw against best-of-N of each pool, by reward."""
        head = ["reward", "rival", "its reward", "MFM-G's", "reached", "by", "λσ or γ", "NFE, times fewer"]
        head += ["seconds, times fewer", "its mean distance", "MFM-G's", "its Fréchet", "MFM-G's"]
        rows: list[list[object]] = []
        for name, race in self.races.items():
            for pool, h in race.headline.items():
                rival, reached = f"{POOLS[pool]}, N = {h.n}", "yes" if h.reached else "no"
                row = [name, rival, h.rival_reward, h.reward, reached, title(h.method), f"{h.strength:g}"]
                row += [h.nfe_ratio, h.seconds_ratio, h.rival_distance, h.distance, h.rival_frechet, h.frechet]
                rows.append(row)
        return table(head, rows)

    def _frontiers(self) -> TableRows:
        rows = []
        for name, race in self.races.items():
            for what, words in FRONTIERS.items():
                owners = Counter(title(cell.method) for cell in frontier(race.scored, what))
                rows.append([name, words, ", ".join(f"{method}: {count}" for method, count in owners.most_common())])
        return table(["reward", "against", "cells of"], rows)


class Race(ImageExperiment[RaceConfig, Raced]):
    """Pools of the model's own samples, and samples steered to every reward by every method at every strength."""

    def __init__(self, setup: ImageSetup, config: RaceConfig, say: Say = lambda line: None) -> None:
        super().__init__(setup, config, say)
        for name in config.methods:
            image_variant(name)  # what does not exist is refused before anything runs
        self.rewards: dict[str, Callable[..., Tensor]] = {name: image_reward(setup, name) for name in config.rewards}
        self.images = setup.everything()
        self.on_data = scores_of(self.rewards, self.images, setup.cond_of_everything())

    @cached_property
    def races(self) -> dict[str, "RewardRace"]:
        """One a reward."""
        return {name: RewardRace(self, name) for name in self.rewards}

    @cached_property
    def parts(self) -> dict[str, slice]:
        """How a pool is cut."""
        return ranges(self.config.pool, self.setup.shard if self.setup.latent else BATCH)

    def cells(self) -> Cells:
        pools = {
            f"{pool}.{part}": partial(self._pool, pool, index) for pool in POOLS for part, index in self.parts.items()
        }
        return pools | {
            f"{race.name}.{name}.{number!r}": partial(race.steer, name, number)
            for race in self.races.values()
            for name, number in self._steered()
        }

    def judge(self, drawn: Drawn) -> Raced:
        for pool in POOLS:
            made = [drawn(f"{pool}.{part}") for part in self.parts]
            images = torch.cat([part.tensors["samples"] for part in made])
            scores = self.by_reward(torch.cat([part.tensors["scores"] for part in made], 1))
            cost = cost_of_parts(made, self.config.pool)
            for race in self.races.values():
                for n in self.config.best_of:
                    race.best_of(pool, n, images, scores, cost)
        for race in self.races.values():
            for name, number in self._steered():
                race.steered(name, number, drawn(f"{race.name}.{name}.{number!r}"))
        return Raced(self.setup, self.config, {name: race.result() for name, race in self.races.items()})

    def by_reward(self, rows: Tensor) -> dict[str, Tensor]:
        """Rewards by name, of a cell's rows (rewards, n)."""
        return dict(zip(self.rewards, rows.cpu(), strict=True))

    def _steered(self) -> list[tuple[str, float]]:
        return [(name, number) for name in self.config.methods for number in self.config.numbers(name)]

    @torch.no_grad()
    def _pool(self, kind: str, index: slice) -> Shard:
        """Samples of the model itself, those of these indices, and their rewards."""
        model, config, n = self.setup.model, self.config, index.stop - index.start
        if index.start == 0:
            self.say(f"a pool of {config.pool:,} samples: {POOLS[kind]}")
        g, steps = stream(config.seed, "pool", kind, index.start), config.steps_of(kind)
        cond = self.setup.cond_of_noise(config.pool, "pool", config.seed, index)
        with Meter(model.network) as meter, self.setup.autocast():
            if kind == "ode":
                noise = randn((n, *model.event_shape), g, model.dtype, model.device)
                x = self.setup.flow(noise, steps, cond)
            else:
                x = model.generate(n, steps, g, cond)
        scores = torch.stack([*scores_of(self.rewards, x, cond).values()])
        return Shard({"samples": x, "scores": scores}, {"cost": meter.cost()})


class Made(NamedTuple):
    """Samples of a cell with their rewards and features, and what one cost."""

    x: Tensor
    scores: Mapping[str, Tensor]
    features: Tensor
    cost: dict[str, float]
    lost: int = 0
    seeds: Tensor | None = None


class RewardRace:
    """The cells of one reward."""

    def __init__(self, race: Race, name: str) -> None:
        self.race, self.setup, self.config, self.name = race, race.setup, race.config, name
        self.on_data, images = race.on_data[name], race.images
        self.scale = float(self.on_data.std()) or 1.0  # a reward that is the same for all data has no scale
        self.best = self.on_data.topk(min(len(images), max(2 * SUBSET, round(TOP * len(images))))).indices
        self.cells: list[Cell] = []
        best = self.best[:PICTURED]
        self.shown = {"target data": self._shown(images[best.to(images.device)], self.on_data[best])}

    @cached_property
    def target(self) -> Tensor:
        """Features of the data with the highest reward; only who puts the cells together needs them."""
        return self.setup.judge.features(self.race.images[self.best.to(self.race.images.device)])

    def best_of(self, pool: str, n: int, images: Tensor, scores: Mapping[str, Tensor], cost: dict[str, float]) -> None:
        """Groups of n, the best of each; a group costs n samples and n rewards."""
        groups = min(len(images) // n, max(self.config.samples, SUBSET))
        order = torch.randperm(len(images), generator=stream(self.config.seed, "groups", pool, n))[: groups * n]
        won = scores[self.name][order].reshape(groups, n).argmax(1, keepdim=True)
        best = order.reshape(groups, n).gather(1, won)[:, 0]
        each = {key: n * value for key, value in cost.items()}
        each |= {"reward_calls": float(n), "nfe": n * cost["nfe"] + n}
        x = images[best.to(images.device)]
        self._add(pool, n, Made(x, {k: v[best] for k, v in scores.items()}, self.setup.judge.features(x), each))

    def steer(self, name: str, strength: float) -> Shard:
        """Samples of one method at λ/σ, or rescaled to γ = strength."""
        setup, config, v = self.setup, self.config, image_variant(name)
        self.race.say(f"{self.name}: {name}, {'γ' if v.rescaled else 'λσ'} = {strength:g}")
        weight = config.rescale_strength if v.rescaled else strength
        reward = self.race.rewards[self.name]
        if weight:
            reward = Tempered(reward, weight / self.scale)
        process = ODE(steps=config.steps)
        if v.rescaled:
            process = replace(process, renormalize="rescale", renormalize_to=strength)
        g = stream(config.seed, "race", self.name, name, repr(strength))
        labels = labels_of(name, setup.labels(config.samples, "race", config.seed))
        x, result = run(setup, v, reward, config.samples, process, g, labels)
        kept, finite = {"samples": x, "seeds": result.seeds[: len(x)]}, x.flatten(1).isfinite().all(1)
        x = x[finite]
        if len(x) >= SUBSET:
            cond = setup.cond(None if labels is None else labels[finite], len(x))
            kept["scores"] = torch.stack([*scores_of(self.race.rewards, x, cond).values()])
            kept["features"] = setup.judge.features(x)
        return Shard(kept, {"cost": cost_of(result)})

    def steered(self, name: str, strength: float, made: Shard) -> None:
        """Judge these samples."""
        x, lost = finite_samples(made.tensors["samples"])
        if len(x) < SUBSET:
            self.cells.append(Cell(method=name, number=strength, lost=lost))
            return
        scores = self.race.by_reward(made.tensors["scores"])
        seeds = made.tensors["seeds"][made.tensors["samples"].flatten(1).isfinite().all(1)]
        self._add(name, strength, Made(x, scores, made.tensors["features"], made.facts["cost"], lost, seeds))

    def result(self) -> RewardResult:
        """The cells, and what they are held against."""
        first = self.setup.judge.features(self.race.images[:BATCH])
        data = TargetData(
            target_reward=float(self.on_data[self.best].mean()),
            reward=float(self.on_data.mean()),
            reward_std=self.scale,
            target_images=len(self.best),
            base_frechet=self.spread(first).frechet,
            **asdict(self.spread(self.target)),
        )
        return RewardResult(data, self.cells, self.shown)

    def spread(self, features: Tensor) -> Spread:
        """Of samples with these features; sets of SUBSET make their figures those of other cells."""
        distance = mean_pairwise_distance(features)
        sets = [part for part in features.split(SUBSET) if len(part) == SUBSET][:SETS]
        if not sets:
            return Spread(distance=distance, vendi=None, frechet=None)
        vendi, frechet = map(vendi_score, sets), (frechet_distance(part, self.target) for part in sets)
        return Spread(distance=distance, vendi=sum(vendi) / len(sets), frechet=sum(frechet) / len(sets))

    def _add(self, method: str, number: float, made: Made) -> None:
        own = made.scores[self.name]
        cell = RaceCell(
            method=method,
            number=number,
            reward=float(own.mean()),
            reward_se=float(own.std() / math.sqrt(len(own))),
            others={name: float(score.mean()) for name, score in made.scores.items() if name != self.name},
            samples=len(own),
            lost=made.lost,
            cost=made.cost,
            **asdict(self.spread(made.features)),
        )
        self.cells.append(cell)
        self.shown[cell.key] = self._shown(made.x, own, made.seeds)

    def _shown(self, x: Tensor, rewards: Tensor, seeds: Tensor | None = None) -> ShownSamples:
        pictures = self.setup.decode(x[:PICTURED]).cpu()
        return ShownSamples(pictures, rewards[:PICTURED].cpu(), None if seeds is None else seeds[:PICTURED].cpu())
