"""Checkpoint directories on disk: written whole, verified before anything is returned."""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path as FilePath
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from metaflowmaps._files import sync_folder
from metaflowmaps.errors import InputError

FORMAT = 1
CONFIG, MODEL, MANIFEST = "config.json", "model.safetensors", "manifest.json"
EMA, OPTIMIZER, POSITION = "ema.safetensors", "optimizer.safetensors", "position.json"
INDEX = ".metadata"  # of the shards that several ranks write, see sharded.py
SHARD = re.compile(r"__\d+_\d+\.distcp")
PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"}
INSTEAD = "restore it from a copy or use another checkpoint"


class CheckpointError(InputError):
    """A checkpoint that cannot be read or written; one line with the file and the fix."""

    def __init__(self, path: str | FilePath, problem: str) -> None:
        super().__init__(path, problem)  # both, so that the error survives a trip between processes
        self.path = FilePath(path)
        self.problem = problem

    def __str__(self) -> str:
        return " ".join(f"{self.path}: {self.problem}".splitlines())


# -- writing -------------------------------------------------------------------------------------------------


def write_checkpoint(
    path: str | FilePath, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
) -> None:
    """Write a checkpoint, all or nothing: file name -> named tensors, file name -> JSON-able object.

    One that is already there is replaced. Where this raises, what was there before is still there.
    """
    _check_names(tensors, documents)
    target = FilePath(path).resolve()
    staging = name_staging(target)
    try:
        with writing(path):
            make_staging(staging, target, {*tensors, *documents})
            finish_staging(staging, target, tensors, documents)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def name_staging(target: FilePath) -> FilePath:
    """A new name beside a checkpoint's, for the directory that is to become it."""
    return _sibling(target, ".tmp-")


def make_staging(staging: FilePath, target: FilePath, names: set[str]) -> None:
    """Make it, unless what is to be replaced holds more than a checkpoint."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _settle(old_name(target))
    _check_replaceable(target, names)
    staging.mkdir()


def finish_staging(
    staging: FilePath,
    target: FilePath,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
    there: Mapping[str, Any] | None = None,
) -> None:
    """Write all files, then the manifest, which also lists what is ``there`` already; put the directory in place."""
    _fill(staging, tensors, documents, there or {})
    _swap(staging, target)


@contextmanager
def writing(path: str | FilePath) -> Iterator[None]:
    """Turn what a disk refuses into one line."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(path, _why_not_written(error)) from error


def recover(parent: str | FilePath) -> None:
    """Finish what a crash interrupted in a directory of checkpoints that no other process is writing to."""
    parent = FilePath(parent)
    if not parent.is_dir():
        return
    for entry in sorted(parent.iterdir()):
        if entry.name.startswith(".old-"):
            _settle(entry)
        elif entry.name.startswith((".tmp-", ".del-")) and entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)


def _check_names(tensors: Mapping[str, Any], documents: Mapping[str, Any]) -> None:
    for names, suffix in ((tensors, ".safetensors"), (documents, ".json")):
        for name in names:
            if FilePath(name).name != name or not name.endswith(suffix) or name == MANIFEST:
                raise InputError(f"a file of a checkpoint cannot be called {name!r}: give a plain *{suffix} name")
    if CONFIG not in documents or MODEL not in tensors:
        raise InputError(f"a checkpoint needs {CONFIG} among its documents and {MODEL} among its tensors")


def _check_replaceable(target: FilePath, names: set[str]) -> None:
    # replacing deletes: never a directory with anything in it that a checkpoint would not hold
    if target.is_file():
        raise CheckpointError(target, "is a file; a checkpoint is a directory: write to another name")
    known = {CONFIG, MODEL, MANIFEST, EMA, OPTIMIZER, POSITION, INDEX, *names}
    held = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    others = sorted(name for name in held - known if not SHARD.fullmatch(name))
    if others:
        problem = f"holds other files ({some(others)}): move them or write to another name"
        raise CheckpointError(target, problem)


