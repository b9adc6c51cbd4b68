"""Checkpoints: directories that are either complete and verified, or refused.

A checkpoint is a directory of safetensors and JSON files, and a ``manifest.json`` with the size and sha256 of
each of them:

    config.json  model.safetensors  manifest.json                 every checkpoint
    ema.safetensors  optimizer.safetensors  position.json  …      a training run's, besides

**Writing.** Everything goes into a ``.tmp-`` sibling, each file flushed to the disk, the manifest last, and
one rename puts it in place. A checkpoint that is replaced first steps aside to ``.old-<name>``: whatever
happens between the two renames, one of the two names holds a complete directory, readers look at both, and
:func:`recover` tidies up. What is deleted is first renamed to ``.del-…``, so no half-deleted directory ever
carries a checkpoint's name.

**Reading.** Each file is read once, hashed, and parsed from those same bytes: a file that changes between the
check and the use cannot slip through. (One flipped bit in a safetensors file loads without an error: only the
hash knows.) Nothing is returned until every file has passed, and nothing is ever unpickled.

**Training.** :class:`CheckpointStore` keeps the newest few and the best. The score is in the checkpoint
itself, so what is pruned depends on the directories alone, not on what a process remembers: a resumed run
prunes like one never stopped.
"""

import errno
import json
import math
import os
import re
import secrets
import shutil
import struct
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path as FilePath
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks import NETWORKS, make_network
from metaflowmaps.path import make_path

FORMAT = 1
KIND = "meta-flow-map"
CONFIG, MODEL, MANIFEST = "config.json", "model.safetensors", "manifest.json"
EMA, OPTIMIZER, POSITION = "ema.safetensors", "optimizer.safetensors", "position.json"
PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"}
INSTEAD = "restore it from a copy or use another checkpoint"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


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
    staging = _sibling(target, ".tmp-")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _settle(_old(target))
        _check_replaceable(target, {*tensors, *documents})
        staging.mkdir()
        _fill(staging, tensors, documents)
        _swap(staging, target)
    except OSError as error:
        raise CheckpointError(path, _why_not_written(error)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


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
    known = {CONFIG, MODEL, MANIFEST, EMA, OPTIMIZER, POSITION, *names}
    others = sorted({entry.name for entry in target.iterdir()} - known) if target.is_dir() else []
    if others:
        problem = f"holds other files ({_some(others)}): move them or write to another name"
        raise CheckpointError(target, problem)


def _fill(directory: FilePath, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]) -> None:
    listed = {}
    for name, named in tensors.items():
        listed[name] = _write(directory / name, safetensors.torch.save(_storable(named)))
    for name, document in documents.items():
        listed[name] = _write(directory / name, _json(document))
    _write(directory / MANIFEST, _json({"format": FORMAT, "files": listed}))
    _sync(directory)


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


