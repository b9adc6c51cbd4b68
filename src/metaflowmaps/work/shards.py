r"""Work cut into pieces that any process may make, kept on disk; processes know of each other by files alone.

A piece is a function of its name and of what the directory was claimed for: every sample has its own seed
(:mod:`metaflowmaps.random`), so a range of sample indices is a piece, and whoever makes it makes the same. How
pieces are cut does not depend on how many workers there are. Worker i of K takes pieces i, i + K, …; one that is
nobody's takes all that are missing. In the folder:

    plan.json           the size of a shard and the name of every piece, in order; written once
    NAME.safetensors    tensors of a piece
    NAME.json           their sha256 and size, and facts such as what they cost: without it a piece is not there
    NAME.lock           held (flock) while the piece is made

Files are written under another name and renamed, the tensors before the entry that vouches for them. So a process may
be killed at any moment, and no reader ever sees half of a piece; one that does not match its hash is made again. Locks
only save work: where a file system has none, two processes may make a piece twice, and write the same.
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

from metaflowmaps._files import lock, locked, write_whole
from metaflowmaps.errors import InputError

FOLDERS = ("shards", "cells")  # of samples, of an evaluation
LOGS = "array"  # of the tasks of mfm array
PLAN = "plan.json"
SHARD = 64  # samples, where work is shared and nobody says
Say = Callable[[str], None]


class Made(NamedTuple):
    """A piece: tensors and, in JSON, what else is known of it."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


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


def own_device(name: str) -> str:
    """--device of this process: under torchrun every rank has its own GPU, the one of its LOCAL_RANK."""
    rank = os.environ.get("LOCAL_RANK", "")
    if name not in ("auto", "cuda") or not rank.isdecimal() or not torch.cuda.is_available():
        return name
    if int(rank) >= torch.cuda.device_count():
        raise InputError(
            f"local rank {rank} has no GPU of its own, this machine has {torch.cuda.device_count()}: use torchrun "
            f"--nproc-per-node {torch.cuda.device_count()}, or --device cpu"
        )
    return f"cuda:{rank}"


def ranges(count: int, size: int) -> dict[str, slice]:
    """Shards of ``size`` samples, the last one as many as are left: name -> indices."""
    return {f"{i:05d}": slice(begin, min(count, begin + size)) for i, begin in enumerate(range(0, count, size))}


class Elsewhere(Exception):
    """Not this worker's to go on: ``missing`` pieces are for others to make, or (0) another puts them together."""

    def __init__(self, pieces: int, missing: int) -> None:
        super().__init__(f"{missing} of {pieces} pieces are missing")
        self.pieces, self.missing = pieces, missing


