r"""Work cut into shards that any process may make, kept on disk; processes know of each other by files alone.

A shard is a function of its name and of what the directory was claimed for: every sample has its own seed
(:mod:`metaflowmaps.random`), so a range of sample indices is a shard, and whoever makes it makes the same. How
shards are cut does not depend on how many workers there are. Worker i of K takes shards i, i + K, …; one that is
nobody's takes all that are missing. In the folder:

    plan.json           the size of a shard and the name of every one, in order; written once
    NAME.safetensors    the tensors of a shard
    NAME.json           their sha256 and size, and facts such as what they cost: without it a shard is not there
    NAME.lock           held (flock) while the shard is made

The tensors are written before the entry that vouches for them, each whole or not at all. So a process may be killed at
any moment, and no reader ever sees half of a shard; one that does not match its hash is made again. Locks only save
work: where a file system has none, two processes may make a shard twice, and write the same.

What a process has made it keeps in memory and does not read again. Work of one shard that nobody shares touches no
disk: there is nothing to go on from before it is done.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from metaflowmaps._files import lock, locked, read_regular, sweep, write_json, write_whole
from metaflowmaps.errors import InputError
from metaflowmaps.work.progress import counted

FOLDERS = ("shards", "cells")  # of samples, of an evaluation
PLAN = "plan.json"
SHARD_SIZE = 64  # samples, where work is shared and nobody says
WHOLE_SIZE = 4096  # rows, where nobody shares it
FEW = 24  # shards, each of which is told of when it is made
Say = Callable[[str], None]
Facts = dict[str, Any]  # JSON


class Shard(NamedTuple):
    """Tensors and, in JSON, what else is known of them."""

    tensors: dict[str, Tensor]
    facts: Facts


class ShardEntry(NamedTuple):
    """What vouches for a shard on disk."""

    sha256: str
    bytes: int
    facts: Facts


class ShardPlan(NamedTuple):
    """How work is cut: samples a shard, the names of all shards in order, and the settings that the plan is for."""

    size: int
    names: list[str]
    settings: Facts


@dataclass(frozen=True)
class Worker:
    """One of ``count`` processes that share the work."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class Share(NamedTuple):
    """How a process takes part: which worker it is (None: it makes all that is missing), and samples a shard."""

    worker: Worker | None = None
    size: int | None = None  # None: as the plan has it, or by default

    def usual_size(self, unit: int = 1, copies: int = 1) -> int:
        """Samples a shard where nobody says: whole systems of ``unit`` particles, of ``copies`` rows a sample."""
        most = SHARD_SIZE if self.worker is not None else max(SHARD_SIZE, WHOLE_SIZE // copies)
        return max(1, most // unit) * unit


def share_of(worker: str | None, size: int | None) -> Share:
    """Of --worker i/K and --shard-size; under torchrun a process is worker RANK/WORLD_SIZE unless told otherwise."""
    if worker is None and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        worker = f"{os.environ['RANK']}/{os.environ['WORLD_SIZE']}"
    if worker is None:
        return Share(None, size)
    index, _, count = worker.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--worker takes i/K with i from 0 to K − 1, such as 0/4, got {worker!r}")
    return Share(Worker(int(index), int(count)), size)


def ranges(count: int, size: int, prefix: str = "") -> dict[str, slice]:
    """Shards of ``size`` samples, the last one as many as are left: name -> indices."""
    return {f"{prefix}{i:05d}": slice(begin, min(count, begin + size)) for i, begin in enumerate(range(0, count, size))}


class Unfinished(Exception):
    """Not this worker's to go on: ``missing`` shards are for others to make, or (0) another puts them together."""

    def __init__(self, shards: int, missing: int) -> None:
        super().__init__(f"{missing} of {shards} shards are missing")
        self.shards, self.missing = shards, missing


class ShardInterrupted(Exception):
    """A shard that was not finished: what there is of it, and why."""

    def __init__(self, shard: Shard, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.shard, self.cause = shard, cause


class ShardFolder:
    """The shards of one directory.

    Args:
        folder: Where the plan, the entries and the locks are.
        worker: Which worker this process is; None makes all that is missing.
        finished: Has somebody put the shards together already?
        say: Takes a line of progress.
        product: Where the tensors are to stay, if the shards themselves are what is wanted; else they lie in the
            folder, and this process remembers those it made.
    """

    def __init__(
        self,
        folder: Path,
        worker: Worker | None,
        finished: Callable[[], bool],
        say: Say,
        product: Path | None = None,
    ) -> None:
        self.folder, self.worker, self.finished, self.say = folder, worker, finished, say
        self.names: list[str] = []
        self._product = product
        self._kept: dict[str, Shard] = {}
        self._in_memory = False  # one shard that nobody shares
        self._merging: int | None = None
        self._began = time.perf_counter()
        self._ready = self._began  # when all shards were there

    def size(self, share: Share, default: int) -> int:
        """Samples a shard: as planned already, as told, or by default; what contradicts the plan is refused."""
        plan = read_plan(self.folder)
        if plan is None:
            return share.size or default
        if share.size not in (None, plan.size):
            raise InputError(
                f"{self.folder} is cut into shards of {plan.size}: leave --shard-size out, or choose another --out"
            )
        return plan.size

    def begin(self, names: Sequence[str], size: int, settings: Mapping[str, Any] | None = None) -> None:
        """Write the plan, with the settings that it is for, or find it written."""
        self.names = list(names)
        wanted = ShardPlan(size, self.names, dict(settings or {}))
        alone = self.worker is None and len(self.names) == 1 and self._product is None
        self._in_memory = alone and read_plan(self.folder) is None
        if self._in_memory:
            return
        self.folder.mkdir(exist_ok=True)
        sweep(self.folder)
        with locked(self.folder / "plan.lock"):
            held = read_plan(self.folder)
            if held is None:
                write_json(self.folder / PLAN, wanted._asdict())
            elif held != wanted:
                raise InputError(
                    f"{self.folder} is cut in another way: leave --shard-size out, or choose another --out"
                )

    def work(self, make: Callable[[str], Shard]) -> None:
        """Make what is missing, and return where it is for this process to put all together; else ``Unfinished``."""
        if self._in_memory:
            if self.names[0] not in self._kept:
                self._make_one(self.names[0], make)
            self._ready = time.perf_counter()
            return
        own = self.names if self.worker is None else self.names[self.worker.index :: self.worker.count]
        try:
            mine = counted([name for name in own if not self.has(name)], self.say, "shards")
            others = [name for name in mine if not self.has(name) and not self._make(name, make, wait=False)]
            for name in others if self.worker is None else []:  # another process is at it: it may yet be killed
                self._make(name, make, wait=True)
            missing = sum(not self.has(name) for name in self.names)
            if missing and not self.finished():
                raise Unfinished(len(self.names), missing)
            self._merging = lock(self.folder / "merge.lock", wait=self.worker is None)
        except FileNotFoundError:  # put together and cleared away meanwhile
            if not self.finished():
                raise
        if self._merging is None or self.finished():
            raise Unfinished(len(self.names), 0)
        self._ready = time.perf_counter()

    def get(self, name: str, make: Callable[[str], Shard]) -> Shard:
        """A shard; one that was damaged since is made again."""
        shard = self.read(name)
        if shard is None:
            self._make(name, make, wait=True)
            shard = self.read(name)
        if shard is None:
            raise InputError(f"{self.tensors_of(name)} does not keep what is written: check the disk")
        return shard

    def has(self, name: str) -> bool:
        """Is a shard there, by its entry and its size? Its hash is looked at when it is read."""
        entry = self.entry(name)
        with suppress(FileNotFoundError):
            return entry is not None and self.tensors_of(name).stat().st_size == entry.bytes
        return False

    def read(self, name: str) -> Shard | None:
        """A shard as it was made; None where it is missing or damaged."""
        if name in self._kept:
            return self._kept[name]
        entry = self.entry(name)
        if entry is not None:
            with suppress(FileNotFoundError):
                data = self.tensors_of(name).read_bytes()
                if sha256(data).hexdigest() == entry.sha256:
                    return Shard(load(data), entry.facts)
        return None

    def entry(self, name: str) -> ShardEntry | None:
        """What is known of a shard on disk; None where it is not there."""
        with suppress(FileNotFoundError, ValueError, TypeError):
            return ShardEntry(**json.loads(read_regular(self.folder / f"{name}.json")))
        return None

    def vouch(self, name: str, entry: ShardEntry | None) -> None:
        """Write what is known of a shard, or withdraw it."""
        file = self.folder / f"{name}.json"
        if entry is None:
            file.unlink(missing_ok=True)
        else:
            write_json(file, entry._asdict())

    def tensors_of(self, name: str) -> Path:
        """Where its tensors are."""
        return (self._product or self.folder) / f"{name}.safetensors"

    def cost(self) -> dict[str, float]:
        """Seconds that the shards took, whoever made them, and since; where others had a part in them, by the clock."""
        since = time.perf_counter() - self._ready
        spans = [facts["span"] for facts in map(self._facts, self.names) if facts is not None]
        wall = wall_seconds(spans)
        seconds = {"seconds": sum(ended - began for began, ended in spans) + since}
        shared = self.worker is not None or wall > self._ready - self._began
        return {**seconds, "wall_seconds": wall + since} if shared else seconds

    def close(self) -> None:
        """Let go of the lock on putting together."""
        if self._merging is not None:
            os.close(self._merging)
            self._merging = None

    def _facts(self, name: str) -> Facts | None:
        if name in self._kept:
            return self._kept[name].facts
        entry = self.entry(name)
        return None if entry is None else entry.facts

    def _make(self, name: str, make: Callable[[str], Shard], wait: bool) -> bool:
        """Make a shard unless it is there by now; False where another process is at it."""
        with locked(self.folder / f"{name}.lock", wait=wait) as held:
            if not held:
                return False
            if self.finished() or (self.has(name) and self.read(name) is not None):
                return True
            if self.tensors_of(name).exists():
                self.say(f"{self.tensors_of(name)} is damaged: making it again")
                self.vouch(name, None)  # its entry must not come to vouch for other bytes
            shard = self._make_one(name, make)
            data = save(shard.tensors)
            write_whole(self.tensors_of(name), data)
            self.vouch(name, ShardEntry(sha256(data).hexdigest(), len(data), shard.facts))
            if 1 < len(self.names) <= FEW or self.worker is not None:  # of many, alone, the progress tells
                self.say(f"{name} is made: {sum(map(self.has, self.names))} of {len(self.names)} are there")
        return True

    def _make_one(self, name: str, make: Callable[[str], Shard]) -> Shard:
        began = time.time()
        tensors, facts = make(name)
        here = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        shard = Shard(here, {**facts, "span": [began, time.time()]})
        if self._product is None:
            self._kept[name] = shard
        return shard


# -- together ----------------------------------------------------------------------------------------------------------


def total_cost(facts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Counts and seconds summed, the highest peak; where there are several, the time at least one was being made."""
    costs = [part["cost"] for part in facts]
    total = {
        key: max(c[key] for c in costs) if key == "peak_memory_bytes" else sum(c[key] for c in costs)
        for key in costs[0]
    }
    if len(facts) > 1:
        total["shards"] = len(facts)
        total["wall_seconds"] = wall_seconds([part["span"] for part in facts])
    return total


def wall_seconds(spans: Sequence[Sequence[float]]) -> float:
    """Length of the union of intervals [began, ended]: pauses between runs do not count."""
    length, until = 0.0, float("-inf")
    for began, ended in sorted((span[0], span[1]) for span in spans):
        length += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return length


def joined(shards: Sequence[Shard]) -> dict[str, Tensor]:
    """Tensors of several shards: rows one after another; what is called mean.… averaged, by number of samples."""
    total = sum(shard.facts["rows"] for shard in shards)
    return {
        key: torch.stack([shard.tensors[key] * (shard.facts["rows"] / total) for shard in shards]).sum(0)
        if key.startswith("mean.")
        else torch.cat([shard.tensors[key] for shard in shards])
        for key in shards[0].tensors
    }


# -- files -----------------------------------------------------------------------------------------------------------


def read_plan(folder: Path) -> ShardPlan | None:
    """The plan of a folder; None where nothing was begun."""
    with suppress(FileNotFoundError):
        try:
            return ShardPlan(**{"settings": {}, **json.loads(read_regular(folder / PLAN))})
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{folder / PLAN} is damaged: remove {folder} and run the command again") from None
    return None


def is_empty(folder: Path) -> bool:
    """Is no shard of this folder finished?"""
    return not any(folder.glob("*.safetensors"))


def discard(folder: Path) -> None:
    """Remove shards that were put together; what cannot be removed now is removed another time."""
    shutil.rmtree(folder, ignore_errors=True)