def _sync(directory: FilePath) -> None:
    """Make the names in a directory durable; some network file systems cannot, and say EINVAL."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _swap(staging: FilePath, target: FilePath) -> None:
    """Put a complete directory in place; on failure put back the one that was there."""
    old, placed = _old(target), False
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(staging, target)
        placed = True
        _sync(target.parent)
    except BaseException:
        if placed:
            os.rename(target, staging)
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    if old.exists():
        _discard(old)


def _sibling(target: FilePath, prefix: str) -> FilePath:
    return target.parent / f"{prefix}{target.name}-{secrets.token_hex(4)}"


def _old(target: FilePath) -> FilePath:
    """Where a checkpoint steps aside to while it is replaced."""
    return target.parent / f".old-{target.name}"


def _settle(old: FilePath) -> None:
    """After a crash between the two renames: the old one comes back, unless the new one is in place."""
    target = old.parent / old.name.removeprefix(".old-")
    if not old.is_dir():
        return
    if target.exists():
        _discard(old)
    else:
        os.rename(old, target)


def _discard(directory: FilePath) -> None:
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
    """A verified checkpoint, in memory: file name -> content."""

    path: FilePath
    _tensors: Mapping[str, dict[str, Tensor]] = field(repr=False)
    _documents: Mapping[str, Any] = field(repr=False)

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""
        config: dict[str, Any] = self._documents[CONFIG]
        return config

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
    with _reading(path):
        directory = _locate(path)
        tensors: dict[str, dict[str, Tensor]] = {}
        documents: dict[str, Any] = {}
        for name, entry in _manifest(directory).items():
            data = _verified(directory / name, entry)
            if name.endswith(".json"):
                documents[name] = _parse_json(directory / name, data)
            else:
                tensors[name] = _parse_tensors(directory / name, data)
        if not isinstance(documents[CONFIG], dict):
            raise CheckpointError(directory / CONFIG, f"is not a JSON object: {INSTEAD}")
    return Checkpoint(path, tensors, documents)


@contextmanager
def _reading(path: FilePath) -> Iterator[None]:
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
        raise CheckpointError(path, "pickled files are never read; use mfm convert")
    if path.is_file():
        problem = f"is a file; a checkpoint is a directory: give the one that holds {MANIFEST}"
        raise CheckpointError(path, problem)
    if _old(path).is_dir():  # a crash fell between the two renames
        return _old(path)
    raise CheckpointError(path, f"no such directory: give a checkpoint, a directory that holds {MANIFEST}")


def _manifest(directory: FilePath) -> dict[str, dict[str, Any]]:
    """File name -> {"sha256", "bytes"}; the manifest must have exactly the form that is written."""
    file = directory / MANIFEST
    if not file.is_file():
        fix = "give another directory, or convert foreign weights with mfm convert"
        raise CheckpointError(file, f"missing, so nothing beside it can be verified: {fix}")
    manifest = _parse_json(file, file.read_bytes())
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if type(version) is not int:
        raise CheckpointError(file, f"is not a checkpoint's manifest: {INSTEAD}")
    if version != FORMAT:
        raise CheckpointError(file, _wrong_format(version))
    files = manifest.get("files")
    if set(manifest) != {"format", "files"} or not isinstance(files, dict):
        raise CheckpointError(file, f"is not a checkpoint's manifest: {INSTEAD}")
    for name, entry in files.items():
        plain = FilePath(name).name == name and name.endswith((".json", ".safetensors"))
        if not plain or not isinstance(entry, dict) or set(entry) != {"sha256", "bytes"}:
            raise CheckpointError(file, f"has an entry {name!r} that no checkpoint has: {INSTEAD}")
    for name in (CONFIG, MODEL):
        if name not in files:
            raise CheckpointError(file, f"does not list {name}, which every checkpoint has: {INSTEAD}")
    return files


def _wrong_format(version: Any) -> str:
    return f"has format {version!r}; this package reads format {FORMAT}: pip install --upgrade metaflowmaps"


def _verified(file: FilePath, entry: Mapping[str, Any]) -> bytes:
    if not file.is_file():
        raise CheckpointError(file, f"missing, though {MANIFEST} lists it: {INSTEAD}")
    data = file.read_bytes()
    if len(data) != entry["bytes"]:
        problem = f"has {len(data)} bytes, not the {entry['bytes']} of {MANIFEST}"
        raise CheckpointError(file, f"{problem}: {INSTEAD}")
    if sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointError(file, f"is damaged, its sha256 is not the one in {MANIFEST}: {INSTEAD}")
    return data


def _parse_json(file: FilePath, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"is not JSON: {INSTEAD}") from error


def _parse_tensors(file: FilePath, data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # anything can be hashed, and the parser may trip over it in any way
        raise CheckpointError(file, f"is not a safetensors file: {INSTEAD}") from error


# -- a training run's checkpoints ----------------------------------------------------------------------------


class CheckpointStore:
    """The checkpoints of one run, ``root/step-00001000``: the newest ``keep_last`` and the best."""

    def __init__(self, root: str | FilePath, keep_last: int = 3, keep_best: bool = True) -> None:
        if keep_last < 1:
            raise InputError(f"keep_last must be at least 1, got {keep_last}")
        self.root, self.keep_last, self.keep_best = FilePath(root), keep_last, keep_best

    def path(self, step: int) -> FilePath:
        """Where the checkpoint of a step is."""
        return self.root / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """The steps that have a directory, valid or not, oldest first."""
        if not self.root.is_dir():
            return []
        # .old-: its replacement was cut short; read_checkpoint finds it under either name
        names = (re.fullmatch(r"(?:\.old-)?step-(\d{8,})", entry.name) for entry in self.root.iterdir())
        return sorted({int(name[1]) for name in names if name})

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        documents: Mapping[str, Any],
        score: float | None = None,
    ) -> FilePath:
        """Write the checkpoint of a step, then prune. Lower scores are better; None and NaN never win."""
        if step < 0:
            raise InputError(f"step must be at least 0, got {step}")
        kept = None if score is None or math.isnan(score) else float(score)
        position = {**documents.get(POSITION, {}), "score": kept}
        write_checkpoint(self.path(step), tensors, {**documents, POSITION: position})
        self._prune(step)
        return self.path(step)

    def latest_valid(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that passes every check, and a line for each newer one that does not."""
        skipped: list[str] = []
        for step in reversed(self.steps()):
            try:
                return read_checkpoint(self.path(step)), skipped
            except CheckpointError as error:
                skipped.append(str(error))
        return None, skipped

    def clean(self) -> None:
        """Finish what a crash interrupted; for the process that writes here."""
        with _reading(self.root):
            recover(self.root)

    def _prune(self, newest: int) -> None:
        # later steps are what a resume skipped as invalid: they must not displace valid ones
        steps = [step for step in self.steps() if step <= newest]
        keep = set(steps[-self.keep_last :])
        if self.keep_best:
            scores = [(score, step) for step in steps if (score := self._score(step)) is not None]
            keep |= {step for _, step in sorted(scores)[:1]}
        for step in steps:
            if step not in keep:
                _discard(self.path(step))

    def _score(self, step: int) -> float | None:
        file = self.path(step) / POSITION
        try:
            with _reading(file):
                position = _parse_json(file, _verified(file, _manifest(file.parent)[POSITION]))
        except (CheckpointError, KeyError):
            return None  # damaged, or not written by save
        score = position.get("score") if isinstance(position, dict) else None
        return score if isinstance(score, float) else None


