"""Train a meta flow map. Run the same command again to go on after an interruption."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import torch
from pydantic import Field

from metaflowmaps.checkpoint import load_classifier
from metaflowmaps.cli.context import TRAINS, Argument, Context, Name, Options, Results
from metaflowmaps.cli.results import Request
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.figures import plots, result_figures
from metaflowmaps.lab.imagenet_tasks import TASKS
from metaflowmaps.recipes import recipe
from metaflowmaps.training.building import build_classifier, build_map, fitted
from metaflowmaps.training.classifier_objective import accuracy
from metaflowmaps.training.distributed import check_division, told
from metaflowmaps.training.loop import TrainResult, Watch
from metaflowmaps.training.plan import plan
from metaflowmaps.training.starting import tidy
from metaflowmaps.training.train_config import ClassifierConfig, TrainConfig
from metaflowmaps.training.training_run import run_classifier_training, run_training
from metaflowmaps.work import ranks
from metaflowmaps.work.config import override, validated
from metaflowmaps.work.devices import pick_device
from metaflowmaps.work.progress import training_progress

AnyConfig = TypeVar("AnyConfig", TrainConfig, ClassifierConfig, TrainConfig | ClassifierConfig)


class Train(Options):
    """Which recipe, on what."""

    shared = TRAINS

    recipe: Annotated[str, Argument("RECIPE")] = Field(description="Which recipe: see mfm recipes.")
    data: Annotated[str | None, Name(("--data", "--data-dir"), "DIR")] = Field(
        None, description="Images: a folder, .npy or .npz; MNIST's files; sequences: .npy or .npz."
    )
    fast: bool = Field(False, description="A fraction of the time, less exact.")
    settings: Annotated[tuple[str, ...], Name(("--set",), "KEY=VALUE")] = Field(
        (), description="Change a setting of the recipe: key.sub=value (repeatable)."
    )

    def next_command(self, results: Results, folder: str) -> str:
        """Of a map, its draws; a classifier is for the rewards of another."""
        return f"mfm posterior {folder}" if "model" in results["config"] else ""


def run(config: Train, context: Context) -> Results:
    """Train a recipe; several ranks of torchrun are one run."""
    if config.recipe in TASKS:
        raise InputError(
            f"{config.recipe} needs a map, and trains none from nothing: mfm run {config.recipe} CHECKPOINT"
        )
    return carried_out(Job("train", lambda: recipe(config.recipe, config.fast, config.data)), config.settings, context)


class Job(NamedTuple):
    """A training run to be resolved.

    Args:
        command: which asked for it.
        make: its configuration, before settings.
        check: refuses what cannot be trained as it was resolved.
    """

    command: str
    make: Callable[[], TrainConfig | ClassifierConfig]
    check: Callable[[Any], None] = lambda config: None


def carried_out(job: Job, settings: tuple[str, ...], context: Context, parent: Any = None) -> Results:
    """Resolve and train, or plan; several ranks of torchrun are one run.

    Args:
        job: of the run.
        settings: --set.
        context: what every command has.
        parent: the model that teaches, where it is at hand.
    """
    with ranks.session():
        resolved = ranks.together(lambda: resolve(job.make(), settings, context))
        if not context.dry_run:
            ranks.together(lambda: job.check(resolved))
            return train(resolved, context, job.command, parent)
        torch.set_num_threads(resolved.threads)
        metrics = ranks.first(lambda: plan(resolved, pick_device(context.device)))
        return context.plan(job.command, resolved.model_dump(), metrics)


def resolve(base: AnyConfig, settings: tuple[str, ...], context: Context) -> AnyConfig:
    """The configuration after --set, --seed and --max-steps, with what is measured on the data filled in."""
    # a network that is sized to the data exists only after they are read
    open_network = isinstance(base, TrainConfig) and base.model.network is None
    late = [s for s in settings if open_network and s.startswith("model.network.")]
    config = override(base, [s for s in settings if s not in late])
    changes: Results = {}
    if context.seed is not None:
        changes["seed"] = context.seed
    if context.max_steps is not None:
        changes["steps"] = min(config.steps, context.max_steps)
        if isinstance(config, TrainConfig):  # the drift's are steps too
            changes["drift_steps"] = min(config.drift_steps, context.max_steps)
    config = validated(type(config), {**config.model_dump(), **changes})
    return override(fitted(config), late) if isinstance(config, TrainConfig) else config


def train(
    config: TrainConfig | ClassifierConfig, context: Context, command: str = "train", parent: Any = None
) -> Results:
    """Train; complete runs report, interrupted ones go on. In a session of several ranks, all must enter.

    Args:
        config: of the run.
        context: what every command has.
        command: which asked for it.
        parent: the model that teaches, where it is at hand.
    """
    target = ranks.together(lambda: pick_device(context.device))
    torch.set_num_threads(config.threads)
    # what cannot be built or divided among the ranks claims no directory
    parameters = ranks.together(lambda: _count(config))
    request = Request(context, command, config.model_dump(), Path("runs") / config.recipe)
    done, out = ranks.first(lambda: (request.begin(), request.out))
    request.out = out  # the first rank has chosen it
    if done is not None:
        ranks.first(lambda: tidy(config, out))
        context.say(f"{out} is complete: {config.steps} steps of {config.recipe}")
        return done
    described = config.data.describe()
    if described is not None:
        context.say(described)
    if ranks.size() > 1:
        context.say(told(config, ranks.size()))
    with training_progress(context.say) as report:
        if isinstance(config, TrainConfig):
            watch = Watch(report, _sampler(config, out), context.say)
            result = run_training(config, out, device=target, resume=context.resume, watch=watch, parent=parent)
        else:
            result = run_classifier_training(config, out, device=target, resume=context.resume, watch=Watch(report))
    return ranks.first(lambda: _finish(config, request, result, parameters, target))


def _count(config: TrainConfig | ClassifierConfig) -> int:
    """How many weights it has, if it can be built, and divided among the ranks."""
    check_division(config, ranks.size())
    model = build_map(config) if isinstance(config, TrainConfig) else build_classifier(config)
    return sum(p.numel() for p in model.parameters())


def _finish(
    config: TrainConfig | ClassifierConfig,
    request: Request,
    result: TrainResult,
    parameters: int,
    device: torch.device,
) -> Results:
    """The figures and the results of a run that has reached its end."""
    metrics: Results = {"loss": result.loss, "parameters": parameters}
    if isinstance(config, ClassifierConfig):
        classifier, parts = load_classifier(result.checkpoint), config.data.load()
        metrics |= {
            "accuracy": accuracy(classifier, parts[1]),
            "accuracy_on_training_images": accuracy(classifier, parts[0]),
        }
    else:
        picture = _picture(config, config.seed)
        if picture is not None:
            picture(MetaFlowMap.from_pretrained(result.checkpoint), request.out / "posteriors.png")
        if picture is not None and config.data.law() is None:
            words = result_figures.RECOVERED + result_figures.COLOURS * config.data.latent
            metrics["captions"] = {"posteriors.png": words}
    plots.save(plots.training_curve(request.out / "metrics.jsonl"), request.out / "training.png")
    return request.write(metrics, {"seconds": result.seconds, "steps": result.step}, device)


def _sampler(config: TrainConfig, out: Path) -> Callable[[MetaFlowMap, int], object] | None:
    """What draws a picture of the map on its way."""
    picture = _picture(config, 0)
    if picture is None:
        return None

    def draw(model: MetaFlowMap, step: int) -> Path:
        file = out / "samples" / f"step-{step:08d}.png"
        picture(model, file)
        return file

    return draw


def _picture(config: TrainConfig, seed: int) -> Callable[[MetaFlowMap, Path], object] | None:
    """What draws a picture of the map; vectors have none, but for laws in the plane."""
    law = config.data.law()
    if config.data.observed:
        return None
    if law is None:
        held_out = config.data.load()[1]
        if len(held_out.event_shape) != 3:
            return None
        return lambda model, file: result_figures.draws_picture(model, held_out, file)
    if law.dim != 2:
        return None
    return lambda model, file: plots.save(result_figures.panels(model, law, seed), file)
