"""mfm array."""

import json
from typing import Annotated

import typer

from metaflowmaps.cli.options import Json, app, emit, say


@app.command()
def array(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND…", help="sample, posterior, steer or eval …")],
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="How many tasks share the shards.")] = 8,
    cluster: Annotated[str, typer.Option("--cluster", help="slurm or local.")] = "slurm",
    partition: Annotated[str | None, typer.Option("--partition", help="Slurm partition.")] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="GPUs a task.")] = 0,
    cpus: Annotated[int | None, typer.Option("--cpus", min=1, help="CPU cores a task.")] = None,
    hours: Annotated[float, typer.Option("--hours", min=0.01, help="Time limit of a task.")] = 24.0,
    slurm: Annotated[
        list[str] | None, typer.Option("--slurm", help="Another option of sbatch: account=mine (repeatable).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and exit.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the tasks and print the results.")] = False,
    as_json: Json = False,
) -> None:
    """Run a command as a Slurm array, its shards shared by the tasks: mfm array --tasks 8 -- sample CKPT --out DIR

    Run it again to submit only what is missing; logs are in DIR/array.
    """
    from metaflowmaps.commands.array import ArrayFailed, Request, sbatch_options, submit_array

    request = Request(tasks, cluster, partition, gpus, cpus, hours, sbatch_options(slurm or []))
    try:
        results = submit_array(command, request, dry_run, wait, say)
    except ArrayFailed as failed:
        say(f"error: {failed}")
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(results))
    elif "metrics" in results:
        emit(results, as_json)
    else:
        for line in results.get("commands", []):
            print(line)
