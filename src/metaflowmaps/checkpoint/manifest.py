"""What a checkpoint's files are called, what its manifest says of them, and whether they are what was written."""

import errno
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path as FilePath
from typing import Any

import safetensors.torch
from torch import Tensor

from metaflowmaps._files import read_regular
from metaflowmaps.errors import InputError

FORMAT = 1
CONFIG, MODEL, MANIFEST = "config.json", "model.safetensors", "manifest.json"
EMA, OPTIMIZER, POSITION = "ema.safetensors", "optimizer.safetensors", "position.json"
PART = re.compile(r"__\d+_\d+\.distcp|\.metadata")  # several ranks of version 0.1 wrote them; nothing reads them
INSTEAD = "restore it from a copy or use another checkpoint"
Entry = Mapping[str, str | int]  # {"sha256": hexadecimal, "bytes": size}


class CheckpointError(InputError):
    """A checkpoint that cannot be read or written; one line with the file and the fix."""

    def __init__(self, path: str | FilePath, problem: str) -> None:
        super().__init__(path, problem)  # both, so that the error survives a trip between processes
        self.path = FilePath(path)
        self.problem = problem

    def __str__(self) -> str:
        return " ".join(f"{self.path}: {self.problem}".splitlines())


@contextmanager
def reading(path: FilePath) -> Iterator[None]:
    """Turn what a disk refuses to read into one line."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        file = error.filename if isinstance(error.filename, str) else path
        raise CheckpointError(file, f"cannot be read, {reason}: check the path and its permissions") from error


@contextmanager
def writing(path: str | FilePath) -> Iterator[None]:
    """Turn what a disk refuses to write into one line."""
    try:
        yield
    except OSError as error:
        problem = (
            f"{(error.strerror or str(error)).lower()}: check the directory's permissions and disk, or write elsewhere"
        )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem = "no space left: free some space or write to another disk"
        raise CheckpointError(path, f"could not be written, {problem}") from error


# -- the manifest ------------------------------------------------------------------------------------------------------


def read_manifest(directory: FilePath) -> dict[str, Entry]:
    """File name -> its size and hash; the manifest must have exactly the form that is written."""
    file = directory / MANIFEST
    if not file.is_file():
        fix = "give another directory, or convert foreign weights with mfm convert"
        raise CheckpointError(file, f"missing, so nothing beside it can be verified: {fix}")
    manifest = parse_json(file, read_regular(file))
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if type(version) is not int:
        raise CheckpointError(file, f"is not a checkpoint's manifest: {INSTEAD}")
    if version != FORMAT:
        raise CheckpointError(file, wrong_format(version))
    files = manifest.get("files")
    if set(manifest) != {"format", "files"} or not isinstance(files, dict):
        raise CheckpointError(file, f"is not a checkpoint's manifest: {INSTEAD}")
    for name, entry in files.items():
        known = name.endswith((".json", ".safetensors")) or PART.fullmatch(name)
        plain = FilePath(name).name == name and known
        if not plain or not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"}:
            raise CheckpointError(file, f"has an entry {name!r} that no checkpoint has: {INSTEAD}")
    parts = any(PART.fullmatch(name) for name in files)
    for name in (CONFIG, EMA if parts else MODEL):
        if name not in files:
            raise CheckpointError(file, f"does not list {name}, which every checkpoint has: {INSTEAD}")
    return files


def wrong_format(version: Any) -> str:
    """What to say of a format that is not ours."""
    return f"has format {version!r}; this package reads format {FORMAT}: pip install --upgrade metaflowmaps"


def entry_of(data: bytes) -> Entry:
    """What a manifest says of a file that holds these bytes."""
    return {"sha256": sha256(data).hexdigest(), "bytes": len(data)}


def verified(file: FilePath, entry: Entry) -> bytes:
    """The bytes of a file, if they are those of its entry."""
    if not file.is_file():
        raise CheckpointError(file, f"missing, though {MANIFEST} lists it: {INSTEAD}")
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(file, f"has {size} bytes, not the {entry['bytes']} of {MANIFEST}: {INSTEAD}")
    data = read_regular(file, size)
    if entry_of(data)["sha256"] != entry["sha256"]:
        raise CheckpointError(file, f"is damaged, its sha256 is not the one in {MANIFEST}: {INSTEAD}")
    return data


# -- contents ----------------------------------------------------------------------------------------------------------


def parse_json(file: FilePath, data: bytes) -> Any:
    """The value in the bytes of a JSON file."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"is not JSON: {INSTEAD}") from error


def parse_tensors(file: FilePath, data: bytes) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file."""
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # anything can be hashed, and the parser may trip over it in any way
        raise CheckpointError(file, f"is not a safetensors file: {INSTEAD}") from error


def shortened(names: list[str]) -> str:
    """The first three of a list of names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