# -- models --------------------------------------------------------------------------------------------------


def model_config(model: MetaFlowMap) -> dict[str, Any]:
    """What build_model needs."""
    from metaflowmaps import __version__

    name, config = getattr(model.network, "name", None), getattr(model.network, "config", None)
    if NETWORKS.get(str(name)) is not type(model.network) or not isinstance(config, dict):
        raise InputError(
            f"a network of type {type(model.network).__name__} cannot be saved: "
            "give it a name and a config and add it to metaflowmaps.networks.NETWORKS"
        )
    return {
        "format": FORMAT,
        "kind": KIND,
        "path": model.path.name,
        "parameterization": model.parameterization,
        "data_std": model.data_std,
        "network": {"name": name, **config},
        "version": __version__,
    }


def build_model(config: Mapping[str, Any]) -> MetaFlowMap:
    """The model a config describes, freshly initialised; keys it does not need are ignored."""
    if config.get("kind") != KIND:
        raise InputError(f"is of kind {config.get('kind')!r}, not {KIND!r}: only meta flow maps are loaded here")
    if config.get("format") != FORMAT:
        raise InputError(_wrong_format(config.get("format")))
    for key in ("path", "parameterization", "data_std", "network"):
        if key not in config:
            raise InputError(f"does not say {key!r}, without which there is no model")
    network, path = make_network(config["network"]), make_path(config["path"])
    return MetaFlowMap(network, path, config["parameterization"], data_std=config["data_std"])


def save_model(model: MetaFlowMap, path: str | FilePath) -> None:
    """Write a model as a checkpoint, all or nothing."""
    write_checkpoint(path, {MODEL: model.state_dict()}, {CONFIG: model_config(model)})


def load_model(path_or_hub_id: str | FilePath, revision: str | None = None, weights: str = "ema") -> MetaFlowMap:
    """The model of a checkpoint, a run's newest valid checkpoint or a hub repository: on CPU, in eval mode.

    ``weights``: "ema" for the averaged ones where there are any, "raw" for the last iterate.
    """
    if weights not in ("ema", "raw"):
        raise unknown("weights", weights, ("ema", "raw"))
    checkpoint = resolve_checkpoint(path_or_hub_id, revision)
    name = EMA if weights == "ema" and checkpoint.has(EMA) else MODEL
    stored = checkpoint.tensors(name)
    try:
        # loading a model must not disturb the caller's random numbers, nor obey their default device
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            model = build_model(checkpoint.config)
            if "data_mean" in stored:  # a number or a tensor: only the checkpoint knows
                model.data_mean = torch.zeros_like(stored["data_mean"])
    except InputError as error:
        raise CheckpointError(checkpoint.path / CONFIG, str(error)) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"does not describe a model ({type(error).__name__}: {error}): {INSTEAD}"
        raise CheckpointError(checkpoint.path / CONFIG, reason) from error
    problem = _misfit(model, stored)
    if problem:
        raise CheckpointError(checkpoint.path / name, f"does not fit {CONFIG}, {problem}: {INSTEAD}")
    for key, slot in [*model.named_parameters(), *model.named_buffers()]:
        if key in stored:  # a tied weight is listed under one of its names only
            slot.data = slot.data.to(stored[key].dtype)
    model.load_state_dict(stored)
    return model.eval()


def resolve_checkpoint(path: str | FilePath, revision: str | None = None) -> Checkpoint:
    """The checkpoint meant by a checkpoint directory, a training run's directory or a hub id; verified."""
    local = FilePath(path)
    with _reading(local):
        root = local if local.name == "checkpoints" else local / "checkpoints"
        if root.is_dir() and not (local / MANIFEST).exists():
            return _newest(root)
        if local.exists() or _old(local).is_dir():
            return read_checkpoint(local)
    if HUB_ID.fullmatch(str(path)):
        return read_checkpoint(_download(str(path), revision))
    raise CheckpointError(
        path,
        f"no such file or directory: give a checkpoint (a directory with {MANIFEST}), a training run "
        "(a directory with checkpoints/) or a hub id (owner/name)",
    )


