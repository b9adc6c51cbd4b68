"""What results.json holds, typed: a view is read once, at the door, and what does not fit is refused by name.

A view names what figures and the report look at; the rest of the document is none of its business. JSON has no NaN:
a figure that was not finite is null there, and NaN again here.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from metaflowmaps.errors import InputError

Number = Annotated[float, BeforeValidator(lambda held: math.nan if held is None else held)]
Metrics = Mapping[str, object]
AtTimes = dict[str, Number]  # by time, as its repr


class ResultView(BaseModel):
    """The base of every view."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    @classmethod
    def of(cls, document: object) -> Self:
        """The view of a document, or of a part of it."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "document"
            raise InputError(f"{where}: {first['msg']}") from None


class Table(ResultView):
    """A table that metrics bring: its cells are numbers, words, or nothing."""

    head: list[str]
    rows: list[list[bool | int | float | str | None]]


class Results(ResultView):
    """The document of a command."""

    schema_: Literal[1] = Field(1, alias="schema")
    command: str
    invocation: str = ""
    config: dict[str, object] = {}
    metrics: dict[str, object]
    cost: dict[str, object]
    environment: dict[str, object]


class Spoken(ResultView):
    """What metrics may say of themselves."""

    tables: dict[str, Table] | None = None
    captions: dict[str, str] = {}
    summary: str | None = None


# -- mixtures --------------------------------------------------------------------------------------------------------


class PosteriorErrors(ResultView):
    """``mfm eval posterior`` of a mixture: relative sliced W2 by time."""

    relative_sw2: AtTimes
    floor: AtTimes
    ratio: AtTimes
    spread: dict[str, float | None]
    by_sampler: dict[str, AtTimes]
    network_calls_per_draw: dict[str, float]
    floor_of_others: AtTimes
    glass_calls_to_match_one_map_step: dict[str, int | None]


class ValueFit(ResultView):
    """How estimated values and exact ones agree."""

    pearson: Number
    rmse: Number


class ValueErrors(ResultView):
    """``mfm eval value`` of a mixture: by sampler, by time."""

    by_sampler: dict[str, dict[str, ValueFit]]
    network_calls_per_draw: dict[str, float]
    seconds_by_sampler: dict[str, float]
    num_draws: int
    value_std: AtTimes

    @property
    def times(self) -> list[str]:
        """As the keys have them."""
        return list(next(iter(self.by_sampler.values())))


class Cost(ResultView):
    """The cost of a cell, of all its samples; nfe is per sample."""

    nfe: float
    seconds: float
    forwards: float
    backwards: float
    reward_calls: float


class Course(ResultView):
    """What was measured along the trajectory."""

    time: list[float] = []
    ess: list[Number] = []
    gradient_norm: list[Number] = []


class SteeredCellView(ResultView):
    """One method with one number of draws, against exact samples of the tilted law."""

    sw2: Number
    floor_sw2: float
    mmd: float | None
    mode_l1: Number
    floor_mode_l1: float = math.nan
    reward: Number
    samples: int  # a seed
    seeds: int
    cost: Cost
    trajectory: Course = Course()
    title: str = ""

    @property
    def ratio(self) -> float:
        """SW2 to its floor."""
        return self.sw2 / self.floor_sw2

    @property
    def mode_ratio(self) -> float:
        """The error of mode weights to its floor."""
        return self.mode_l1 / self.floor_mode_l1

    @property
    def total(self) -> int:
        """Samples of all seeds."""
        return self.samples * self.seeds

    @property
    def milliseconds(self) -> float:
        """A sample."""
        return 1000 * self.cost.seconds / self.total


class ModeFloor(ResultView):
    """The error of mode weights of exact samples."""

    mode_l1: float


class Steering(ResultView):
    """``mfm eval steering`` of a mixture: cells by method and number of draws."""

    methods: dict[str, dict[str, SteeredCellView]]
    floor: ModeFloor
    exact_reward: float

    def lines(self) -> Iterator[tuple[str, list[SteeredCellView]]]:
        """Each method's cells, in the order of their draws."""
        for name, by_draws in self.methods.items():
            yield name, [by_draws[key] for key in sorted(by_draws, key=int)]

    def cells(self) -> Iterator[tuple[str, str, SteeredCellView]]:
        """Method, number of draws, and cell."""
        for name, by_draws in self.methods.items():
            for key in sorted(by_draws, key=int):
                yield name, key, by_draws[key]
