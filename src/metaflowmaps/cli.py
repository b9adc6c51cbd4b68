"""The command line, ``mfm``: thin. It resolves a configuration, calls the package, prints, and sets the exit code.

Exit codes: 0 done, 2 bad usage or bad input (one line on stderr), 130 interrupted (state saved), 1 anything else.
"""

import errno
import json
import os
import shlex
import sys
import warnings
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


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Meta flow maps: train, draw, steer, tune, judge. Start with: mfm demo"""
    if version:
        from metaflowmaps import __version__

        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command()
def recipes() -> None:
    """List the recipes."""
    from metaflowmaps.recipes import RECIPES

    for name, make in RECIPES.items():
        print(f"{name:14s} {(make.__doc__ or '').strip().splitlines()[0]}")


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
    from metaflowmaps.recipes import recipe as find_recipe

    if max_steps is not None and max_steps < 1:
        raise InputError(f"--max-steps must be at least 1, got {max_steps}")
    config = commands.resolve_training(find_recipe(recipe, fast, data), settings or [], seed, max_steps)
    if dry_run:
        emit(commands.dry_run(config, device), as_json)
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

    given = {"method": method, "guidance": guidance, "stop": stop}
    whole = whole or ("none" if method == "draft" else None)
    given |= {k: v for k, v in {"map": whole, "num_draws": num_draws, "seed": seed}.items() if v is not None}
    own = list(settings or [])
    moved = next((s.partition("=")[2] for s in own if s.startswith("data=")), None)
    own = [s for s in own if not s.startswith("data=")]
    subject = commands.Subject(checkpoint, reward, strength, moved, device)
    config = commands.resolve_finetuning(subject, given, own, max_steps)
    if dry_run:
        emit(commands.dry_run_finetuning(subject, config), as_json)
        return
    place = out or commands.place_of_finetuning(subject, checkpoint)
    judged(commands.finetune(subject, config, place, resume, invocation(), say), as_json)


@app.command()
def sample(
    checkpoint: CheckpointArgument,
    num: Num = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Network calls a sample.")] = 1,
    method: Annotated[str, typer.Option("--method", help="refine (Alg. 1), compose (k jumps) or ode.")] = "refine",
    only: Only = None,
    out: Out = None,
    seed: Seed = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw samples of the data law; samples.safetensors holds them and their seeds."""
    from metaflowmaps import commands

    results = commands.sample(
        checkpoint, how_many(num, only), steps, method, out, seed or 0, device, invocation(), only or ()
    )
    emit(results, as_json)


@app.command()
def posterior(
    checkpoint: CheckpointArgument,
    t: Annotated[float, typer.Option("--t", help="Time of the noisy state, in [0, 1].")] = 0.4,
    x: Annotated[
        str | None, typer.Option("--x", help="The noisy state, as numbers: 1.0,-0.5. Drawn if absent.")
    ] = None,
    num_draws: Annotated[int | None, typer.Option("--num-draws", min=1, help=f"How many draws ({NUM}).")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Network calls a draw.")] = 1,
    only: Only = None,
    out: Out = None,
    seed: Seed = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw clean data given a noisy state; writes draws.safetensors with their seeds and a picture."""
    from metaflowmaps import commands

    results = commands.posterior(
        checkpoint, t, x, how_many(num_draws, only), steps, out, seed or 0, device, invocation(), only or ()
    )
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
    label: Annotated[int | None, typer.Option("--label", help="Class to condition on.")] = None,
    only: Only = None,
    out: Out = None,
    settings: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Sample with a reward; samples.safetensors holds samples, rewards, seeds. --set gives a method's own options."""
    from metaflowmaps import commands

    results = commands.steer(
        checkpoint, reward, strength, how_many(num, only), method, num_draws, steps, process, renormalize, label,
        settings or [], out, seed or 0, device, invocation(), sys.stderr.isatty(), only or (),
    )  # fmt: skip
    emit(results, as_json)


Task = Annotated[
    str | None,
    typer.Option("--task", help="Mixtures: gmm-inverse, mixture-16d. Images: class-mixture, race, inverse."),
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
    as_json: Json = False,
) -> None:
    """Every steering method with its cost. Mixtures: against the exact tilted law; images: by a judge no method saw.

    CHECKPOINT "exact" is the mixture itself.
    """
    from metaflowmaps import commands

    if commands.trained_on_images(checkpoint):
        results = on_images(commands.image_task(task), checkpoint, samples, out, settings, seed, device)
    else:
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
    as_json: Json = False,
) -> None:
    """The value from posterior draws, map and GLASS by calls. Mixtures: against the exact one; images: rollouts."""
    from metaflowmaps import commands

    if commands.trained_on_images(checkpoint):
        results = on_images("value", checkpoint, None, out, settings, seed, device)
    else:
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
    as_json: Json = False,
) -> None:
    """Posterior draws, map and GLASS by calls. Mixtures: relative sliced W2; images: Fréchet distance in classifier
    features, over noised held-out images."""
    from metaflowmaps import commands

    if commands.trained_on_images(checkpoint):
        results = on_images("posterior", checkpoint, samples, out, settings, seed, device)
    else:
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
    as_json: Json = False,
) -> None:
    """Unconditional images by network calls: refinement and composed jumps of the map against ODE steps."""
    results = on_images("generation", checkpoint, samples, out, settings, seed, device)
    judged(results, as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Results of commands, or directories of such.")],
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Join runs into one self-contained HTML page."""
    from metaflowmaps.report.html import write_report

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
    from metaflowmaps.report.html import tables_of

    page, results = commands.demo(law, out, seed or 0, say)
    commands.print_tables(tables_of(results))
    print(f"report: {page}")


def on_images(
    name: str,
    checkpoint: str,
    samples: int | None,
    out: Path | None,
    settings: list[str] | None,
    seed: int | None,
    device: str,
) -> dict[str, Any]:
    """An image experiment; --samples is one of its settings."""
    from metaflowmaps import commands

    own = [*([f"samples={samples}"] if samples is not None else []), *(settings or [])]
    return commands.evaluate_images(name, checkpoint, out, own, seed or 0, device, invocation(), say)


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


def main() -> None:
    """Run, and turn what went wrong into one line and an exit code."""
    warnings.showwarning = lambda message, *_args, **_kwargs: say(f"warning: {message}")
    sys.exit(_run())


def _run() -> int:
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # click's own word for an interrupt
            say("interrupted; finished files are kept")
        return code if isinstance(code, int) else 0
    except InputError as error:
        say(f"error: {error}")
        return 1 if _disk_full(error.__cause__) else 2
    except KeyboardInterrupt:
        say("interrupted; finished files are kept")
        return 130
    except BrokenPipeError:
        # the reader left: nothing more to say, and nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _failed(error)


def _disk_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _failed(error: Exception) -> int:
    """The exit code of what else may end a command, with its line; what nobody foresaw is raised."""
    from metaflowmaps.training.loop import Interrupted, NonFiniteLoss

    if isinstance(error, Interrupted):
        say(str(error))
        return 130
    if isinstance(error, NonFiniteLoss):
        say(f"error: {error}")
        return 1
    if _disk_full(error):
        say("error: no space left on the device: free some and run the same command again; checkpoints are intact")
        return 1
    if type(error).__name__ == "Abort":
        say("interrupted; finished files are kept")
        return 130
    # usage errors come from click, which typer carries inside itself from some version on: known by their shape
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message)
        else:
            context = getattr(error, "ctx", None)
            where = context.command_path if context is not None else "mfm"
            say(f"error: {' '.join(message.split())} (see {where} --help)")
        return 2
    raise error


if __name__ == "__main__":
    main()
