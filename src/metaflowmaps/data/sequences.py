r"""Sequences as data of general contexts: paths seen at times, from which contexts and targets are drawn.

A sample is a path, a time r of it at which it was seen, and observations of it at other times, chosen by a law: how
many (uniform from ``least`` to ``most``), and where,

    any       anywhere in the window: interpolation and extrapolation both ways
    before    anywhere before r: forecasts from irregular observations
    latest    the last ones up to a lead before r, one after the other: the forecast of a series

X_r is the target. What is missing (NaN) is neither target nor observation. Drawing is a function of the generator.
"""

from abc import abstractmethod
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps.context import Context, beside
from metaflowmaps.data.data_source import DataSource, SampleSource
from metaflowmaps.errors import InputError
from metaflowmaps.laws.processes import PROCESSES, GaussianProcess, ProcessMixture
from metaflowmaps.random import stream
from metaflowmaps.work.choices import PickOutside
from metaflowmaps.work.config import Config

FITTED_PATHS = 20_000  # at most so many paths tell mean and covariance
MAX_NODES = 65


class ContextLaw(Config):
    """How many observations a context has, and where they lie."""

    least: int = Field(0, ge=0)
    most: int = Field(4, ge=1, le=4096)
    place: Literal["any", "before", "latest"] = "any"
    window: int | None = Field(None, ge=2)  # consecutive times among which a context lies; None: all
    lead: int = Field(1, ge=1)  # latest: r is up to so many times after the last observation

    @model_validator(mode="after")
    def _possible(self) -> "ContextLaw":
        if self.least > self.most:
            raise ValueError(f"least={self.least} observations are more than most={self.most}")
        return self


class Given(NamedTuple):
    """Targets and the contexts they were seen in."""

    x_1: Tensor
    context: Context


class Paths:
    """n paths, each seen at T times in order, NaN where it was not.

    Args:
        values: (n, T, *event).
        times: (T,) or (n, T), increasing.
        law: of contexts.
        first_target: the first place that a context may ask for.
    """

    def __init__(self, values: Tensor, times: Tensor, law: ContextLaw, first_target: int = 0) -> None:
        self.values, self.times, self.law = values, times.expand(values.shape[:2]), law
        self.first_target = first_target
        self.shared = times.ndim == 1  # by all paths
        self.event_shape = tuple(values.shape[2:])
        self.window = min(law.window or values.shape[1], values.shape[1])

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def seen(self) -> Tensor:
        """Where a path was seen, (n, T)."""
        return self.values.isfinite().flatten(2).all(2)

    @cached_property
    def targets(self) -> Tensor:
        """The (path, place) pairs that a context may ask for, (k, 2): those with as many observations as it takes."""
        law, place = self.law, torch.arange(self.values.shape[1])
        before = torch.cat([torch.zeros(len(self), 1).long(), self.seen.cumsum(1)], 1)  # how many were seen till then
        if law.place == "any":
            held = (before[:, -1:] - 1).expand_as(self.seen)
        else:
            end = (place + 1 - (law.lead if law.place == "latest" else 1)).clamp_min(0)
            held = before[:, end] - before[:, torch.minimum((place - self.window + 1).clamp_min(0), end)]
        found = (self.seen & (held >= law.least) & (place >= self.first_target)).nonzero()
        if not len(found):
            raise InputError(f"no path was seen {law.least} times before another: lower data.contexts.least")
        return found

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Targets alone, (n, *event)."""
        return self.sample_given(n, generator).x_1

    def sample_given(self, n: int, generator: torch.Generator | None = None) -> Given:
        """n targets with their contexts."""
        law, length = self.law, self.values.shape[1]
        path, asked = self.targets[torch.randint(len(self.targets), (n,), generator=generator)].unbind(1)
        count = torch.randint(law.least, law.most + 1, (n,), generator=generator)
        lowest, highest = (asked - self.window + 1).clamp_min(0), asked.clamp_max(length - self.window)
        room = highest - lowest + 1 if law.place == "any" else torch.ones_like(lowest)  # of forecasts r is the last
        start = lowest + (torch.rand(n, generator=generator) * room).long().clamp_max(length)
        order = torch.rand(n, length, generator=generator)
        lead = torch.randint(1, law.lead + 1, (n,), generator=generator)
        place, asked_there = torch.arange(length), asked[:, None]
        open_to = (place >= start[:, None]) & (place < start[:, None] + self.window) & (place != asked_there)
        if law.place != "any":
            open_to &= place < asked_there
        if law.place == "latest":
            open_to &= place <= (asked - lead)[:, None]
            order = (length - place).expand_as(order).float()
        open_to &= self.seen[path]
        order = torch.where(open_to, order, torch.inf)
        index = order.argsort(1)[:, : law.most]
        mask = open_to.gather(1, index) & (torch.arange(index.shape[1]) < count[:, None])
        values = self.values[path[:, None], index]
        values = torch.where(beside(mask, values), values, torch.zeros_like(values))
        context = Context(values, self.times[path[:, None], index], mask, self.times[path, asked])
        return Given(self.values[path, asked], context)

    def at(self, path: Tensor, times: Tensor) -> Tensor:
        """Paths (k,) at times (k, K), linear between those seen and constant beyond: (k, K, *event)."""
        seen, place = self.seen[path], torch.arange(self.values.shape[1])
        held = torch.where(seen, place, -1).cummax(1).values  # the last place seen; none before the first
        held = torch.where(held < 0, seen.int().argmax(1, keepdim=True), held)
        grid = self.times[path].contiguous()
        right = torch.searchsorted(grid, times.contiguous(), right=True).clamp(1, grid.shape[1] - 1)
        before, after = grid.gather(1, right - 1), grid.gather(1, right)
        part = ((times - before) / (after - before).clamp_min(1e-30)).clamp(0, 1)
        left, right = held.gather(1, right - 1), held.gather(1, right)
        return torch.lerp(
            self.values[path[:, None], left],
            self.values[path[:, None], right],
            beside(part, self.values).to(self.values),
        )


class Pairs:
    """Simulated pairs, each a target θ with one observation x at time 0.

    Args:
        theta: (n, *event).
        x: (n, *observed).
    """

    def __init__(self, theta: Tensor, x: Tensor) -> None:
        self.theta, self.x = theta, x

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Targets alone, (n, *event)."""
        return self.sample_given(n, generator).x_1

    def sample_given(self, n: int, generator: torch.Generator | None = None) -> Given:
        """n pairs, drawn with replacement."""
        index = torch.randint(len(self.x), (n,), generator=generator)
        return Given(self.theta[index], Context(self.x[index][:, None], torch.zeros(1), None, 0.0))