def _fill(
    directory: FilePath,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
    there: Mapping[str, Any],
) -> None:
    listed = dict(there)
    for name, named in tensors.items():
        listed[name] = _write(directory / name, safetensors.torch.save(_storable(named)))
    for name, document in documents.items():
        listed[name] = _write(directory / name, _json(document))
    _write(directory / MANIFEST, _json({"format": FORMAT, "files": listed}))
    sync_folder(directory)


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors takes neither strided views nor shared memory (tied weights)
    seen: set[int] = set()
    storable = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        storable[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return storable


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _write(file: FilePath, data: bytes) -> dict[str, Any]:
    """Write to the disk itself; returns the file's entry in the manifest."""
    with open(file, "xb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    return {"sha256": sha256(data).hexdigest(), "bytes": len(data)}


def _swap(staging: FilePath, target: FilePath) -> None:
    """Put a complete directory in place; on failure put back the one that was there."""
    old, placed = old_name(target), False
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(staging, target)
        placed = True
        sync_folder(target.parent)
    except BaseException:
        if placed:
            os.rename(target, staging)
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    if old.exists():
        discard(old)


def _sibling(target: FilePath, prefix: str) -> FilePath:
    return target.parent / f"{prefix}{target.name}-{secrets.token_hex(4)}"


def old_name(target: FilePath) -> FilePath:
    """Where a checkpoint steps aside to while it is replaced."""
    return target.parent / f".old-{target.name}"


def _settle(old: FilePath) -> None:
    """After a crash between the two renames: the old one comes back, unless the new one is in place."""
    target = old.parent / old.name.removeprefix(".old-")
    if not old.is_dir():
        return
    if target.exists():
        discard(old)
    else:
        os.rename(old, target)


def discard(directory: FilePath) -> None:
    # what cannot be deleted now is tried again by the next save: no reason to stop a run
    gone = _sibling(directory, ".del-")
    with suppress(OSError):
        os.rename(directory, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _why_not_written(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "could not be written, no space left: free some space or write to another disk"
    reason = (error.strerror or str(error)).lower()
    return f"could not be written, {reason}: check the directory's permissions and disk, or write elsewhere"


# -- reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A verified checkpoint: file name -> content.

    In memory; the tensors of a ``sharded`` one, and those that another rank has verified, stay on disk and are verified
    again, in the very bytes that are parsed, when they are asked for.
    """

    path: FilePath
    _tensors: Mapping[str, dict[str, Tensor]] = field(repr=False)
    _documents: Mapping[str, Any] = field(repr=False)
    sharded: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        config: dict[str, Any] = self._documents[CONFIG]
        return config

    def has(self, name: str) -> bool:
        """Whether it holds a file of that name."""
        return name in self._tensors or name in self._documents

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file, on CPU; those of a sharded file, put together."""
        return self._tensors[self._present(name, self._tensors)]

    def document(self, name: str) -> Any:
        """The content of a JSON file."""
        return self._documents[self._present(name, self._documents)]

    def forms(self, name: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and type of the tensors of a file."""
        self._present(name, self._tensors)
        if self.sharded:
            held: dict[str, tuple[torch.Size, torch.dtype]] = self._tensors.forms(name)  # type: ignore[attr-defined]
            return held
        return {key: (value.shape, value.dtype) for key, value in self.tensors(name).items()}

    def fill(self, wanted: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the tensors of files into those given, sharded or not: every rank its own part. All ranks must enter."""
        if self.sharded:
            self._tensors.fill(wanted)  # type: ignore[attr-defined]
            return
        for file, named in wanted.items():
            stored = self.tensors(file)
            for name, value in named.items():
                _copy(stored[name], value)

    def _present(self, name: str, among: Mapping[str, Any]) -> str:
        if name not in among:
            holds = ", ".join(sorted(among))
            raise CheckpointError(self.path / name, f"not in this checkpoint, which holds {holds}")
        return name


@torch.no_grad()
def _copy(whole: Tensor, into: Tensor) -> None:
    """Into a tensor, or into this rank's part of a sharded one."""
    if hasattr(into, "placements"):
        from torch.distributed.tensor import DTensor, distribute_tensor  # takes long to import

        assert isinstance(into, DTensor)
        # every rank has read the whole: nothing is sent
        whole = distribute_tensor(whole.to(into.device), into.device_mesh, into.placements, src_data_rank=None)
    into.copy_(whole)


def read_checkpoint(path: str | FilePath, known_good: bool = False) -> Checkpoint:
    """Read and verify every file, or refuse with the file and the fix.

    ``known_good``: another rank has just verified it, so tensors are read when they are asked for.
    """
    path = FilePath(path)
    with reading(path):
        directory = _locate(path)
        tensors: dict[str, dict[str, Tensor]] = {}
        documents: dict[str, Any] = {}
        manifest = read_manifest(directory)
        sharded = INDEX in manifest
        for name, entry in manifest.items():
            if name.endswith(".json"):
                documents[name] = parse_json(directory / name, verified(directory / name, entry))
            elif not (sharded or known_good):
                tensors[name] = parse_tensors(directory / name, verified(directory / name, entry))
            elif not known_good:
                check_file(directory / name, entry)
        if not isinstance(documents[CONFIG], dict):
            raise CheckpointError(directory / CONFIG, f"is not a JSON object: {INSTEAD}")
        if sharded or known_good:
            from metaflowmaps.checkpoint.sharded import OnDisk  # torch's distributed checkpoints take long to import

            return Checkpoint(path, OnDisk(directory, manifest), documents, sharded)
    return Checkpoint(path, tensors, documents)


@contextmanager
def reading(path: FilePath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        file = error.filename if isinstance(error.filename, str) else path
        problem = f"cannot be read, {reason}: check the path and its permissions"
        raise CheckpointError(file, problem) from error


def _locate(path: FilePath) -> FilePath:
    if path.is_dir():
        return path
    if path.is_file() and path.suffix.lower() in PICKLES:
        raise CheckpointError(path, "pickled files are never read: save the weights as safetensors")
    if path.is_file():
        problem = f"is a file; a checkpoint is a directory: give the one that holds {MANIFEST}"
        raise CheckpointError(path, problem)
    if old_name(path).is_dir():  # a crash fell between the two renames
        return old_name(path)
    raise CheckpointError(path, f"no such directory: give a checkpoint, a directory that holds {MANIFEST}")


def read_manifest(directory: FilePath) -> dict[str, dict[str, Any]]:
    """File name -> {"sha256", "bytes"}; the manifest must have exactly the form that is written."""
    file = directory / MANIFEST
    if not file.is_file():
        fix = "give another directory, or convert foreign weights with mfm convert"
        raise CheckpointError(file, f"missing, so nothing beside it can be verified: {fix}")
    manifest = parse_json(file, file.read_bytes())
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if type(version) is not int:
        raise CheckpointError(file, f"is not a checkpoint's manifest: {INSTEAD}")
    if version != FORMAT:
        raise CheckpointError(file, wrong_format(version))
    files = manifest.get("files")
    if set(manifest) != {"format", "files"} or not isinstance(files, dict):
        raise CheckpointError(file, f"is not a checkpoint's manifest: {INSTEAD}")
    for name, entry in files.items():
        known = name.endswith((".json", ".safetensors")) or name == INDEX or SHARD.fullmatch(name)
        plain = FilePath(name).name == name and known
        if not plain or not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"}:
            raise CheckpointError(file, f"has an entry {name!r} that no checkpoint has: {INSTEAD}")
    for name in (CONFIG, EMA if INDEX in files else MODEL):
        if name not in files:
            raise CheckpointError(file, f"does not list {name}, which every checkpoint has: {INSTEAD}")
    return files


def wrong_format(version: Any) -> str:
    return f"has format {version!r}; this package reads format {FORMAT}: pip install --upgrade metaflowmaps"


def verified(file: FilePath, entry: Mapping[str, Any]) -> bytes:
    _check_there(file)
    data = file.read_bytes()
    _check_entry(file, {"sha256": sha256(data).hexdigest(), "bytes": len(data)}, entry)
    return data


def check_file(file: FilePath, entry: Mapping[str, Any]) -> None:
    """Verify a file of any size in little memory."""
    _check_there(file)
    _check_entry(file, entry_of(file), entry)


def entry_of(file: FilePath) -> dict[str, Any]:
    """What a manifest says of a file."""
    with open(file, "rb") as handle:
        return {"sha256": file_digest(handle, "sha256").hexdigest(), "bytes": os.fstat(handle.fileno()).st_size}


def _check_there(file: FilePath) -> None:
    if not file.is_file():
        raise CheckpointError(file, f"missing, though {MANIFEST} lists it: {INSTEAD}")


def _check_entry(file: FilePath, found: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    if found["bytes"] != entry["bytes"]:
        problem = f"has {found['bytes']} bytes, not the {entry['bytes']} of {MANIFEST}"
        raise CheckpointError(file, f"{problem}: {INSTEAD}")
    if found["sha256"] != entry["sha256"]:
        raise CheckpointError(file, f"is damaged, its sha256 is not the one in {MANIFEST}: {INSTEAD}")


def parse_json(file: FilePath, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"is not JSON: {INSTEAD}") from error


def parse_tensors(file: FilePath, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # anything can be hashed, and the parser may trip over it in any way
        raise CheckpointError(file, f"is not a safetensors file: {INSTEAD}") from error


def some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
