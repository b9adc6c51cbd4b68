"""Run a recipe on a map: steering, posterior, value, FID, fine-tuning at ImageNet scale."""

from typing import Annotated

from pydantic import Field

from metaflowmaps.cli.context import COMPUTES, Argument, Context, Name, Options, Results
from metaflowmaps.errors import InputError


class RunTask(Options):
    """Which recipe, on which map."""

    shared = (*COMPUTES, "resume")

    task: Annotated[str, Argument("TASK")] = Field(description="A recipe that needs a map: see mfm recipes.")
    checkpoint: Annotated[str | None, Argument("[CHECKPOINT]")] = Field(
        None, description="The map: a run, a checkpoint or a hub id; MFM-XL/2, where --dry-run counts without one."
    )
    fast: bool = Field(False, description="A fraction of the time, less exact.")
    settings: Annotated[tuple[str, ...], Name(("--set",), "KEY=VALUE")] = Field(
        (), description="Change a setting of the recipe: key.sub=value (repeatable)."
    )


def run(config: RunTask, context: Context) -> Results:
    """What the recipe's command returns."""
    if context.dry_run:
        return plan_task(config, context)
    if config.checkpoint is None:
        raise InputError(f"which map? mfm run {config.task} CHECKPOINT, or --dry-run to count without one")
    from metaflowmaps.commands.run import run_task

    return run_task(
        config.task, config.checkpoint, context.out, config.settings, context.seed, context.device, config.fast,
        context.resume, context.invocation, context.say,
    )  # fmt: skip


def plan_task(config: RunTask, context: Context) -> Results:
    """What it would take."""
    from metaflowmaps.commands import run as command

    return command.plan_task(config.task, config.checkpoint, config.settings, config.fast)
