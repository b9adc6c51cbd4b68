"""What a run writes of its steps: metrics.jsonl, which its checkpoints vouch for, and timings.jsonl beside it."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from metaflowmaps._files import sweep, write_whole
from metaflowmaps.checkpoint import CheckpointStore
from metaflowmaps.errors import InputError
from metaflowmaps.training.state import TrainState, truncate
from metaflowmaps.work import ranks


class RunLost(RuntimeError):
    """The files of a run were taken away while it wrote them."""


@dataclass(frozen=True)
class Record:
    """What the loop reports every ``log_every`` steps."""

    step: int
    steps: int
    metrics: dict[str, float]
    seconds: float


class RunLog:
    """metrics.jsonl, cut back to the checkpoint on resume, and timings.jsonl beside it; the first rank's alone."""

    def __init__(self, out: Path, state: TrainState) -> None:
        self.state = state
        self.seconds_before = 0.0
        if ranks.rank():
            return
        sweep(out, 0)  # nobody else writes there
        self.metrics, self.timings = out / "metrics.jsonl", out / "timings.jsonl"
        truncate(self.metrics, state.metrics_bytes)
        if state.metrics_bytes and (not self.metrics.exists() or self.metrics.stat().st_size < state.metrics_bytes):
            raise InputError(
                f"{self.metrics} is shorter than its checkpoint recorded: restore it, or start in another --out"
            )
        kept = _timings(self.timings, state.step)
        write_whole(self.timings, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.seconds_before = float(kept[-1]["seconds"]) if kept else 0.0

    def write(self, record: Record) -> None:
        """Append a record to both."""
        if ranks.rank():
            return
        line = (json.dumps({"step": record.step, **record.metrics}) + "\n").encode()
        self.check()
        with self.metrics.open("ab") as file:
            file.write(line)
        self.state.metrics_bytes += len(line)
        rate = record.step / record.seconds if record.seconds else 0.0
        with self.timings.open("a") as file:
            timing = {"step": record.step, "seconds": record.seconds, "steps_per_second": rate}
            file.write(json.dumps(timing) + "\n")

    def sync(self) -> None:
        """Flush the metrics to disk: a checkpoint vouches for their length."""
        if ranks.rank():
            return
        self.check()
        if self.metrics.exists():
            with self.metrics.open("rb") as file:
                os.fsync(file.fileno())

    def check(self) -> None:
        """Is the log what this run has written? A folder that was emptied or renamed would fill with a part of one."""
        held = self.metrics.stat().st_size if self.metrics.is_file() else 0
        if held != self.state.metrics_bytes:
            what = "is gone" if not held else f"has {held} bytes, not the {self.state.metrics_bytes} that were written"
            raise RunLost(
                f"{self.metrics} {what}: put the run's files back, then the same command goes on from {self.last()}"
            )

    def last(self) -> str:
        """The last good state, in words."""
        steps = CheckpointStore(self.metrics.parent / "checkpoints").steps()
        return f"the checkpoint of step {steps[-1]}" if steps else "its last checkpoint, wherever that is now"


def _timings(path: Path, last: int) -> list[Mapping[str, float]]:
    """The records of a log up to step ``last`` or the first damaged line: a write may have been cut short."""
    kept: list[Mapping[str, float]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
            float(record["seconds"])
            if record["step"] <= last:
                kept.append(record)
        except (ValueError, TypeError, KeyError):
            break
    return kept
