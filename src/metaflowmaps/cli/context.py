"""What every command needs besides its own options: where to write, seed, device, workers, and how to speak.

Its fields are the options that commands share; ``shared`` of a command's configuration names those it takes.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import Field, field_validator

from metaflowmaps.errors import InputError
from metaflowmaps.work.config import Config
from metaflowmaps.work.launch import launched
from metaflowmaps.work.progress import ForgivingStream

if TYPE_CHECKING:
    from metaflowmaps.work.shards import Share

Results = dict[str, Any]  # results.json
Tables = dict[str, tuple[list[str], list[list[str]]]]  # title -> (head, rows)

COMPUTES = ("out", "seed", "device", "as_json", "dry_run")
IN_SHARDS = (*COMPUTES, "worker", "shard_size")
TRAINS = (*COMPUTES, "max_steps", "resume")


class Failed(Exception):
    """What ends a command with exit code 1 and its line."""


class Argument(NamedTuple):
    """Marks a field that is given by its position: ``checkpoint: Annotated[str, Argument("CHECKPOINT")]``."""

    metavar: str


class Name(NamedTuple):
    """Marks a field whose option is called otherwise: ``Annotated[bool, Name(("--json",))]``."""

    names: tuple[str, ...]
    metavar: str | None = None


def typed() -> str:
    """The command as it was typed."""
    name = Path(sys.argv[0]).name
    return shlex.join(["mfm" if name == "__main__.py" else name, *sys.argv[1:]])


def typed_settings(command: str, settings: Sequence[str]) -> str:
    """A command with ``--set`` as one would type it."""
    return " ".join(["mfm", command, *(f"--set {shlex.quote(setting)}" for setting in settings)])


class Context(Config):
    """The options that commands share, and how they speak."""

    out: Path | None = Field(None, description="Directory for results.")
    seed: int | None = Field(None, ge=0, description="Seed of every random stream.")
    device: str = Field("auto", description="auto, cpu or cuda.")
    as_json: Annotated[bool, Name(("--json",))] = Field(
        False, description="Result on stdout as JSON, progress on stderr."
    )
    dry_run: bool = Field(False, description="Resolve the configuration, estimate, exit.")
    max_steps: int | None = Field(None, ge=1, description="At most so many steps, schedule included.")
    resume: str = Field("auto", description="auto, none, or a run or checkpoint to start from.")
    worker: Annotated[str | None, Name(("--worker",), "i/K")] = Field(
        None, description="Do shards i, i + K, … and leave the others to other processes."
    )
    shard_size: int | None = Field(None, ge=1, description="Samples a shard (64 where workers share them).")
    invocation: str = Field(default_factory=typed)

    @field_validator("out", mode="before")
    @classmethod
    def _own(cls, given: Any) -> Any:
        """A folder of its own: not the one that nobody named, nor all there is."""
        if given is not None and (not str(given).strip() or Path(given).resolve() == Path(given).resolve().parent):
            raise InputError(
                f"--out {str(given)!r} is no directory for results: name one of its own, as --out runs/one"
            )
        return given

    @property
    def share(self) -> "Share":
        """How this process takes part in work that is cut into shards."""
        from metaflowmaps.work.shards import share_of  # brings torch, which help does without

        return share_of(self.worker, self.shard_size)

    def say(self, line: str) -> None:
        """Progress and messages: stderr; of several ranks, the first one's."""
        say(line)

    def plan(self, command: str, config: Results, metrics: Results) -> Results:
        """The answer of ``--dry-run``."""
        return {"schema": 1, "command": command, "dry_run": True, "config": config, "metrics": metrics, "cost": {}}


class Options(Config):
    """The base of a command's configuration."""

    shared: ClassVar[tuple[str, ...]] = COMPUTES

    def next_command(self, results: Results, folder: str) -> str:
        """What to type after this command; empty for nothing.

        Args:
            results: of the command; empty of one that only prints.
            folder: where they were written, as one types it.
        """
        return f"mfm report {folder}"


class OnCheckpoint(Options):
    """The base of a command on a checkpoint."""

    checkpoint: Annotated[str, Argument("CHECKPOINT")] = Field(
        description="A run or checkpoint directory, a hub id, or a shipped one: digits, emoji."
    )

    @property
    def named(self) -> str:
        """The checkpoint, as one types it."""
        return shlex.quote(self.checkpoint)


def say(line: str) -> None:
    """A line on stderr; of several ranks, the first one's."""
    if launched().rank == 0:
        complain(line)


def complain(line: str) -> None:
    """What went wrong, on any rank."""
    print(line, file=ForgivingStream(sys.stderr), flush=True)