class Fitted(NamedTuple):
    """What a network that reads observations takes from the data."""

    nodes: Tensor  # (K,) times
    paths: Tensor  # (n, K, *event), paths at the nodes
    least: int  # observations that are trained with
    seen: Tensor  # (k, *observed) some observations


class ContextSource(DataSource):
    """Samples that come with a general context."""

    observed: ClassVar[bool] = True

    @abstractmethod
    def network_options(self) -> dict[str, Any]:
        """What the data decide of an ``observed`` network: how many observations, nodes, and of what shape."""

    @abstractmethod
    def fit(self, nodes: int) -> Fitted:
        """Paths at so many nodes, for the mean and the covariance that the network keeps."""

    @abstractmethod
    def held_out(self) -> Any:
        """What was not trained on, with ``sample_given(n, generator)``."""


class PathSource(ContextSource):
    """Paths and a law of contexts on them."""

    contexts: ContextLaw = ContextLaw()
    stationary: bool = False  # only lags matter: a map of a long series, used at times it has not seen
    nodes: int | None = Field(None, ge=2, le=1025)  # of mean and covariance; None: the times, at most 65

    @abstractmethod
    def paths(self) -> tuple[Paths, Paths]:
        """Paths to train on, and paths held out."""

    def samples(self) -> SampleSource:
        """The paths to train on."""
        return self.paths()[0]

    def held_out(self) -> Paths:
        """The paths held out."""
        return self.paths()[1]

    def event_shape(self) -> tuple[int, ...]:
        """Of a path at one time."""
        return self.paths()[0].event_shape

    def network_options(self) -> dict[str, Any]:
        """As many observations and nodes as there are."""
        length = self.paths()[0].window
        nodes = self.nodes or min(MAX_NODES, length * (2 if self._both_ways else 1))
        return {"max_observations": self.contexts.most, "stationary": self.stationary, "nodes": max(nodes, 2)}

    @property
    def _both_ways(self) -> bool:
        return self.stationary and self.contexts.place == "any"

    def fit(self, nodes: int) -> Fitted:
        """Up to 20,000 paths, or stretches of them about as many targets."""
        paths, generator = self.paths()[0], stream(0, "fit-process")
        if self.stationary:
            length = float((paths.times[:, paths.window - 1] - paths.times[:, 0]).median())
            grid = torch.linspace(-length, length if self._both_ways else 0.0, nodes)
            drawn = torch.randint(len(paths.targets), (FITTED_PATHS,), generator=generator)
            row, place = paths.targets[drawn].unbind(1)
            around = paths.times[row, place][:, None] + grid
            inside = (around[:, 0] >= paths.times[row, 0]) & (around[:, -1] <= paths.times[row, -1])
            if bool(inside.any()):
                row, around = row[inside], around[inside]
        else:
            exact = paths.shared and paths.values.shape[1] == nodes
            grid = (
                paths.times[0] if exact else torch.linspace(float(paths.times.min()), float(paths.times.max()), nodes)
            )
            row = torch.randperm(len(paths), generator=generator)[:FITTED_PATHS]
            around = grid.expand(len(row), -1)
        return Fitted(grid, paths.at(row, around), self.contexts.least, paths.values[paths.seen][:FITTED_PATHS])


