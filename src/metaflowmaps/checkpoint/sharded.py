"""Checkpoints of several ranks: each writes and reads its own part, by torch.distributed.checkpoint.

Beside ``config.json``, ``position.json`` and the averaged weights in one piece (``ema.safetensors``, so that such a
checkpoint loads like any other) there are

    __0_0.distcp  __1_0.distcp  …     a rank's parts of the tensors        .metadata     which tensor is where

with the keys ``model/NAME``, ``ema/NAME`` and ``optimizer/NUMBER``: the tensors of the files of the same names that one
rank writes alone. So either kind goes on on any number of ranks.

The parts are written into the directory that is to become the checkpoint; each rank hashes its own, and the first one
writes the manifest and puts the directory in place. The index is a pickle: it is read from verified bytes by an
unpickler that knows torch's dozen classes of indices and nothing else.
"""

import io
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from metaflowmaps.checkpoint.manifest import (
    EMA,
    INDEX,
    INSTEAD,
    CheckpointError,
    entry_of,
    parse_tensors,
    verified,
    writing,
)
from metaflowmaps.checkpoint.writing import finish_staging, make_staging, name_staging
from metaflowmaps.work import ranks

SUFFIX = ".safetensors"


def write_sharded(
    path: str | FilePath,
    shards: Mapping[str, Mapping[str, Tensor]],
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
) -> None:
    """Write a checkpoint, all or nothing: ``shards`` by all ranks; the averages once more, and the rest, by the first.

    All ranks must enter; where this raises, it raises on all, and what was there before is still there.
    """
    target = FilePath(path).resolve()

    def begin() -> FilePath:
        staging = name_staging(target)
        with writing(path):
            make_staging(staging, target, {*shards, *tensors, *documents})
        return staging

    staging = ranks.first(begin)
    try:
        _save(path, staging, _flat(shards))
        mine = sorted(staging.glob(f"__{ranks.rank()}_*.distcp"))
        parts = ranks.collected(lambda: {file.name: entry_of(file) for file in mine})
        average = ranks.whole(shards[EMA])

        def finish() -> None:
            there = {name: entry for part in parts for name, entry in part.items()}
            there[INDEX] = entry_of(staging / INDEX)
            with writing(path):
                finish_staging(staging, target, {EMA: average, **tensors}, documents, there)

        ranks.first(finish)
    finally:
        if ranks.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)


def _flat(shards: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """By the keys of the index."""
    return {f"{file.removesuffix(SUFFIX)}/{name}": v for file, named in shards.items() for name, v in named.items()}


def _save(path: str | FilePath, staging: FilePath, flat: dict[str, Tensor]) -> None:
    try:
        with writing(path):
            try:
                save(flat, storage_writer=_Writer(staging))
            except CheckpointException as failure:  # raised on all ranks, with the errors of those that failed
                raise _of_kind(failure, OSError) from None
    except Exception as error:
        raise ranks.shared(error)  # noqa: B904  # the very same, marked


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing: where and in which process it was written is nobody's business."""


# -- reading -----------------------------------------------------------------------------------------------------------


class OnDisk(Mapping[str, dict[str, Tensor]]):
    """File name -> tensors, read and verified at each access: safetensors files, and shards put together."""

    def __init__(self, directory: FilePath, manifest: Mapping[str, dict[str, Any]]) -> None:
        self.directory, self.manifest = directory, manifest
        self.files = [name for name in manifest if name.endswith(SUFFIX)]
        self.sharded = INDEX in manifest
        self.index: dict[str, Any] = {}
        if self.sharded:
            self.index = _Reader(directory, manifest).read_metadata().state_dict_metadata
        parts = dict.fromkeys(key.partition("/")[0] + SUFFIX for key in self.index)
        self.names = [*self.files, *(name for name in parts if name not in self.files)]

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        if name in self.files:
            file = self.directory / name
            return parse_tensors(file, verified(file, self.manifest[name]))
        if name not in self.names:
            raise KeyError(name)
        made = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in self.forms(name).items()}
        self.fill({name: made}, alone=True)
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def forms(self, name: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and type of the tensors of a file."""
        if not self.sharded:
            return {key: (value.shape, value.dtype) for key, value in self[name].items()}
        prefix = name.removesuffix(SUFFIX) + "/"
        return {
            key.removeprefix(prefix): (held.size, held.properties.dtype)
            for key, held in self.index.items()
            if key.startswith(prefix)
        }

    def fill(self, wanted: Mapping[str, Mapping[str, Tensor]], alone: bool = False) -> None:
        """Copy the tensors of files into those given, sharded in whatever way or not: all ranks, or one alone."""
        if not self.sharded:
            for file, named in wanted.items():
                stored = self[file]
                for name, value in named.items():
                    ranks.copy_into(value, stored[name])
            return
        flat = _flat(wanted)
        for key, value in flat.items():
            if key not in self.index or self.index[key].size != value.shape:
                raise CheckpointError(self.directory / INDEX, f"does not fit the model at {key}: {INSTEAD}")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # and not needed, alone
                load(flat, storage_reader=_Reader(self.directory, self.manifest), no_dist=alone)
        except CheckpointException as failure:
            raise _of_kind(failure, CheckpointError) from None


def _of_kind(failure: CheckpointException, kind: type[Exception]) -> BaseException:
    """Of what went wrong on the ranks, the first of a kind, or the first."""
    errors = [error for error, _ in failure.failures.values()]
    return next((error for error in errors if isinstance(error, kind)), errors[0])


class _Reader(FileSystemReader):
    """Parses nothing but bytes that it has verified."""

    def __init__(self, directory: FilePath, manifest: Mapping[str, dict[str, Any]]) -> None:
        super().__init__(directory)
        self.fs = _Verified(manifest)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(FilePath(self.path) / INDEX, "rb") as stream:
            try:
                metadata = _Indices(stream).load()
            except Exception as error:
                raise CheckpointError(FilePath(self.path) / INDEX, f"is not an index of shards: {INSTEAD}") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(FilePath(self.path) / INDEX, f"is not an index of shards: {INSTEAD}")
        return metadata


class _Verified(FileSystem):
    def __init__(self, manifest: Mapping[str, dict[str, Any]]) -> None:
        self.manifest = manifest

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.BytesIO]:
        file = FilePath(path)
        if file.name not in self.manifest:
            raise CheckpointError(file, f"is not in the manifest: {INSTEAD}")
        yield io.BytesIO(verified(file, self.manifest[file.name]))


class _Indices(pickle.Unpickler):
    """Knows the classes of an index, and no other."""

    KNOWN: ClassVar = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "StorageMeta",
                         "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING")
        ),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.KNOWN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")
