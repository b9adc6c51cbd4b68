"""A command's place on disk: one directory, claimed by one configuration, with results.json at the end."""

import json
import math
import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from metaflowmaps._files import write_json
from metaflowmaps.errors import InputError
from metaflowmaps.work.config import differences
from metaflowmaps.work.shards import FOLDERS, is_empty

SCHEMA = 1
LOCK = ".lock"
CLAIMING = 10.0  # seconds: what another process needs to claim a directory takes far less
_held: dict[str, int] = {}


def claim(out: Path, command: str, config: dict[str, Any], shared: bool = False) -> dict[str, Any] | None:
    """Take ``out`` for this command and configuration; the results, if it is complete already.

    A directory that holds another configuration is refused and left as it is, unless nothing but its claim was written.
    ``shared``: together with every process that claims it for the very same, until ``release(out)``.
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
        alone = _lock(out, shared)
        if not mark.exists() or not _check_same(out, wanted):  # again: another may have come first
            if not alone:
                release(out)
                raise InputError(f"another process is writing to {out}: wait for it, or choose another --out")
            for folder in FOLDERS:  # of the claim that is replaced: nothing is finished in it
                shutil.rmtree(out / folder, ignore_errors=True)
            write_json(mark, wanted)
        if shared and alone:
            _let_others_in(out)
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
        raise InputError(
            f"{out} holds another run ({'; '.join(lines[:3])}{more}): choose another --out, or repeat its settings"
        )
    return False


def _lock(out: Path, shared: bool) -> bool:
    """Hold ``out`` until this process ends or releases it: two writers would mix their files. Is it alone there?

    A shared claim is taken alone first, where nobody else is there, and the others then let in.
    """
    try:
        import fcntl
    except ImportError:  # no advisory locks on this platform
        return True
    if str(out.resolve()) in _held:
        return True
    file = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    end = time.monotonic() + CLAIMING
    while True:
        for kind in (fcntl.LOCK_EX, *([fcntl.LOCK_SH] if shared else [])):
            with suppress(BlockingIOError):
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                _held[str(out.resolve())] = file
                return kind == fcntl.LOCK_EX
        if not shared or time.monotonic() > end:
            os.close(file)
            raise InputError(f"another process is writing to {out}: wait for it, or choose another --out")
        time.sleep(0.02)


def _let_others_in(out: Path) -> None:
    """From alone to shared."""
    with suppress(ImportError):
        import fcntl

        fcntl.flock(_held[str(out.resolve())], fcntl.LOCK_SH)


def write_results(
    out: Path,
    command: str,
    config: dict[str, Any],
    metrics: dict[str, Any],
    cost: dict[str, Any],
    *,
    seed: int,
    device: torch.device | str,
    invocation: str = "",
) -> dict[str, Any]:
    """Write and return results.json."""
    results = {
        "schema": SCHEMA,
        "command": command,
        "invocation": invocation,
        "config": config,
        "metrics": metrics,
        "cost": cost,
        "environment": environment(seed, device),
    }
    written: dict[str, Any] = finite(results)
    write_json(out / "results.json", written)
    return written


def finite(value: Any) -> Any:
    """The value with null for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment(seed: int, device: torch.device | str) -> dict[str, Any]:
    """What a figure depends on besides its configuration."""
    return {
        "torch": str(torch.__version__),
        "device": _device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "seed": seed,
    }


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a damaged file is refused by name."""
    try:
        value = json.loads(path.read_text())
    except ValueError:
        raise InputError(f"{path} is damaged: move it away and run the command again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object: move it away and run the command again")
    return value


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _commit() -> str | None:
    """The commit of the checkout this package runs from, if it is one."""
    here = Path(__file__).resolve()
    if not (here.parents[3] / ".git").exists():
        return None
    try:
        asked = subprocess.run(
            ["git", "-C", str(here.parents[3]), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
