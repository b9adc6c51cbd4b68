"""mfm sample, posterior and steer."""

import sys
from typing import Annotated

import typer

from metaflowmaps.cli.options import (
    NUM,
    REWARD,
    CheckpointArgument,
    Device,
    Guidance,
    Images,
    Json,
    Label,
    Num,
    Only,
    Out,
    Precision,
    Seed,
    Set,
    ShardSize,
    Vae,
    WorkerOption,
    app,
    emit,
    how_many,
    invocation,
    say,
)


@app.command()
def sample(
    checkpoint: CheckpointArgument,
    num: Num = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Network calls a sample.")] = 1,
    method: Annotated[str, typer.Option("--method", help="refine (Alg. 1), compose (k jumps) or ode.")] = "refine",
    label: Label = None,
    guidance: Guidance = None,
    vae: Vae = None,
    precision: Precision = "float32",
    images: Images = False,
    only: Only = None,
    worker: WorkerOption = None,
    shard_size: ShardSize = None,
    out: Out = None,
    seed: Seed = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw samples of the data law; samples.safetensors holds them and their seeds."""
    from metaflowmaps import commands
    from metaflowmaps.commands.scene import Wish
    from metaflowmaps.work.shards import share_of

    results = commands.sample(
        checkpoint, how_many(num, only), steps, method, out, seed or 0, device, invocation(), only or (),
        share_of(worker, shard_size), say, Wish(label, guidance, vae, precision, images),
    )  # fmt: skip
    emit(results, as_json)


@app.command()
def posterior(
    checkpoint: CheckpointArgument,
    t: Annotated[float, typer.Option("--t", help="Time of the noisy state, in [0, 1].")] = 0.4,
    x: Annotated[
        str | None, typer.Option("--x", help="The noisy state, as numbers: 1.0,-0.5. Drawn if absent.")
    ] = None,
    image: Annotated[str | None, typer.Option("--image", help="A clean picture to noise, in place of --x.")] = None,
    num_draws: Annotated[int | None, typer.Option("--num-draws", min=1, help=f"How many draws ({NUM}).")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Network calls a draw.")] = 1,
    label: Label = None,
    guidance: Guidance = None,
    vae: Vae = None,
    precision: Precision = "float32",
    images: Images = False,
    only: Only = None,
    worker: WorkerOption = None,
    shard_size: ShardSize = None,
    out: Out = None,
    seed: Seed = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw clean data given a noisy state; writes draws.safetensors with their seeds and a picture."""
    from metaflowmaps import commands
    from metaflowmaps.commands.scene import Wish
    from metaflowmaps.work.shards import share_of

    results = commands.posterior(
        checkpoint, t, x, how_many(num_draws, only), steps, out, seed or 0, device, invocation(), only or (),
        share_of(worker, shard_size), say, Wish(label, guidance, vae, precision, images), image,
    )  # fmt: skip
    emit(results, as_json)


@app.command()
def steer(
    checkpoint: CheckpointArgument,
    reward: Annotated[
        str | None,
        typer.Option("--reward", help=REWARD),
    ] = None,
    strength: Annotated[float, typer.Option("--strength", help="λ: the reward is multiplied by it.")] = 1.0,
    num: Num = None,
    method: Annotated[
        str,
        typer.Option("--method", help="none, mfm-g, mfm-gf, mfm-search, mfm-smc, dps, tds, best-of-n, glass or exact."),
    ] = "mfm-g",
    num_draws: Annotated[int, typer.Option("--num-draws", min=1, help="Posterior draws a step (N).")] = 4,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the time grid.")] = 250,
    process: Annotated[str, typer.Option("--process", help="ode or sde.")] = "ode",
    renormalize: Annotated[str, typer.Option("--renormalize", help="none, clip or rescale.")] = "none",
    label: Label = None,
    guidance: Guidance = None,
    vae: Vae = None,
    precision: Precision = "float32",
    images: Images = False,
    only: Only = None,
    worker: WorkerOption = None,
    shard_size: ShardSize = None,
    out: Out = None,
    settings: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Sample with a reward; samples.safetensors holds samples, rewards, seeds. --set gives a method's own options."""
    from metaflowmaps import commands
    from metaflowmaps.commands.scene import Wish
    from metaflowmaps.work.shards import share_of

    results = commands.steer(
        checkpoint, reward, strength, how_many(num, only), method, num_draws, steps, process, renormalize,
        settings or [], out, seed or 0, device, invocation(), sys.stderr.isatty(), only or (),
        share_of(worker, shard_size), say, Wish(label, guidance, vae, precision, images),
    )  # fmt: skip
    emit(results, as_json)
