"""What the commands share: the application, the options that several take, and what they print."""

import json
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from metaflowmaps.errors import InputError
from metaflowmaps.work.ranks import launched

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

REWARD = (
    "file.py:function; mixtures: gmm-inverse, mixture-16d; images: margin:7 (be a 7), slant, ink, half, mixture; "
    "pictures: pickscore:PROMPT, hpsv2, imagereward or clip likewise, aesthetic, classifier:CLASS."
)

Out = Annotated[Path | None, typer.Option("--out", help="Directory for results.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change a setting: key.sub=value (repeatable).")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of every random stream.")]
Num = Annotated[int | None, typer.Option("--num", min=1, help=f"How many samples ({NUM}).")]
Only = Annotated[
    list[int] | None,
    typer.Option("--only", min=0, max=2**63 - 1, help="Make the sample with this saved seed again (repeatable)."),
]
WorkerOption = Annotated[
    str | None,
    typer.Option("--worker", metavar="i/K", help="Do shards i, i + K, … and leave the others to other processes."),
]
ShardSize = Annotated[
    int | None, typer.Option("--shard-size", min=1, help="Samples a shard (64 where workers share them).")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Result on stdout as JSON, progress on stderr.")]
CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A run or checkpoint directory, a hub id, or digits.")
]


Label = Annotated[str | None, typer.Option("--label", help="Class, by number or name; all: the classes in turn.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Scale w of class guidance, of maps that know it.")]
Vae = Annotated[str | None, typer.Option("--vae", help="Autoencoder of latents: a folder or hub id, where not known.")]
Precision = Annotated[str, typer.Option("--precision", help="What the networks compute in: float32 or bf16.")]
Images = Annotated[bool, typer.Option("--images", help="Write every sample as a PNG too.")]


def say(line: str) -> None:
    """Progress and messages: stderr; of several ranks, the first one's."""
    if launched().rank == 0:
        complain(line)


def complain(line: str) -> None:
    """What went wrong, on any rank."""
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
    from metaflowmaps.lab.report.html import tables_of

    if not as_json and "command" in results:  # a worker among others has none
        print_tables(tables_of(results))
    emit(results, as_json)


def emit(results: dict[str, Any], as_json: bool) -> None:
    """The result on stdout: as JSON, or as where to find it; of several ranks, the first one's."""
    if launched().rank:
        return
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
    name = Path(sys.argv[0]).name
    return shlex.join(["mfm" if name == "__main__.py" else name, *sys.argv[1:]])
