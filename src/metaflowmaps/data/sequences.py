"""Sequences as data of general contexts: your own files, and a process whose posteriors are known."""

import io
import math
from abc import abstractmethod
from collections.abc import Iterable
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps.data.context_source import ContextSource, Fitted
from metaflowmaps.data.data_source import SampleSource, keep
from metaflowmaps.data.paths import ContextLaw, Paths
from metaflowmaps.data.sequence_files import read_sequences, stacked
from metaflowmaps.errors import InputError
from metaflowmaps.laws.processes import PROCESSES, GaussianProcess, ProcessMixture
from metaflowmaps.random import stream

FITTED_PATHS, FITTED_NUMBERS = 20_000, 2**25  # at most so many paths tell mean and covariance, of so many numbers
MAX_NODES = 65
HELD_OUT = 2_000  # paths of a process


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
        count = max(2, min(FITTED_PATHS, FITTED_NUMBERS // (nodes * math.prod(paths.event_shape))))
        if self.stationary:
            grid, row, at = self._stretches(paths, nodes, count, generator)
        else:
            times, exact = paths.times, paths.shared and paths.values.shape[1] == nodes
            grid = times[0] if exact else torch.linspace(float(times.min()), float(times.max()), nodes)
            row = torch.randperm(len(paths), generator=generator)[:count]
            at = grid.expand(len(row), -1)
        drawn = paths.at(row, at)
        if not bool((drawn.std(0, correction=0) > 0).any()):
            fix = "of one long series: --set data.stationary=true" if len(paths) == 1 else "there is nothing to learn"
            raise InputError(f"sequences are alike at every time: {fix}")
        return Fitted(grid, drawn, self.contexts.least)

    def _stretches(
        self, paths: Paths, nodes: int, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lags (K,), and paths (n,) with the times (n, K) that lie so about a target, inside where possible."""
        length = float((paths.times[:, paths.window - 1] - paths.times[:, 0]).median())
        lags = torch.linspace(-length, length if self._both_ways else 0.0, nodes)
        row, place = paths.targets[torch.randint(len(paths.targets), (count,), generator=generator)].unbind(1)
        at = paths.times[row, place][:, None] + lags
        inside = (at[:, 0] >= paths.times[row, 0]) & (at[:, -1] <= paths.times[row, -1])
        return (lags, row[inside], at[inside]) if bool(inside.any()) else (lags, row, at)


class Sequences(PathSource):
    """Your own sequences: (n, time, *event) in .npy, in .npz as ``values`` with ``times``; folders of frames."""

    name: ClassVar[str] = "sequences"

    path: str | None = None
    size: int | None = Field(None, ge=1, le=1024)  # side of frames; None: their own, at most 64
    hold_out: float = Field(0.1, gt=0, lt=1)  # of the paths; of a single one its end
    missing: Literal["refuse", "mask"] = "refuse"  # what NaN is taken for: a mistake, or no observation

    def given(self, data: Any, folder: Path) -> Self:
        """The path of a file or folder; an array (n, time, *event); or sequences (time, *event) one after the other."""
        if isinstance(data, str | PathLike):
            return self.moved(str(data))
        if not isinstance(data, Iterable):
            raise InputError(f"sequences are a path, an array (n, time, …) or an iterable, got {type(data).__name__}")
        if isinstance(data, Tensor | np.ndarray) and data.ndim == 1:
            data = [data]
        held, content = stacked(data, "data"), io.BytesIO()
        np.savez(content, **{name: part.numpy() for name, part in held._asdict().items()})
        return self.moved(keep(content.getvalue(), folder / "data.npz"))

    def paths(self) -> tuple[Paths, Paths]:
        """The file in two parts, split by a fixed seed; of a single path the end is held out."""
        if self.path is None:
            raise InputError(
                "sequences need a file: --data FILE.npy, an array (n, time, …), .npz with times, or a folder of frames"
            )
        path = Path(self.path).expanduser()
        version = path.stat().st_mtime if path.exists() else 0.0
        return _read(path, version, self.size, self.hold_out, self.missing, self.contexts)

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
        return _drawn(self.model_dump_json())

    def describe(self) -> str:
        """Which process."""
        return (
            f"{self.num:,} paths of {self.process} at {self.times[2]} times in [{self.times[0]:g}, {self.times[1]:g}]"
        )


@lru_cache(maxsize=1)
def _drawn(described: str) -> tuple[Paths, Paths]:
    source = Process.model_validate_json(described)
    law, times = source.exact(), torch.linspace(*source.times)
    train, held = (law.sample(times, n, stream(0, "paths", part)) for part, n in enumerate((source.num, HELD_OUT)))
    return Paths(train, times, source.contexts), Paths(held, times, source.contexts)


@lru_cache(maxsize=1)
def _read(
    path: Path, version: float, size: int | None, hold_out: float, missing: str, law: ContextLaw
) -> tuple[Paths, Paths]:
    """A file in two parts; ``version`` is when it was written."""
    values, times, ends = read_sequences(path, size)
    seen = values.isfinite().flatten(2).all(2)
    lost = int((~seen & (torch.arange(values.shape[1]) < ends[:, None])).sum())
    if lost and missing == "refuse":
        raise InputError(f"{path} has {lost:,} places that are not finite: --set data.missing=mask, or fill them in")
    kept = seen.any(1)  # a path that was never seen tells nothing
    values, times = values[kept], times if times.ndim == 1 else times[kept]
    if not len(values):
        raise InputError(f"{path} holds no number that is finite")
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
