"""A directory of results: claimed by one request, refused to others, complete once it holds results.json."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from metaflowmaps._files import lock, read_regular, share_lock, sweep, write_json
from metaflowmaps.errors import InputError
from metaflowmaps.work.config import differences
from metaflowmaps.work.shards import FOLDERS, is_empty

LOCK = ".lock"
CLAIM_SECONDS = 10.0  # what another process needs to claim a directory takes far less
_held: dict[str, int] = {}


class Occupied(InputError):
    """The directory holds another request."""


def claim(out: Path, command: str, config: dict[str, Any], shared: bool = False) -> dict[str, Any] | None:
    """Take a directory for one request; another request's is refused and left as it is, unless nothing is in it.

    Args:
        out: The directory, made if need be.
        command: What is asked for,
        config: and whatever tells it from other requests.
        shared: Whether every process that claims it for the very same may have it too, until ``release(out)``.

    Returns:
        results.json, if the directory is complete already.
    """
    wanted = {"command": command, "config": config}
    wanted = json.loads(json.dumps(wanted))  # tuples and such as they will come back
    mark = out / "run.json"
    try:
        if mark.exists():
            _check_same(out, wanted)
        else:
            if out.exists() and not out.is_dir():
                raise InputError(f"--out {out} is a file: give a directory")
            if out.exists() and any(path.name == "manifest.json" for path in out.iterdir()):
                raise InputError(f"--out {out} is a checkpoint: give another directory")
            out.mkdir(parents=True, exist_ok=True)
        alone = _hold(out, shared)
        if not mark.exists() or not _check_same(out, wanted):  # again: another may have come first
            if not alone:
                release(out)
                raise InputError(f"another process is writing to {out}: wait for it, or choose another --out")
            for folder in FOLDERS:  # of the claim that is replaced: nothing is finished in it
                shutil.rmtree(out / folder, ignore_errors=True)
            write_json(mark, wanted)
        if alone:
            sweep(out, 0)  # of processes that were killed: none is here now
        if shared and alone:
            share_lock(_held[str(out.resolve())])
            if not _check_same(out, wanted):
                release(out)
                raise InputError(f"another process has just claimed {out}: choose another --out")
        results = out / "results.json"
        return read_json(results) if results.exists() else None
    except OSError as error:
        raise InputError(f"cannot write to --out {out}: {error.strerror}; choose another directory") from None


def release(out: Path) -> None:
    """Let go of a directory before this process ends."""
    file = _held.pop(str(out.resolve()), None)
    if file is not None:
        os.close(file)


def _check_same(out: Path, wanted: dict[str, Any]) -> bool:
    """Does ``out`` hold what is wanted? Another run is refused, unless nothing of it was written."""
    held = read_json(out / "run.json")
    if held == wanted:
        return True
    # a directory where nothing but the claim was written holds nothing: a failed start does not occupy it
    begun = any(
        path.name not in ("run.json", LOCK) and not (path.name in FOLDERS and is_empty(path)) for path in out.iterdir()
    )
    if begun:
        lines = differences(held, wanted)
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise Occupied(
            f"{out} holds another run ({'; '.join(lines[:3])}{more}): choose another --out, or repeat its settings"
        )
    return False


def _hold(out: Path, shared: bool) -> bool:
    """Hold ``out`` until this process ends or releases it: two writers would mix their files. Is it alone there?

    A shared claim is taken alone first, where nobody else is there, and the others then let in.
    """
    if str(out.resolve()) in _held:
        return True
    end = time.monotonic() + CLAIM_SECONDS
    while True:
        for together in (False, True) if shared else (False,):
            file = lock(out / LOCK, wait=False, shared=together)
            if file is not None:
                _held[str(out.resolve())] = file
                return not together
        if not shared or time.monotonic() > end:
            raise InputError(f"another process is writing to {out}: wait for it, or choose another --out")
        time.sleep(0.02)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a damaged file is refused by name."""
    try:
        value = json.loads(read_regular(path))
    except ValueError:
        raise InputError(f"{path} is damaged: move it away and run the command again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object: move it away and run the command again")
    return value
