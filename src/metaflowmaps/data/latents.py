r"""Encoded pictures on disk, drawn anew each time: ``x = mean + std ε``, flipped or not.

A directory holds ``latents.json``, the index, and shards ``latents-00000.safetensors`` with, for their n pictures,

    mean, std (n, C, h, w) float16      the posterior of the scaled latent
    mean_flipped, std_flipped           the same of the picture's mirror image, if it was asked for
    label (n,) int64                    its class, −1 where there are none
    sum, square (C, h, w) float64       Σ mean and Σ (mean² + std²) over pictures, and over both sides

so that the mean and the spread of what is drawn are known without reading it: ``E x = Σ mean / n`` and
``E x² = Σ (mean² + std²) / n``. Shards are mapped, not loaded: what is not drawn is not read.

A process hashes a shard when it first maps it, once: only the hash can tell a flipped bit, and a run lasts far longer
than reading its data does. Names are those of different shards of the folder, and labels are classes of the index.
"""

import functools
import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, Field, TypeAdapter
from pydantic.dataclasses import dataclass as checked_dataclass
from safetensors import safe_open
from torch import Tensor

from metaflowmaps._files import read_regular, write_json
from metaflowmaps.data.image_set import Examples
from metaflowmaps.errors import InputError
from metaflowmaps.random import randn

SCHEMA = 1
INDEX, ENCODING = "latents.json", "encoding"  # the latter: a folder that is there while shards are made
SHARD = r"latents-\d{5,}\.safetensors"  # what a shard is called, always inside its folder
SIDES = (("mean", "std"), ("mean_flipped", "std_flipped"))
Side = Annotated[int, Field(ge=1, le=4096)]
Stamp = tuple[int, int, int]  # of a file: its number, size and time; another content has another
AGAIN = "run the mfm encode-latents command that made it again, which makes what is missing"


@dataclass(frozen=True)
class Encoding:
    """What decides the result. ``vae`` identifies the weights, ``source`` the pictures and their classes."""

    source: str
    vae: str
    scale: float
    dtype: str
    size: int = 256
    flip: bool = False
    shard_size: int = 4096
    limit: int | None = None


@checked_dataclass(frozen=True)
class LatentShard:
    """A shard as the index lists it: its file, how many pictures it holds, and which could not be read."""

    file: Annotated[str, Field(pattern=f"^{SHARD}$")]
    examples: Annotated[int, Field(ge=0)]
    bytes: int
    sha256: str
    skipped: tuple[str, ...] = ()

    def is_whole(self, folder: Path, by_hash: bool = False) -> bool:
        """Is the file there, of its size and, if asked, with its hash?"""
        file = folder / self.file
        if not file.is_file() or file.stat().st_size != self.bytes:
            return False
        return not by_hash or _sha256(file, _stamp(file)) == self.sha256


def _distinct(shards: tuple[LatentShard, ...]) -> tuple[LatentShard, ...]:
    if len({shard.file for shard in shards}) < len(shards):
        raise ValueError("a shard is listed twice")
    return shards


@checked_dataclass(frozen=True)
class LatentIndex:
    """latents.json; ``source`` and ``vae`` are what the user called them, mean and std those of what is drawn."""

    source: str
    vae: str
    settings: Encoding
    event_shape: Annotated[tuple[Side, ...], Field(min_length=3, max_length=3)]
    examples: int
    classes: tuple[str, ...]
    skipped: int
    mean: float
    std: float
    shards: Annotated[tuple[LatentShard, ...], Field(min_length=1), AfterValidator(_distinct)]

    def write(self, folder: Path) -> None:
        """Write it into its folder, whole or not at all."""
        write_json(folder / INDEX, {"schema": SCHEMA, **asdict(self)})

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self.shards)


