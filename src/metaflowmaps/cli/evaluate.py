"""Measure a checkpoint; writes results.json and figures."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator

from metaflowmaps.checkpoint import resolve_checkpoint
from metaflowmaps.cli.context import IN_SHARDS, Context, Name, OnCheckpoint, Results
from metaflowmaps.cli.drawing import left_to_others, shared_claim
from metaflowmaps.cli.results import Request
from metaflowmaps.cli.rewards import JUDGES, judge_of_pictures
from metaflowmaps.data import DataSource
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.lab.evaluate.images.experiments import EXPERIMENTS, STEERING, on_images, prepare, usual_steering
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig
from metaflowmaps.lab.evaluate.posterior_error import PosteriorEvalConfig, evaluate_posterior
from metaflowmaps.lab.evaluate.steering_error import SteeringEvalConfig, cells, evaluate_steering
from metaflowmaps.lab.evaluate.value_error import ValueEvalConfig, evaluate_value
from metaflowmaps.lab.evaluate.variants import variant
from metaflowmaps.lab.figures import plots, result_figures, steering_figures
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.path import LinearPath
from metaflowmaps.posterior import ExactModel
from metaflowmaps.recipes.gmm import LAW
from metaflowmaps.recipes.tasks import SteeringTask, steering_task
from metaflowmaps.work.choices import build
from metaflowmaps.work.config import Config, override, validated
from metaflowmaps.work.shards import Unfinished, discard

EXACT = "exact"  # in the place of a checkpoint: the mixture itself
LAWS: dict[str, DataSource] = {"gmm": LAW}


def law_named(name: str) -> DataSource:
    """A law of :data:`LAWS`, or a data source of the user's own that knows its law."""
    if ":" in name:
        return build(DataSource, name, {})
    if name not in LAWS:
        raise unknown("law", name, [*LAWS, "file.py:Name"])
    return LAWS[name]


class Evaluation(OnCheckpoint):
    """What every evaluation is told; the settings of its experiment are reached by --set."""

    shared = IN_SHARDS

    settings: Annotated[tuple[str, ...], Name(("--set",), "KEY=VALUE")] = Field(
        (), description="Change a setting: key.sub=value (repeatable)."
    )


class PosteriorEvaluation(Evaluation):
    """Of posterior draws."""

    law: str = Field("gmm", description="Mixtures: the law whose posteriors are known: gmm, or file.py:Name.")
    samples: int | None = Field(None, ge=2, description="Samples a set (mixtures: 8192).")

    @field_validator("law")
    @classmethod
    def _known(cls, law: str) -> str:
        law_named(law)
        return law


class SteeringEvaluation(Evaluation):
    """Of steering methods."""

    task: str | None = Field(
        None, description="Mixtures: gmm-inverse, mixture-16d. Images: class-mixture, race, inverse; latents: race."
    )
    samples: int | None = Field(None, ge=2, description="Samples a run (mixtures: 4096).")


class ValueEvaluation(Evaluation):
    """Of value estimates."""

    task: str = Field("gmm-inverse", description="Mixtures: gmm-inverse or mixture-16d.")


class GenerationEvaluation(Evaluation):
    """Of samples."""

    samples: int | None = Field(None, ge=2, description="How many samples (2048).")


def posterior(config: PosteriorEvaluation, context: Context) -> Results:
    """Posterior draws, map and GLASS by calls.

    Mixtures: relative sliced W2. Images: Fréchet distance in classifier features, over noised held-out images. Latents:
    that of their pictures, posterior FID with --set statistics=FILE.
    """
    if _of_images(config):
        return _experiment("posterior", config, context, config.samples)
    _uncut(context)
    given = {"samples": config.samples or 8192, "seed": context.seed or 0}
    return posterior_of_mixture(config, override(validated(PosteriorEvalConfig, given), config.settings), context)


def steering(config: SteeringEvaluation, context: Context) -> Results:
    """Every steering method with its cost.

    Mixtures: against the exact tilted law; CHECKPOINT "exact" is the mixture itself. Images: by a judge no method saw.
    """
    if config.checkpoint != EXACT and _of_images(config):
        experiment = config.task or usual_steering(resolve_checkpoint(config.checkpoint))
        if experiment not in STEERING:
            raise unknown("task for images", experiment, STEERING)
        return _experiment(experiment, config, context, config.samples)
    _uncut(context)
    known = steering_task(config.task or "gmm-inverse")
    given = {"seed": context.seed or 0, **({} if config.samples is None else {"samples": config.samples})}
    settings = override(validated(SteeringEvalConfig, given), config.settings)
    return steering_of_mixture(_judged(config.checkpoint, known, context), settings, context)