class Sequences(PathSource):
    """Your own sequences: an array (n, time, *event) in .npy, or in .npz as ``values`` with ``times``."""

    name: ClassVar[str] = "sequences"

    path: str | None = None
    hold_out: float = Field(0.1, gt=0, lt=1)  # of the paths; of a single one its end
    missing: Literal["refuse", "mask"] = "refuse"  # what NaN is taken for: a mistake, or no observation

    def paths(self) -> tuple[Paths, Paths]:
        """The file in two parts, split by a fixed seed; of a single path the end is held out."""
        if self.path is None:
            raise InputError("sequences need a file: --data FILE.npy, an array (n, time, …), or .npz with times")
        return _read(self.path, self.hold_out, self.missing, self.contexts)

    def describe(self) -> str:
        """How many paths, of what."""
        train, held = self.paths()
        return (
            f"sequences from {self.path}: {len(train):,} paths to train on and {len(held):,} held out, "
            f"{train.values.shape[1]:,} times, events {'×'.join(map(str, train.event_shape))}"
        )


class Process(PathSource):
    """Paths of a process with exact posteriors."""

    name: ClassVar[str] = "process"

    process: Literal["ou", "brownian", "integrated-brownian", "ar2", "ou-mixture"] = "ou"
    options: dict[str, float] = Field(default_factory=dict)  # of the process
    times: tuple[float, float, int] = (0.0, 3.0, 25)  # first, last, how many
    num: int = Field(20_000, ge=2)  # paths to train on

    def exact(self) -> GaussianProcess | ProcessMixture:
        """The process itself."""
        try:
            return PROCESSES[self.process](**self.options)
        except TypeError as error:
            raise InputError(f"data.options of {self.process}: {error}") from None

    def paths(self) -> tuple[Paths, Paths]:
        """Paths drawn by a fixed seed."""
        law, (first, last, count) = self.exact(), self.times
        times = torch.linspace(first, last, count)
        key = self.model_dump_json()
        if key not in _DRAWN:
            _DRAWN.clear()
            train, held = (law.sample(times, n, stream(0, "paths", part)) for part, n in enumerate((self.num, 2_000)))
            _DRAWN[key] = Paths(train, times, self.contexts), Paths(held, times, self.contexts)
        return _DRAWN[key]

    def describe(self) -> str:
        """Which process."""
        return (
            f"{self.num:,} paths of {self.process} at {self.times[2]} times in [{self.times[0]:g}, {self.times[1]:g}]"
        )


@cache
def _read(path: str, hold_out: float, missing: str, law: ContextLaw) -> tuple[Paths, Paths]:
    values, times = read_sequences(Path(path).expanduser())
    lost = int((~values.isfinite().flatten(2).all(2)).sum())
    if lost and missing == "refuse":
        raise InputError(f"{path} has {lost:,} places that are not finite: --set data.missing=mask, or fill them in")
    if len(values) == 1:
        cut = round((1 - hold_out) * values.shape[1])
        if min(cut, values.shape[1] - cut) < 2:
            raise InputError(f"{path} is one path of {values.shape[1]} times: too few to hold some out")
        return Paths(values[:, :cut], times[..., :cut], law), Paths(values, times, law, first_target=cut)
    held = max(1, min(len(values) - 1, round(hold_out * len(values))))
    order = torch.randperm(len(values), generator=stream(0, "data-split"))

    def part(index: Tensor) -> Paths:
        return Paths(values[index], times if times.ndim == 1 else times[index], law)

    return part(order[held:]), part(order[:held])