class Pieces:
    """The pieces of one directory. ``finished``: has somebody put them together already?"""

    def __init__(self, folder: Path, worker: Worker | None, finished: Callable[[], bool], say: Say) -> None:
        self.folder, self.worker, self.finished, self.say = folder, worker, finished, say
        self.names: list[str] = []
        self._merging: int | None = None
        self._began = time.perf_counter()
        self._ready = self._began  # when all pieces were there

    def size(self, share: Share, default: int) -> int:
        """Samples a shard: as planned already, as told, or by default; what contradicts the plan is refused."""
        plan = read_plan(self.folder)
        if plan is None:
            return share.size or default
        if share.size not in (None, plan["size"]):
            raise InputError(
                f"{self.folder} is cut into shards of {plan['size']}: leave --shard-size out, or choose another --out"
            )
        return int(plan["size"])

    def begin(self, names: Sequence[str], size: int) -> None:
        """Write the plan, or find it written."""
        self.folder.mkdir(exist_ok=True)
        self.names = list(names)
        wanted = {"size": size, "names": self.names}
        with locked(self.folder / "plan.lock"):
            if read_plan(self.folder) is None:
                write_whole(self.folder / PLAN, _json(wanted))
            elif read_plan(self.folder) != wanted:
                raise InputError(
                    f"{self.folder} is cut in another way: leave --shard-size out, or choose another --out"
                )

    def work(self, make: Callable[[str], Made]) -> None:
        """Make what is missing, and return where it is for this process to put all together; else ``Elsewhere``."""
        own = self.names if self.worker is None else self.names[self.worker.index :: self.worker.count]
        try:
            others = [name for name in own if self.read(name) is None and not self._make(name, make, wait=False)]
            for name in others if self.worker is None else []:  # another process is at it: it may yet be killed
                self._make(name, make, wait=True)
            missing = sum(not there(self.folder, name) for name in self.names)
            if missing and not self.finished():
                raise Elsewhere(len(self.names), missing)
            self._merging = lock(self.folder / "merge.lock", wait=self.worker is None)
        except FileNotFoundError:  # put together and cleared away meanwhile
            if not self.finished():
                raise
        if self._merging is None or self.finished():
            raise Elsewhere(len(self.names), 0)
        self._ready = time.perf_counter()

    def get(self, name: str, make: Callable[[str], Made]) -> Made:
        """A piece; one that was damaged since is made again."""
        found = self.read(name)
        if found is None:
            self._make(name, make, wait=True)
            found = self.read(name)
        if found is None:
            raise InputError(f"{self.folder / name}.safetensors does not keep what is written: check the disk")
        return found

    def read(self, name: str) -> Made | None:
        """A piece as it was written; None where it is missing or damaged."""
        with suppress(FileNotFoundError):
            entry = entry_of(self.folder, name)
            data = (self.folder / f"{name}.safetensors").read_bytes()
            if entry is not None and sha256(data).hexdigest() == entry["sha256"]:
                return Made(load(data), entry["facts"])
            self.say(f"{self.folder / name}.safetensors is damaged: making it again")
        return None

    def cost(self) -> dict[str, float]:
        """Seconds that the pieces took, whoever made them, and since; where others had a part in them, by the clock."""
        since = time.perf_counter() - self._ready
        entries = [entry_of(self.folder, name) for name in self.names]
        spans = [entry["facts"]["span"] for entry in entries if entry is not None]
        wall = wall_seconds(spans)
        seconds = {"seconds": sum(ended - began for began, ended in spans) + since}
        shared = self.worker is not None or wall > self._ready - self._began
        return {**seconds, "wall_seconds": wall + since} if shared else seconds

    def close(self) -> None:
        """Let go of the lock on putting together."""
        if self._merging is not None:
            os.close(self._merging)
            self._merging = None

    def _make(self, name: str, make: Callable[[str], Made], wait: bool) -> bool:
        """Make a piece unless it is there by now; False where another process is at it."""
        with locked(self.folder / f"{name}.lock", wait=wait) as held:
            if not held:
                return False
            if self.finished() or (there(self.folder, name) and self.read(name) is not None):
                return True
            began = time.time()
            made = make(name)
            data = save({key: value.detach().cpu().contiguous() for key, value in made.tensors.items()})
            facts = {**made.facts, "span": [began, time.time()]}
            write_whole(self.folder / f"{name}.safetensors", data)
            entry = {"sha256": sha256(data).hexdigest(), "bytes": len(data), "facts": facts}
            write_whole(self.folder / f"{name}.json", _json(entry))
            if len(self.names) > 1:
                there_now = sum(path.name != PLAN for path in self.folder.glob("*.json"))
                self.say(f"{name} is made: {there_now} of {len(self.names)} are there")
        return True


# -- cost ------------------------------------------------------------------------------------------------------------


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


# -- files -----------------------------------------------------------------------------------------------------------


def read_plan(folder: Path) -> dict[str, Any] | None:
    """{"size", "names"}; None where nothing was begun."""
    with suppress(FileNotFoundError):
        try:
            plan = json.loads((folder / PLAN).read_bytes())
            return {"size": int(plan["size"]), "names": [str(name) for name in plan["names"]]}
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{folder / PLAN} is damaged: remove {folder} and run the command again") from None
    return None


def there(folder: Path, name: str) -> bool:
    """Is a piece there, by its entry and its size? Its hash is looked at when it is read."""
    entry = entry_of(folder, name)
    with suppress(FileNotFoundError):
        return entry is not None and (folder / f"{name}.safetensors").stat().st_size == entry["bytes"]
    return False


def nothing_in(folder: Path) -> bool:
    """Is no piece of this folder finished?"""
    return not any(folder.glob("*.safetensors"))


def discard(folder: Path) -> None:
    """What was put together is not needed in pieces any more; what cannot be removed now is removed another time."""
    shutil.rmtree(folder, ignore_errors=True)


def entry_of(folder: Path, name: str) -> dict[str, Any] | None:
    """What is known of a piece; None where it is not there."""
    with suppress(FileNotFoundError, ValueError):
        entry = json.loads((folder / f"{name}.json").read_bytes())
        if isinstance(entry, dict) and {"sha256", "bytes", "facts"} <= entry.keys():
            return entry
    return None


def _json(value: Any) -> bytes:
    return (json.dumps(value) + "\n").encode()
