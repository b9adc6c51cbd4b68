"""mfm eval, report and demo."""

from pathlib import Path
from typing import Annotated, Any

import typer

from metaflowmaps.cli.options import (
    CheckpointArgument,
    Device,
    Json,
    Out,
    Seed,
    Set,
    ShardSize,
    WorkerOption,
    app,
    evaluate,
    invocation,
    judged,
    say,
)
from metaflowmaps.errors import InputError

Task = Annotated[
    str | None,
    typer.Option(
        "--task", help="Mixtures: gmm-inverse, mixture-16d. Images: class-mixture, race, inverse; latents: race."
    ),
]


@evaluate.command("steering")
def eval_steering(
    checkpoint: CheckpointArgument,
    task: Task = None,
    samples: Annotated[int | None, typer.Option("--samples", help="Samples a run (mixtures: 4096).")] = None,
    out: Out = None,
    settings: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    worker: WorkerOption = None,
    shard_size: ShardSize = None,
    as_json: Json = False,
) -> None:
    """Every steering method with its cost. Mixtures: against the exact tilted law; images: by a judge no method saw.

    CHECKPOINT "exact" is the mixture itself.
    """
    from metaflowmaps import commands

    if commands.trained_on_images(checkpoint):
        results = on_images(
            commands.image_task(task, checkpoint), checkpoint, samples, out, settings, seed, device, worker, shard_size
        )
    else:
        uncut(worker, shard_size)
        results = commands.eval_steering(
            checkpoint, task or "gmm-inverse", samples, out, settings or [], seed or 0, device, invocation(), say
        )
    judged(results, as_json)


@evaluate.command("value")
def eval_value(
    checkpoint: CheckpointArgument,
    task: Annotated[str, typer.Option("--task", help="Mixtures: gmm-inverse or mixture-16d.")] = "gmm-inverse",
    out: Out = None,
    settings: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    worker: WorkerOption = None,
    shard_size: ShardSize = None,
    as_json: Json = False,
) -> None:
    """The value from posterior draws, map and GLASS by calls. Mixtures: against the exact one; images: rollouts."""
    from metaflowmaps import commands

    if commands.trained_on_images(checkpoint):
        results = on_images("value", checkpoint, None, out, settings, seed, device, worker, shard_size)
    else:
        uncut(worker, shard_size)
        results = commands.eval_value(checkpoint, task, out, settings or [], seed or 0, device, invocation(), say)
    judged(results, as_json)


@evaluate.command("posterior")
def eval_posterior(
    checkpoint: CheckpointArgument,
    law: Annotated[str, typer.Option("--law", help="Mixtures: the law whose posteriors are known, gmm.")] = "gmm",
    samples: Annotated[int | None, typer.Option("--samples", help="Samples a set (mixtures: 8192).")] = None,
    out: Out = None,
    settings: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    worker: WorkerOption = None,
    shard_size: ShardSize = None,
    as_json: Json = False,
) -> None:
    """Posterior draws, map and GLASS by calls. Mixtures: relative sliced W2; images: Fréchet distance in classifier
    features, over noised held-out images; latents: of their pictures, posterior FID with --set statistics=FILE."""
    from metaflowmaps import commands

    if commands.trained_on_images(checkpoint):
        results = on_images("posterior", checkpoint, samples, out, settings, seed, device, worker, shard_size)
    else:
        uncut(worker, shard_size)
        results = commands.eval_posterior(
            checkpoint, law, samples or 8192, out, settings or [], seed or 0, device, invocation(), say
        )
    judged(results, as_json)


@evaluate.command("generation")
def eval_generation(
    checkpoint: CheckpointArgument,
    samples: Annotated[int | None, typer.Option("--samples", help="How many samples (2048).")] = None,
    out: Out = None,
    settings: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    worker: WorkerOption = None,
    shard_size: ShardSize = None,
    as_json: Json = False,
) -> None:
    """Images by network calls: refinement and composed jumps of the map against ODE steps.

    Of a map of latents pictures are judged, of all its classes; FID with --set statistics=FILE, which needs no data.
    """
    results = on_images("generation", checkpoint, samples, out, settings, seed, device, worker, shard_size)
    judged(results, as_json)


def on_images(
    name: str,
    checkpoint: str,
    samples: int | None,
    out: Path | None,
    settings: list[str] | None,
    seed: int | None,
    device: str,
    worker: str | None = None,
    shard_size: int | None = None,
) -> dict[str, Any]:
    """An image experiment; --samples is one of its settings."""
    from metaflowmaps import commands
    from metaflowmaps.work.shards import share_of

    own = [*([f"samples={samples}"] if samples is not None else []), *(settings or [])]
    share = share_of(worker, shard_size)
    return commands.evaluate_images(name, checkpoint, out, own, seed or 0, device, invocation(), say, share)


def uncut(worker: str | None, shard_size: int | None) -> None:
    """An evaluation on a mixture is one piece."""
    if worker is not None or shard_size is not None:
        raise InputError("on mixtures evaluations are not cut into shards: leave --worker and --shard-size out")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Results of commands, or directories of such.")],
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Join runs into one self-contained HTML page."""
    from metaflowmaps.lab.report.html import write_report

    print(write_report(runs, out / "report.html" if out.is_dir() else out))


@app.command()
def demo(
    law: Annotated[
        str, typer.Option("--law", help="Which story: digits (shipped models) or gmm (trains a map, minutes).")
    ] = "digits",
    out: Out = None,
    seed: Seed = None,
) -> None:
    """Noisy digits, what they may be, and steered digits, as report.html: about a minute on a laptop."""
    from metaflowmaps import commands
    from metaflowmaps.lab.report.html import tables_of

    page, results = commands.demo(law, out, seed or 0, say)
    commands.print_tables(tables_of(results))
    print(f"report: {page}")