class LatentSet(Examples):
    """Pictures of an encoded set; what is drawn of them is (n, C, h, w) float32, without levels.

    Args:
        shards: the whole set, whose mean and spread are those of its parts.
        index: (k,) int64, the places of these pictures in it.
    """

    name, top = "latents", math.inf

    def __init__(self, shards: "LatentShards", index: Tensor) -> None:
        self.shards, self.index = shards, index
        self.event_shape, self.class_names = shards.event_shape, shards.class_names
        self.labels = shards.labels[index] if self.class_names else None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def mean(self) -> float:
        """The mean of what is drawn, over the whole set and all coordinates."""
        return self.shards.mean

    @property
    def std(self) -> float:
        """The root of the mean square about that one mean."""
        return self.shards.std

    @property
    def mean_image(self) -> Tensor:
        """The mean of what is drawn, over the whole set: (C, h, w)."""
        return self.shards.mean_image.float()

    def tensor(self, index: Tensor | slice = slice(None)) -> Tensor:
        """The means at index, not flipped: what does not depend on noise."""
        picked = self.index[index]
        return self.shards.gather(picked, torch.zeros(len(picked), dtype=torch.bool), ("mean",))[0]

    def _drawn(self, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """A picture's side, where both are stored, and its noise."""
        flipped = torch.zeros(len(index), dtype=torch.bool)
        if self.shards.flips:
            flipped = torch.rand(len(index), generator=generator) < 0.5
        mean, std = self.shards.gather(self.index[index], flipped, ("mean", "std"))
        return torch.addcmul(mean, std, randn(tuple(mean.shape), generator))


class LatentShards:
    """All shards of a directory, mapped when they are first asked for."""

    def __init__(self, folder: Path, index: "LatentIndex | None" = None) -> None:
        index = index or read_index(folder)
        self.folder = folder
        self.entries, self.event_shape = index.shards, index.event_shape
        self.class_names, self.flips = index.classes, index.settings.flip
        for entry in self.entries:
            _check_size(folder / entry.file, entry.bytes)
        self._starts = torch.tensor([0, *(entry.examples for entry in self.entries)]).cumsum(0)
        self._mapped: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def labels(self) -> Tensor:
        """(n,) int64."""
        return torch.cat([self._shard(k)["label"] for k in range(len(self.entries))])

    @cached_property
    def mean_image(self) -> Tensor:
        """E x: (C, h, w) float64."""
        return self._total("sum") / len(self)

    @cached_property
    def square_image(self) -> Tensor:
        """E x²: (C, h, w) float64."""
        return self._total("square") / len(self)

    @property
    def mean(self) -> float:
        """E x over all coordinates."""
        return float(self.mean_image.mean())

    @property
    def std(self) -> float:
        """The root of the mean square about it."""
        return math.sqrt(max(0.0, float(self.square_image.mean()) - self.mean**2))

    def gather(self, places: Tensor, flipped: Tensor, names: tuple[str, ...]) -> list[Tensor]:
        """Rows of tensors, of the side that ``flipped`` says: (k, C, h, w) float32 each."""
        out = [torch.empty(len(places), *self.event_shape, dtype=torch.float16) for _ in names]
        shard = torch.bucketize(places, self._starts[1:], right=True)
        order = torch.argsort(2 * shard + flipped, stable=True)
        groups, counts = torch.unique_consecutive((2 * shard + flipped)[order], return_counts=True)
        for group, rows in zip(groups.tolist(), order.split(counts.tolist()), strict=True):
            held = self._shard(group // 2)
            local = places[rows] - self._starts[group // 2]
            for name, filled in zip(names, out, strict=True):
                filled[rows] = held[name + "_flipped" if group % 2 else name][local]
        return [filled.float() for filled in out]

    def _total(self, name: str) -> Tensor:
        total = torch.zeros(self.event_shape, dtype=torch.float64)
        for k in range(len(self.entries)):
            total += self._shard(k)[name]
        return total

    def _shard(self, k: int) -> dict[str, Tensor]:
        if k not in self._mapped:
            self._mapped[k] = self._map(self.entries[k])
        return self._mapped[k]

    def _map(self, entry: LatentShard) -> dict[str, Tensor]:
        file = self.folder / entry.file
        shape: tuple[int, ...] = (entry.examples, *self.event_shape)
        if not entry.is_whole(self.folder, by_hash=True):
            raise InputError(f"{file} is damaged (its sha256 is not that of {INDEX}): {AGAIN}, with --verify")
        wanted = {name: (torch.float16, shape) for side in SIDES[: 1 + self.flips] for name in side}
        wanted |= dict.fromkeys(("sum", "square"), (torch.float64, self.event_shape))
        wanted["label"] = (torch.int64, shape[:1])
        try:
            with safe_open(file, "pt") as opened:
                held = {name: opened.get_tensor(name) for name in wanted}
        except Exception as error:  # anything can be in a file, and the parser may trip over it in any way
            raise InputError(
                f"{file} is damaged ({' '.join(str(error).split())[:120]}): delete it, then {AGAIN}"
            ) from None
        for name, (dtype, size) in wanted.items():
            if held[name].dtype != dtype or tuple(held[name].shape) != size:
                raise InputError(f"{file} is damaged ({name} is {tuple(held[name].shape)}): delete it, then {AGAIN}")
        self._check_labels(file, held["label"])
        return held

    def _check_labels(self, file: Path, labels: Tensor) -> None:
        low, high = (0, len(self.class_names) - 1) if self.class_names else (-1, -1)
        wrong = labels[(labels < low) | (labels > high)]
        if len(wrong):
            raise InputError(
                f"{file} has the label {int(wrong[0])}, and {INDEX} {len(self.class_names)} classes: delete it, then "
                f"{AGAIN}"
            )


def read_index(folder: Path) -> LatentIndex:
    """latents.json, refused unless it has the form that is written and names shards of its own folder alone."""
    file = folder / INDEX
    if not folder.is_dir():
        raise InputError(
            f"there is no directory {folder.absolute()}: --set data.path=DIR, as mfm encode-latents wrote it"
        )
    if not file.is_file():
        begun = " (it was begun and is not finished)" if (folder / ENCODING).exists() else ""
        raise InputError(
            f"no {INDEX} in {folder.absolute()}{begun}: mfm encode-latents SOURCE --out {folder} makes one"
        )
    try:
        document = json.loads(read_regular(file))
        schema = document.get("schema", SCHEMA)
        if schema == SCHEMA:
            return TypeAdapter(LatentIndex).validate_python(document)
    except (ValueError, AttributeError, RecursionError):
        raise InputError(f"{file} is damaged: delete it, then {AGAIN}") from None
    raise InputError(f"{file} has schema {schema!r}, this package reads {SCHEMA}: pip install --upgrade metaflowmaps")


def verify(folder: Path) -> list[str]:
    """Read every shard; the names of those that are missing or are not what was written."""
    return [shard.file for shard in read_index(folder).shards if not shard.is_whole(folder, by_hash=True)]


def _check_size(file: Path, size: int) -> None:
    try:
        found = file.stat().st_size
    except OSError:
        raise InputError(f"{file} is missing: {AGAIN}") from None
    if found != size:
        raise InputError(f"{file} has {found:,} bytes, not the {size:,} of {INDEX}: {AGAIN}")


def _stamp(file: Path) -> Stamp:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@functools.cache
def _sha256(file: Path, stamp: Stamp) -> str:
    """The hash of a file, read once in a process for each stamp it has."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
