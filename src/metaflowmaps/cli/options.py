"""What the commands share: the application, the options that several take, and what they print."""

import json
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from metaflowmaps.errors import InputError

app = typer.Typer(
    name="mfm",
    help="Meta flow maps: train, draw, steer, tune, judge. Start with: mfm demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
evaluate = typer.Typer(no_args_is_help=True, help="Measure a checkpoint; writes results.json and figures.")
app.add_typer(evaluate, name="eval")

NUM = 1024  # samples, where nobody says

REWARD = "file.py:function; mixtures: gmm-inverse, mixture-16d; images: margin:7 (be a 7), slant, ink, half, mixture."

Out = Annotated[Path | None, typer.Option("--out", help="Directory for results.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change a setting: key.sub=value (repeatable).")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of every random stream.")]
Num = Annotated[int | None, typer.Option("--num", min=1, help=f"How many samples ({NUM}).")]
Only = Annotated[
    list[int] | None,
    typer.Option("--only", min=0, max=2**63 - 1, help="Make the sample with this saved seed again (repeatable)."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Result on stdout as JSON, progress on stderr.")]
CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A run or checkpoint directory, a hub id, or digits.")
]


def say(line: str) -> None:
    """Progress and messages: stderr."""
    with suppress(BrokenPipeError):  # nobody reads the progress: the work goes on
        print(line, file=sys.stderr, flush=True)


def how_many(num: int | None, only: list[int] | None) -> int:
    """--num, or as many as --only names."""
    if only and num is not None and num != len(only):
        raise InputError(f"--only names {len(only)} samples and --num asks for {num}: leave --num out")
    return len(only) if only else num or NUM


def judged(results: dict[str, Any], as_json: bool) -> None:
    """A measurement's tables, then what every command prints."""
    from metaflowmaps.commands import print_tables
    from metaflowmaps.report.html import tables_of

    if not as_json:
        print_tables(tables_of(results))
    emit(results, as_json)


def emit(results: dict[str, Any], as_json: bool) -> None:
    """The result on stdout: as JSON, or as where to find it."""
    if as_json:
        print(json.dumps(results))
        return
    for name, value in {**results.get("metrics", {}), **results.get("cost", {})}.items():
        if isinstance(value, int | float | str):
            print(f"{name:24s} {value:,.6g}" if isinstance(value, float) else f"{name:24s} {value}")
    if "out" in results:
        print(f"results: {results['out']}")


def invocation() -> str:
    """The command as it was typed."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
