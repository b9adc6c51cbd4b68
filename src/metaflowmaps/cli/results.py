"""A command's place on disk: one directory, claimed by one request, with results.json at the end."""

import json
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from metaflowmaps._files import finite, write_json
from metaflowmaps.cli.context import Context, Results
from metaflowmaps.work.claims import Occupied, claim

SCHEMA = 1


@dataclass
class Request:
    """What is asked for: a command, whatever tells it from other requests, and the directory where it is answered.

    Without ``--out`` that is ``out``, or where another request holds it ``out`` with a hash of this one.
    """

    context: Context
    command: str
    config: Results
    out: Path

    def begin(self, shared: bool = False) -> Results | None:
        """Claim the directory; what the request ended with, if it is complete already."""
        if self.context.out is not None:
            self.out = self.context.out
        try:
            done = claim(self.out, self.command, self.config, shared)
        except Occupied:
            if self.context.out is not None:
                raise
            text = json.dumps([self.command, self.config], sort_keys=True)
            self.out = self.out.with_name(f"{self.out.name}-{sha256(text.encode()).hexdigest()[:8]}")
            done = claim(self.out, self.command, self.config, shared)
        return None if done is None else self.told(done)

    def told(self, results: Results) -> Results:
        """Results, with the file that holds them."""
        return {**results, "out": str(self.out / "results.json")}

    def write(self, metrics: Results, cost: Results, device: torch.device | str) -> Results:
        """Write and return results.json."""
        seed = self.config.get("seed", self.context.seed or 0)
        results: Results = finite(
            {
                "schema": SCHEMA,
                "command": self.command,
                "invocation": self.context.invocation,
                "config": self.config,
                "metrics": metrics,
                "cost": cost,
                "environment": environment(seed, device),
            }
        )
        write_json(self.out / "results.json", results)
        return self.told(results)


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
