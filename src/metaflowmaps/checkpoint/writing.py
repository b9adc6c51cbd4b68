"""Writing checkpoints: everything into a folder beside the target, which one rename then puts in its place."""

import glob
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path as FilePath
from typing import Any

import safetensors.torch
from torch import Tensor

from metaflowmaps._files import STALE_SECONDS, sync_folder, write_new
from metaflowmaps.checkpoint.manifest import (
    CONFIG,
    EMA,
    FORMAT,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    PART,
    POSITION,
    CheckpointError,
    entry_of,
    shortened,
    writing,
)
from metaflowmaps.errors import InputError


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
        with writing(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            _sweep(target)
            _settle(old_name(target))
            _check_replaceable(target, {*tensors, *documents})
            staging.mkdir()
            _fill(staging, tensors, documents)
            _swap(staging, target)
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
    held = {entry.name for entry in target.iterdir()} if target.is_dir() else set()
    others = sorted(name for name in held - known if not PART.fullmatch(name))
    if others:
        problem = f"holds other files ({shortened(others)}): move them or write to another name"
        raise CheckpointError(target, problem)


def _fill(directory: FilePath, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]) -> None:
    """Write all files, then the manifest that lists them, to the disk itself."""
    listed = {}
    for name, content in {**tensors, **documents}.items():
        data = safetensors.torch.save(_storable(content)) if name in tensors else _json(content)
        write_new(directory / name, data)
        listed[name] = entry_of(data)
    write_new(directory / MANIFEST, _json({"format": FORMAT, "files": listed}))
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


def _swap(staging: FilePath, target: FilePath) -> None:
    """Put a complete directory in place; on failure put back the one that was there."""
    old = old_name(target)
    try:
        if target.exists():
            os.rename(target, old)
        os.rename(staging, target)
        sync_folder(target.parent)
    except BaseException:
        if not staging.exists():  # it is in place already
            os.rename(target, staging)
        _settle(old)
        raise
    if old.exists():
        discard(old)


def _sibling(target: FilePath, prefix: str) -> FilePath:
    return target.parent / f"{prefix}{target.name}-{secrets.token_hex(4)}"


def old_name(target: FilePath) -> FilePath:
    """Where a checkpoint steps aside to while it is replaced."""
    return target.parent / f".old-{target.name}"


def _sweep(target: FilePath) -> None:
    """Remove what writers of this checkpoint left who were killed, or whose disk refused to delete."""
    for prefix in (".tmp-", ".del-"):
        for entry in target.parent.glob(f"{glob.escape(prefix + target.name)}-????????"):
            with suppress(OSError):
                if time.time() - entry.stat().st_mtime >= STALE_SECONDS:
                    shutil.rmtree(entry, ignore_errors=True)


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
    """Take a checkpoint away, in one step as far as readers see."""
    # what cannot be deleted now is tried again by the next save: no reason to stop a run
    gone = _sibling(directory, ".del-")
    with suppress(OSError):
        os.rename(directory, gone)
        shutil.rmtree(gone, ignore_errors=True)