def push_model(
    model: MetaFlowMap, repo_id: str, private: bool | None = None, token: str | None = None, **options: Any
) -> str:
    """Upload what save_model writes to a hub repository, made if need be; returns its address.

    ``options`` go to ``huggingface_hub.HfApi.upload_folder`` (revision, commit_message, …).
    """
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, FilePath(folder) / "model")
        try:
            from huggingface_hub import HfApi

            api = HfApi(token=token)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=FilePath(folder) / "model", **options)
        except Exception as error:
            fix = "check the name, the network and `hf auth login`"
            problem = f"not uploaded to the hub ({_first_line(error)}): {fix}"
            raise CheckpointError(repo_id, problem) from error
    return str(address)


def _misfit(model: MetaFlowMap, stored: Mapping[str, Tensor]) -> str:
    """How stored tensors differ from what the model needs; empty where they fit."""
    needed = model.state_dict()
    wrong = []
    for key in sorted(needed.keys() & stored.keys()):
        have, need = stored[key], needed[key]
        if have.shape != need.shape:
            wrong.append(f"{key} is {tuple(have.shape)} not {tuple(need.shape)}")
        elif have.is_floating_point() != need.is_floating_point():
            wrong.append(f"{key} is {have.dtype} not {need.dtype}")
    mean, event = model.data_mean.shape, model.event_shape
    # its shape is free (a number or a tensor) as long as it broadcasts to a sample
    if len(mean) > len(event) or any(m not in (1, e) for m, e in zip(mean[::-1], event[::-1], strict=False)):
        wrong.append(f"data_mean is {tuple(mean)} for samples of {event}")
    parts = {
        "missing": sorted(needed.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - needed.keys()),
        "wrong shape or type": wrong,
    }
    return "; ".join(f"{what}: {_some(keys)}" for what, keys in parts.items() if keys)


def _newest(root: FilePath) -> Checkpoint:
    checkpoint, skipped = CheckpointStore(root).latest_valid()
    if checkpoint is None:
        reason = f"; the newest: {skipped[0]}" if skipped else ""
        raise CheckpointError(root, f"holds no valid checkpoint: train first or use another run{reason}")
    for line in skipped:
        warnings.warn(f"skipped {line}", stacklevel=4)
    return checkpoint


def _download(repo_id: str, revision: str | None) -> str:
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors"]
        return str(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except Exception as error:
        problem = f"no such directory, and not on the hub ({_first_line(error)}): check the spelling"
        raise CheckpointError(repo_id, problem) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# -- optimizer states ----------------------------------------------------------------------------------------


def flatten_state(state: dict[Any, Any]) -> tuple[dict[str, Tensor], Any]:
    """A nested state_dict as named tensors and a JSON-able skeleton, for unflatten_state to make it again.

    Exact for dicts (any of these as keys), lists, tuples, tensors, numbers, strings, booleans and None.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _encode(state, "state", tensors)


def unflatten_state(tensors: Mapping[str, Tensor], document: Any) -> dict[Any, Any]:
    """The inverse of flatten_state."""
    try:
        state: dict[Any, Any] = _decode(document, tensors)
    except (LookupError, TypeError, ValueError, struct.error) as error:
        raise InputError(f"not a flattened state ({type(error).__name__}: {error}): {INSTEAD}") from error
    return state


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    # containers become {"type": content}: JSON alone would turn int keys into strings and tuples into lists
    match value:
        case None | bool() | int() | str():
            return value
        case float():  # JSON writes a finite float so that it reads back bit for bit, and has no others
            return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
        case Tensor():
            name = str(len(tensors))
            tensors[name] = value
            return {"tensor": name}
        case list() | tuple():
            items = [_encode(item, f"{where}[{i}]", tensors) for i, item in enumerate(value)]
            return {"list" if isinstance(value, list) else "tuple": items}
        case dict():
            pairs = [
                [_encode(k, f"a key of {where}", tensors), _encode(v, f"{where}[{k!r}]", tensors)]
                for k, v in value.items()
            ]
            return {"dict": pairs}
    raise InputError(
        f"{where} is a {type(value).__name__}: a state is made of dicts, lists, tuples, tensors, numbers, "
        "strings, booleans and None"
    )


def _decode(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(document, dict):
        return document
    [(kind, content)] = document.items()
    match kind:
        case "float":
            return struct.unpack(">d", bytes.fromhex(content))[0]
        case "tensor":
            return tensors[content]
        case "list":
            return [_decode(item, tensors) for item in content]
        case "tuple":
            return tuple(_decode(item, tensors) for item in content)
        case "dict":
            return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    raise ValueError(f"unknown kind {kind!r}")
