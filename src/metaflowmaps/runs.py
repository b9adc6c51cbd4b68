"""A command's place on disk: one directory, claimed by one configuration, with results.json at the end."""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from metaflowmaps.config import differences
from metaflowmaps.errors import InputError

SCHEMA = 1
LOCK = ".lock"
_held: set[str] = set()


def claim(out: Path, command: str, config: dict[str, Any]) -> dict[str, Any] | None:
    """Take ``out`` for this command and configuration; the results, if it is complete already.

    A directory that holds another configuration is refused and left as it is, unless nothing but its claim was written.
    """
    wanted = {"command": command, "config": config}
    wanted = json.loads(json.dumps(wanted))  # tuples and such as they will come back
    mark = out / "run.json"
    try:
        if mark.exists():
            held = read_json(mark)
            # a directory where nothing but the claim was written holds nothing: a failed start does not occupy it
            begun = any(path != mark and path.name != LOCK for path in out.iterdir())
            if held != wanted and begun:
                lines = differences(held, wanted)
                more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
                raise InputError(
                    f"{out} holds another run ({'; '.join(lines[:3])}{more}): choose another --out, "
                    "or repeat its settings"
                )
            _lock(out)
            if held != wanted:
                write_json(mark, wanted)
            results = out / "results.json"
            return read_json(results) if results.exists() else None
        if out.exists() and not out.is_dir():
            raise InputError(f"--out {out} is a file: give a directory")
        if out.exists() and any(path.name == "manifest.json" for path in out.iterdir()):
            raise InputError(f"--out {out} is a checkpoint: give another directory")
        out.mkdir(parents=True, exist_ok=True)
        _lock(out)
        write_json(mark, wanted)
    except OSError as error:
        raise InputError(f"cannot write to --out {out}: {error.strerror}; choose another directory") from None
    return None


def _lock(out: Path) -> None:
    """Hold ``out`` until this process ends: two writers in one directory would mix their files."""
    try:
        import fcntl
    except ImportError:  # no advisory locks on this platform
        return
    file = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        if str(out.resolve()) not in _held:
            raise InputError(f"another process is writing to {out}: wait for it, or choose another --out") from None
        return
    _held.add(str(out.resolve()))


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


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w") as file:
            json.dump(value, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a damaged file is refused by name."""
    try:
        value = json.loads(path.read_text())
    except ValueError:
        raise InputError(f"{path} is damaged: move it away and run the command again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} does not hold a JSON object: move it away and run the command again")
    return value


def pick_device(name: str) -> torch.device:
    """The device of ``--device``: auto, cpu, cuda, cuda:1, mps."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown --device {name!r}: use auto, cpu or cuda") from None
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise InputError(f"--device {name}: this machine has no such GPU; use --device cpu")
    if device.type not in ("cpu", "cuda", "mps") or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"--device {name} is not available here: use auto, cpu or cuda")
    return device


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _commit() -> str | None:
    """The commit of the checkout this package runs from, if it is one."""
    here = Path(__file__).resolve()
    if not (here.parents[2] / ".git").exists():
        return None
    try:
        asked = subprocess.run(
            ["git", "-C", str(here.parents[2]), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() or None