def value(config: ValueEvaluation, context: Context) -> Results:
    """The value from posterior draws, map and GLASS by calls. Mixtures: against the exact one; images: rollouts."""
    if config.checkpoint != EXACT and _of_images(config):
        return _experiment("value", config, context)
    _uncut(context)
    if config.checkpoint == EXACT:
        raise InputError("mfm eval value judges a checkpoint; the exact value is what it compares with")
    settings = override(validated(ValueEvalConfig, {"seed": context.seed or 0}), config.settings)
    return value_of_mixture(_judged(config.checkpoint, steering_task(config.task), context), settings, context)


def generation(config: GenerationEvaluation, context: Context) -> Results:
    """Images by network calls: refinement and composed jumps of the map against ODE steps.

    Of a map of latents pictures are judged, of all its classes; FID with --set statistics=FILE, which needs no data.
    """
    return _experiment("generation", config, context, config.samples)


COMMANDS = {"posterior": posterior, "steering": steering, "value": value, "generation": generation}


# -- images ----------------------------------------------------------------------------------------------------------


def _of_images(config: Evaluation) -> bool:
    return on_images(resolve_checkpoint(config.checkpoint))


def _experiment(name: str, config: Evaluation, context: Context, samples: int | None = None) -> Results:
    own = [*([f"samples={samples}"] if samples is not None else []), *config.settings]
    start = validated(EXPERIMENTS[name].config, {"seed": context.seed or 0})
    return measure_images(name, config.checkpoint, override(start, own), context)


def measure_images(name: str, checkpoint: str, config: ImageEvalConfig, context: Context) -> Results:
    """Run an experiment on a checkpoint; what it draws is kept, and shared by workers."""
    experiment, opened = EXPERIMENTS[name], OpenedModel.open(checkpoint, context.device)
    stage, identity = prepare(name, opened, config, lambda text: judge_of_pictures(text, opened), JUDGES)
    if context.dry_run:
        return context.plan(experiment.command, identity, opened.cost_of(config.calls()))
    request = Request(context, experiment.command, identity, opened.beside(f"eval-{name}"))
    with shared_claim(request, "cells", _drawn) as (done, shards):
        if done is not None:
            context.say(f"{request.out} is complete")
            return done
        stage.shards, stage.shard = shards, shards.size(context.share, stage.shard)
        try:
            metrics, draw = experiment.run(stage, config, lambda line: context.say(f"{experiment.command}: {line}"))
        except Unfinished as left:
            return left_to_others(request, shards, left)
        cost = shards.cost()
        request.write(metrics, cost, opened.device)
        # the figures come last: what was measured is on disk before anything is drawn, and without them it is not all
        metrics["captions"] = draw(request.out)
        results = request.write(metrics, cost, opened.device)
        discard(shards.folder)
    return results


def _drawn(results: Results) -> bool:
    """Are the figures there too?"""
    return "captions" in results["metrics"]


# -- mixtures --------------------------------------------------------------------------------------------------------


def _uncut(context: Context) -> None:
    """An evaluation on a mixture is one piece."""
    if context.worker is not None or context.shard_size is not None:
        raise InputError("on mixtures evaluations are not cut into shards: leave --worker and --shard-size out")


@dataclass(frozen=True)
class JudgedModel:
    """What a task judges, and the law it is judged by: that of a model tuned to a reward is tilted already."""

    task: SteeringTask
    model: Any
    law: GaussianMixture
    digest: str
    opened: OpenedModel | None  # None: the mixture itself

    def request(self, command: str, settings: Config, context: Context) -> Request:
        """An evaluation of it; results go beside the model."""
        identity = {"checkpoint": self.digest, "task": self.task.name, **settings.model_dump()}
        name = f"{command.replace(' ', '-')}-{self.task.name}"
        place = Path("runs") / f"exact-{name}" if self.opened is None else self.opened.beside(name)
        return Request(context, command, identity, place)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return torch.device("cpu") if self.opened is None else self.opened.device


