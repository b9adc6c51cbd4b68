"""The cells of the reward race: samples of best-of-N or of a method at one strength, and what comes of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from metaflowmaps.lab.evaluate.images.setup import TableRows, table
from metaflowmaps.lab.evaluate.images.steered import image_variant
from metaflowmaps.lab.evaluate.rows import Json

SUBSET = 64
SINGLE = ("mfm-g-1", "mfm-g-plain-1", "mfm-g-rescale-1")  # MFM-G with one draw a step
POOLS = {
    "ode": "best-of-N of ODE samples",
    "map-1": "best-of-N of map samples, 1 step",
    "map-4": "best-of-N of map samples, 4 steps",
}
FRONTIERS = {"distance": "mean distance", "frechet": "Fréchet to target"}


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean pairwise distance, and Vendi score and Fréchet distance to the target on sets of SUBSET; None: too few."""

    distance: float
    vendi: float | None
    frechet: float | None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Samples of best-of-N of a pool, ``number`` its N, or of a method, ``number`` its λσ or γ.

    A method that breaks at a strength is a cell that says so, and is not scored.
    """

    method: str
    number: float
    lost: int = 0

    def to_json(self) -> Json:
        """{method, strength | n, lost} and what a scored cell has besides."""
        found = asdict(self)
        return {
            "method": found.pop("method"),
            "n" if self.method in POOLS else "strength": found.pop("number"),
            **found,
        }


@dataclass(frozen=True, kw_only=True)
class RaceCell(Spread, Cell):
    """One that is scored."""

    reward: float
    reward_se: float
    others: dict[str, float]  # rewards that it was not steered by
    samples: int
    cost: dict[str, float]

    @property
    def key(self) -> str:
        """Its name among the samples that are shown."""
        return f"{self.method} {self.number:g}"


@dataclass(frozen=True)
class Headline:
    """MFM-G with one draw against best-of-N of a pool, at its largest N."""

    n: float
    reached: bool
    method: str
    strength: float
    reward: float
    rival_reward: float
    nfe_ratio: float
    seconds_ratio: float
    distance: float
    rival_distance: float
    frechet: float | None
    rival_frechet: float | None


def headline(cells: Iterable[RaceCell]) -> dict[str, Headline]:
    """By pool: the most diverse MFM-G of one draw that reaches the reward of best-of-N, and the ratios.

    Where none does, the one of highest reward, with ``reached`` false.
    """
    cells, found = list(cells), {}
    single = [cell for cell in cells if cell.method in SINGLE]
    for pool in POOLS:
        rival = max((cell for cell in cells if cell.method == pool), key=lambda cell: cell.number, default=None)
        if rival is None or not single:
            continue
        enough = [cell for cell in single if cell.reward >= rival.reward]
        best = max(single, key=lambda cell: cell.reward)
        ours = max(enough, key=lambda cell: cell.distance, default=best)
        found[pool] = Headline(
            n=rival.number,
            reached=bool(enough),
            method=ours.method,
            strength=ours.number,
            reward=ours.reward,
            rival_reward=rival.reward,
            nfe_ratio=rival.cost["nfe"] / ours.cost["nfe"],
            seconds_ratio=rival.cost["seconds"] / ours.cost["seconds"],
            distance=ours.distance,
            rival_distance=rival.distance,
            frechet=ours.frechet,
            rival_frechet=rival.frechet,
        )
    return found


def frontier(cells: Iterable[RaceCell], what: str) -> list[RaceCell]:
    """The cells that no other beats in reward and in ``what`` at once (distance: more is better; frechet: less)."""
    sign = 1.0 if what == "distance" else -1.0
    goods = [(cell, getattr(cell, what)) for cell in cells if getattr(cell, what) is not None]
    points = [(cell.reward, sign * value) for cell, value in goods]

    def beaten(reward: float, good: float) -> bool:
        return any(r >= reward and g >= good and (r, g) != (reward, good) for r, g in points)

    return [cell for (cell, _), point in zip(goods, points, strict=True) if not beaten(*point)]


@dataclass(frozen=True, kw_only=True)
class TargetData(Spread):
    """What the data of the target have, and all data beside them."""

    target_reward: float
    reward: float
    reward_std: float
    target_images: int
    base_frechet: float | None


class ShownSamples(NamedTuple):
    """The first samples of a cell: pictures (n, C, H, W), rewards (n,), and seeds (n,) where each has one."""

    pictures: Tensor
    rewards: Tensor
    seeds: Tensor | None = None


COLUMNS: dict[str, Callable[[RaceCell], object]] = {
    "NFE": lambda cell: round(cell.cost["nfe"]),
    "ms": lambda cell: 1000 * cell.cost["seconds"],
    "samples": lambda cell: cell.samples,
}


@dataclass(frozen=True)
class RewardResult:
    """All cells of one reward, what the data have, and the first samples of each cell."""

    data: TargetData
    cells: list[Cell]
    shown: dict[str, ShownSamples]

    @property
    def scored(self) -> list[RaceCell]:
        """The cells that did not break."""
        return [cell for cell in self.cells if isinstance(cell, RaceCell)]

    @cached_property
    def headline(self) -> dict[str, Headline]:
        """MFM-G with one draw against best-of-N, by pool."""
        return headline(self.scored)

    def to_json(self) -> Json:
        """{data, cells, headline, frontier}."""
        return {
            "data": asdict(self.data),
            "cells": [cell.to_json() for cell in self.cells],
            "headline": {pool: asdict(found) for pool, found in self.headline.items()},
            "frontier": {what: [cell.key for cell in frontier(self.scored, what)] for what in FRONTIERS},
        }

    def table(self, brief: Mapping[str, str]) -> TableRows:
        """One row a cell, and one for the data of the target."""
        others = list(self.scored[0].others)
        head = ["method", "λσ, γ or N", "reward", "±", *(f"{brief[other]} too" for other in others), "mean distance"]
        head += [f"Vendi of {SUBSET}", "Fréchet to target", *COLUMNS]
        rows: list[list[object]] = [
            [
                *(title(cell.method), cell.number, cell.reward, cell.reward_se, *cell.others.values()),
                *(cell.distance, cell.vendi, cell.frechet, *(column(cell) for column in COLUMNS.values())),
            ]
            for cell in self.scored
        ]
        data = self.data
        target = ["data of the target", None, data.target_reward, None, *(None for _ in others)]
        return table(head, [*rows, [*target, data.distance, data.vendi, data.frechet, None, None, data.target_images]])


def title(method: str) -> str:
    """As tables and figures call it."""
    return POOLS[method] if method in POOLS else image_variant(method).title
