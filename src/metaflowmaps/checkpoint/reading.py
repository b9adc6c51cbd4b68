"""Reading checkpoints: each file once, hashed, and parsed from those same bytes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path as FilePath
from typing import Any

from torch import Tensor

from metaflowmaps.checkpoint.manifest import (
    CONFIG,
    INSTEAD,
    MANIFEST,
    CheckpointError,
    parse_json,
    parse_tensors,
    read_manifest,
    reading,
    verified,
)
from metaflowmaps.checkpoint.writing import old_name

PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A verified checkpoint, in memory: file name -> content."""

    path: FilePath
    _tensors: Mapping[str, dict[str, Tensor]] = field(repr=False)
    _documents: Mapping[str, Any] = field(repr=False)

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        config: Mapping[str, Any] = self._documents[CONFIG]
        return config

    @property
    def training(self) -> Mapping[str, Any]:
        """The configuration it was trained by: its own, or the one an exported model carries; published ones: none."""
        own: Mapping[str, Any] = self.config.get("training") or (self.config.get("origin") or {}).get("training") or {}
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
        """The tensors of a safetensors file, on CPU."""
        return self._tensors[self._present(name, self._tensors)]

    def document(self, name: str) -> Any:
        """The content of a JSON file."""
        return self._documents[self._present(name, self._documents)]

    def _present(self, name: str, among: Mapping[str, Any]) -> str:
        if name not in among:
            holds = ", ".join(sorted(among))
            raise CheckpointError(self.path / name, f"not in this checkpoint, which holds {holds}")
        return name


def read_checkpoint(path: str | FilePath) -> Checkpoint:
    """Read and verify every file, or refuse with the file and the fix."""
    path = FilePath(path)
    tensors, documents = {}, {}
    with reading(path):
        directory = _locate(path)
        for name, entry in read_manifest(directory).items():
            file = directory / name
            if name.endswith(".json"):
                documents[name] = parse_json(file, verified(file, entry))
            elif name.endswith(".safetensors"):
                tensors[name] = parse_tensors(file, verified(file, entry))
        if not isinstance(documents[CONFIG], dict):
            raise CheckpointError(directory / CONFIG, f"is not a JSON object: {INSTEAD}")
        _check_code(directory / CONFIG, documents[CONFIG])
    return Checkpoint(path, tensors, documents)


def _check_code(file: FilePath, config: Any) -> None:
    """Refuse names of code that whoever wrote a configuration may have put beside it: ours have absolute paths."""
    waiting = [config]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            place = str(value.get("name")).rpartition(":")[0]
            if place.endswith(".py") and not FilePath(place).expanduser().is_absolute():
                problem = f"names {place}, a file of whatever folder one is in: give its absolute path there"
                raise CheckpointError(file, problem)


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
