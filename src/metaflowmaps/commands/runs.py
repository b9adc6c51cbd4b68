"""A command's place on disk: one directory, claimed by one configuration, with results.json at the end."""

import math
import subprocess
from pathlib import Path
from typing import Any

import torch

from metaflowmaps._files import write_json

SCHEMA = 1


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