def _judged(checkpoint: str, task: SteeringTask, context: Context) -> JudgedModel:
    if checkpoint == EXACT:
        return JudgedModel(task, ExactModel(LinearPath(), task.law), task.law, EXACT, None)
    opened = OpenedModel.open(checkpoint, context.device)
    return JudgedModel(
        task, opened.model, opened.judging_law(task.source, f"--task {task.name}"), opened.digest, opened
    )


def _measured(
    request: Request,
    device: torch.device,
    measure: Callable[[Callable[[str], None]], tuple[Results, Callable[[Path], object]]],
    planned: Results,
) -> Results:
    """Claim the request's directory, measure, draw, write; ``measure(say)`` returns metrics and what draws them."""
    context, command = request.context, request.command
    if context.dry_run:
        return context.plan(command, request.config, planned)
    done = request.begin()
    if done is not None:
        return done
    began = time.perf_counter()
    metrics, draw = measure(lambda line: context.say(f"{command}: {line}"))
    cost = {"seconds": time.perf_counter() - began, **metrics.pop("cost", {})}
    draw(request.out)
    return request.write(metrics, cost, device)


def steering_of_mixture(judged: JudgedModel, settings: SteeringEvalConfig, context: Context) -> Results:
    """Every method against the exact tilted law."""
    if judged.opened is None:  # draws of a mixture have no pathwise gradient
        variants = {name: variant(name).method for name in settings.methods}
        kept = tuple(name for name, method in variants.items() if not (method.draws and method.gradients))
        if kept != settings.methods:
            context.say("eval steering: exact draws have no gradient in the state; leaving mfm-g out")
        settings = validated(SteeringEvalConfig, {**settings.model_dump(), "methods": kept})
    reward = judged.task.reward(settings.reward)
    data_std = None if judged.opened is None else judged.opened.model.data_std

    def measure(say: Callable[[str], None]) -> tuple[Results, Callable[[Path], object]]:
        metrics, samples = evaluate_steering(judged.model, judged.law, reward, settings, say, data_std)
        return metrics, lambda out: result_figures.steering(metrics, samples, judged.law.tilt(reward), out)

    each = sum(cell.method.calls_per_step for cell in cells(settings, data_std))
    calls = settings.seeds * settings.samples * settings.steps * each
    return _measured(judged.request("eval steering", settings, context), judged.device, measure, {"calls": calls})


def value_of_mixture(judged: JudgedModel, settings: ValueEvalConfig, context: Context) -> Results:
    """V̂ of map and GLASS against the exact value."""
    reward = judged.task.reward(settings.reward)

    def measure(say: Callable[[str], None]) -> tuple[Results, Callable[[Path], object]]:
        metrics = evaluate_value(judged.model, judged.law, reward, settings, say)

        def draw(out: Path) -> None:
            plots.save(steering_figures.value_error(metrics), out / "value-against-calls.png")

        return metrics, draw

    rows = settings.states * len(settings.times) * settings.num_draws
    calls = rows * (sum(settings.map_steps) + sum(settings.glass_steps))
    assert judged.opened is not None
    planned = judged.opened.cost_of(calls)
    return _measured(judged.request("eval value", settings, context), judged.device, measure, planned)


def posterior_of_mixture(config: PosteriorEvaluation, settings: PosteriorEvalConfig, context: Context) -> Results:
    """Relative sliced W2 at each t for the map and for GLASS with the map's own drift."""
    opened = OpenedModel.open(config.checkpoint, context.device)
    law = opened.judging_law(law_named(config.law), f"--law {config.law}")
    identity = {"checkpoint": opened.digest, "law": config.law, **settings.model_dump()}

    def measure(say: Callable[[str], None]) -> tuple[Results, Callable[[Path], object]]:
        measured = evaluate_posterior(opened.model, law, settings, say)
        metrics = measured.metrics()

        def draw(out: Path) -> None:
            plots.save(result_figures.panels(opened.model, law, settings.seed), out / "posteriors.png")
            plots.save(plots.error_against_calls(metrics), out / "error-against-calls.png")

        return {**metrics, "cost": {"seconds_by_sampler": measured.seconds}}, draw

    request = Request(context, "eval posterior", identity, opened.beside(f"eval-posterior-{settings.samples}"))
    return _measured(request, opened.device, measure, opened.cost_of(0))