def read_sequences(path: Path) -> tuple[Tensor, Tensor]:
    """Values (n, T, *event) and times (T,) or (n, T), float32; times are sorted, paths of plain numbers get an axis."""
    held = _arrays(path)
    if "values" not in held:
        raise InputError(f"{path} holds {', '.join(held) or 'nothing'}: call the array (n, time, …) values")
    values, given = torch.from_numpy(held["values"]).float(), held.get("times")
    if values.ndim == 1:
        values = values[None]
    if values.ndim == 2:
        values = values[..., None]
    if min(values.shape) < 1 or values.shape[1] < 2:
        raise InputError(f"{path} holds {tuple(values.shape)}: an array (n, time, …) of two times or more is needed")
    times = torch.arange(float(values.shape[1])) if given is None else torch.from_numpy(given)
    times = times.double()
    if tuple(times.shape) not in (tuple(values.shape[:2]), tuple(values.shape[1:2])) or not bool(
        times.isfinite().all()
    ):
        raise InputError(
            f"{path}: times must be finite, ({values.shape[1]},) or {tuple(values.shape[:2])}, got {tuple(times.shape)}"
        )
    times, order = times.sort(-1)
    if bool((times.diff(dim=-1) <= 0).any()):
        raise InputError(f"{path}: two values of one path have the same time: keep one of them")
    values = values[:, order] if times.ndim == 1 else values[torch.arange(len(values))[:, None], order]
    return values, times.float()


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name, float64."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                return {name: np.asarray(file[name], dtype=np.float64) for name in file.files}
        return {"values": np.asarray(np.load(path), dtype=np.float64)}
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}): give an .npy or .npz of numbers (n, time, …)") from None


_DRAWN: dict[str, tuple[Paths, Paths]] = {}  # the last process whose paths were drawn


class Simulator(ContextSource):
    """Pairs (θ, x) of a simulator: the target is θ, the one observation x. Simulation-based inference."""

    name: ClassVar[str] = "simulator"

    # file.py:name of simulate(n, generator) -> (θ (n, d), x (n, k))
    simulate: Annotated[Callable[..., tuple[Tensor, Tensor]] | None, PickOutside()] = None
    num: int = Field(10_000, ge=2)  # simulations to train on, once for all

    def pairs(self) -> tuple[Pairs, Pairs]:
        """Simulations to train on, and a tenth as many held out."""
        if self.simulate is None:
            raise InputError("a simulator is a function (n, generator) -> (θ, x): --set data.simulate=file.py:name")
        parts = [self.simulate(n, stream(0, "simulate", part)) for part, n in enumerate((self.num, self.num // 10 + 1))]
        for theta, x in parts:
            if theta.ndim < 2 or x.ndim < 2 or len(theta) != len(x):
                raise InputError(
                    f"simulate must return θ (n, d) and x (n, k), got {tuple(theta.shape)}, {tuple(x.shape)}"
                )
        train, held = (Pairs(theta.float(), x.float()) for theta, x in parts)
        return train, held

    def samples(self) -> SampleSource:
        """The simulations to train on."""
        return self.pairs()[0]

    def held_out(self) -> Pairs:
        """The simulations held out."""
        return self.pairs()[1]

    def event_shape(self) -> tuple[int, ...]:
        """Of θ."""
        return tuple(self.pairs()[0].theta.shape[1:])

    def network_options(self) -> dict[str, Any]:
        """One observation, of the shape of x."""
        shape = tuple(self.pairs()[0].x.shape[1:])
        return {"max_observations": 1, "stationary": False, "nodes": 1, "observed_shape": shape}

    def fit(self, nodes: int) -> Fitted:
        """θ at the one node."""
        train = self.pairs()[0]
        return Fitted(torch.zeros(1), train.theta[:, None], 1, train.x)

    def describe(self) -> str:
        """How many simulations, of what."""
        train = self.pairs()[0]
        return f"{self.num:,} simulations: θ {tuple(train.theta.shape[1:])}, x {tuple(train.x.shape[1:])}"
