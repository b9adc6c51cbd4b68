"""mfm run."""

from typing import Annotated

import typer

from metaflowmaps.cli.options import Device, Json, Out, Seed, Set, app, emit, invocation, judged, say
from metaflowmaps.errors import InputError


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe that needs a map: see mfm recipes.")],
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="CHECKPOINT", help="The map: a run, a checkpoint or a hub id.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A fraction of the time, less exact.")] = False,
    out: Out = None,
    settings: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    resume: Annotated[str, typer.Option("--resume", help="Of tuning: auto, none, or a run to start from.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count parameters, memory and calls, exit.")] = False,
    as_json: Json = False,
) -> None:
    """Run a recipe on a map: steering, posterior, value, FID, fine-tuning at ImageNet scale."""
    from metaflowmaps.commands.run import plan_task, run_task

    if dry_run:
        emit(plan_task(recipe, checkpoint, settings or [], fast), as_json)
        return
    if checkpoint is None:
        raise InputError(f"which map? mfm run {recipe} CHECKPOINT, or --dry-run to count without one")
    judged(run_task(recipe, checkpoint, out, settings or [], seed, device, fast, resume, invocation(), say), as_json)
