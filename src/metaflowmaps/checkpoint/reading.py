"""Reading checkpoints: each file once, hashed, and parsed from those same bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaflowmaps.checkpoint.manifest import (
    CONFIG,
    INDEX,
    INSTEAD,
    MANIFEST,
    CheckpointError,
    check_file,
    parse_json,
    parse_tensors,
    read_manifest,
    reading,
    verified,
)
from metaflowmaps.checkpoint.writing import old_name
from metaflowmaps.work import ranks

if TYPE_CHECKING:
    from metaflowmaps.checkpoint.sharded import OnDisk

PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"}


class InMemory(dict[str, dict[str, Tensor]]):
    """File name -> tensors, all of them read."""

    sharded = False

    def forms(self, name: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and type of the tensors of a file."""
        return {key: (value.shape, value.dtype) for key, value in self[name].items()}

    def fill(self, wanted: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the tensors of files into those given."""
        for file, named in wanted.items():
            for name, value in named.items():
                ranks.copy_into(value, self[file][name])


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A verified checkpoint: file name -> content.

    In memory; the tensors of a ``sharded`` one, and those that another rank has verified, stay on disk and are verified
    again, in the very bytes that are parsed, when they are asked for.
    """

    path: FilePath
    _tensors: "InMemory | OnDisk" = field(repr=False)
    _documents: Mapping[str, Any] = field(repr=False)

    @property
    def sharded(self) -> bool:
        """Whether several ranks wrote its tensors in parts."""
        return self._tensors.sharded

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        config: dict[str, Any] = self._documents[CONFIG]
        return config

    @property
    def training(self) -> dict[str, Any]:
        """The configuration it was trained by: its own, or the one an exported model carries; published ones: none."""
        own: dict[str, Any] = self.config.get("training") or (self.config.get("origin") or {}).get("training") or {}
        return own

    @property
    def tuned(self) -> bool:
        """Whether fine-tuning made it."""
        return bool(self.config.get("training", {}).get("recipe") == "finetune")

    @property
    def digest(self) -> str:
        """What identifies it: the hash of its manifest, which holds the hash of everything else."""
        return sha256((self.path / MANIFEST).read_bytes()).hexdigest()

    @property
    def run(self) -> FilePath | None:
        """The run that made it, if it lies in one."""
        run = self.path.parent.parent
        return run if (run / "run.json").exists() else None

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
        return self._tensors.forms(self._present(name, self._tensors))

    def fill(self, wanted: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copy the tensors of files into those given, sharded or not: every rank its own part. All ranks must enter."""
        for name in wanted:
            self._present(name, self._tensors)
        self._tensors.fill(wanted)

    def _present(self, name: str, among: Mapping[str, Any]) -> str:
        if name not in among:
            holds = ", ".join(sorted(among))
            raise CheckpointError(self.path / name, f"not in this checkpoint, which holds {holds}")
        return name


def read_checkpoint(path: str | FilePath, known_good: bool = False) -> Checkpoint:
    """Read and verify every file, or refuse with the file and the fix.

    ``known_good``: another rank has just verified it, so tensors are read when they are asked for.
    """
    path = FilePath(path)
    with reading(path):
        directory = _locate(path)
        manifest = read_manifest(directory)
        documents, tensors = {}, InMemory()
        on_disk = known_good or INDEX in manifest
        for name, entry in manifest.items():
            file = directory / name
            if name.endswith(".json"):
                documents[name] = parse_json(file, verified(file, entry))
            elif not on_disk:
                tensors[name] = parse_tensors(file, verified(file, entry))
            elif not known_good:
                check_file(file, entry)
        if not isinstance(documents[CONFIG], dict):
            raise CheckpointError(directory / CONFIG, f"is not a JSON object: {INSTEAD}")
        if on_disk:
            from metaflowmaps.checkpoint.sharded import OnDisk  # torch's distributed checkpoints take long to import

            return Checkpoint(path, OnDisk(directory, manifest), documents)
    return Checkpoint(path, tensors, documents)


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
