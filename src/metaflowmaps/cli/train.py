"""mfm recipes, train and finetune."""

from pathlib import Path
from typing import Annotated, Any

import typer

from metaflowmaps.cli.options import (
    REWARD,
    CheckpointArgument,
    Device,
    Json,
    Out,
    Seed,
    Set,
    Vae,
    app,
    emit,
    invocation,
    judged,
    say,
)
from metaflowmaps.errors import InputError


@app.command()
def recipes() -> None:
    """List the recipes: those to train, then those to run on a map."""
    from metaflowmaps.recipes import RECIPES, TASKS

    for name, make in {**RECIPES, **TASKS}.items():
        print(f"{name:21s} {(make.__doc__ or '').strip().splitlines()[0]}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Which recipe: see mfm recipes.")],
    out: Out = None,
    data: Annotated[
        str | None,
        typer.Option("--data", "--data-dir", metavar="DIR", help="Images: a folder, .npy or .npz; MNIST's files."),
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="A fraction of the time, less exact.")] = False,
    settings: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="At most so many steps, schedule included.")
    ] = None,
    resume: Annotated[str, typer.Option("--resume", help="auto, none, or a run or checkpoint to start from.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Resolve, count, try one step, exit.")] = False,
    as_json: Json = False,
) -> None:
    """Train a meta flow map. Run the same command again to go on after an interruption."""
    from metaflowmaps import commands
    from metaflowmaps.recipes import TASKS
    from metaflowmaps.recipes import recipe as find_recipe
    from metaflowmaps.work import ranks

    if dry_run and recipe in TASKS:
        from metaflowmaps.commands.run import plan_task

        emit(plan_task(recipe, None, settings or [], fast), as_json)
        return

    def resolve() -> Any:
        if max_steps is not None and max_steps < 1:
            raise InputError(f"--max-steps must be at least 1, got {max_steps}")
        return commands.resolve_training(find_recipe(recipe, fast, data), settings or [], seed, max_steps)

    with ranks.session():
        config = ranks.together(resolve)
        if dry_run:
            emit(ranks.first(lambda: commands.dry_run(config, device)), as_json)
            return
        results = commands.train(config, out or Path("runs") / recipe, device, resume, invocation(), say)
        emit(results, as_json)


@app.command()
def finetune(
    checkpoint: CheckpointArgument,
    reward: Annotated[str | None, typer.Option("--reward", help=REWARD)] = None,
    strength: Annotated[float, typer.Option("--strength", help="λ: the reward is multiplied by it.")] = 1.0,
    method: Annotated[
        str, typer.Option("--method", help="mfm-ft, self-normalised, adjoint-matching or draft.")
    ] = "mfm-ft",
    whole: Annotated[
        str | None,
        typer.Option("--map", help="distil (tune the drift, then its whole map), direct (one stage) or none (drift)."),
    ] = None,
    num_draws: Annotated[int | None, typer.Option("--num-draws", min=1, help="Posterior draws a state (N).")] = None,
    guidance: Annotated[float, typer.Option("--guidance", help="Scale w of a base with classes, throughout.")] = 1.0,
    vae: Vae = None,
    stop: Annotated[
        str, typer.Option("--stop", help='Stop early: "distance<2", "reward>5", "reward stalls 4".')
    ] = "none",
    out: Out = None,
    settings: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, help="At most so many steps a stage.")] = None,
    resume: Annotated[str, typer.Option("--resume", help="auto, none, or a tuning run to start from.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Resolve, try the reward and a step, exit.")] = False,
    as_json: Json = False,
) -> None:
    """Put a reward into the weights: a map that samples p_1 e^{λr} without guidance. Run it again to go on."""
    from metaflowmaps import commands
    from metaflowmaps.work import ranks

    ranks.alone("mfm finetune")
    given = {"method": method, "guidance": guidance, "stop": stop}
    whole = whole or ("none" if method == "draft" else None)
    given |= {k: v for k, v in {"map": whole, "num_draws": num_draws, "seed": seed}.items() if v is not None}
    own = list(settings or [])
    moved = next((s.partition("=")[2] for s in own if s.startswith("data=")), None)
    own = [s for s in own if not s.startswith("data=")]
    subject = commands.Subject(checkpoint, reward, strength, moved, device, vae)
    config = commands.resolve_finetuning(subject, given, own, max_steps)
    if dry_run:
        emit(commands.dry_run_finetuning(subject, config), as_json)
        return
    place = out or commands.place_of_finetuning(subject, checkpoint)
    judged(commands.finetune(subject, config, place, resume, invocation(), say), as_json)
