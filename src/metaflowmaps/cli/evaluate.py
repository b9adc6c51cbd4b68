"""Measure a checkpoint; writes results.json and figures."""

import time
from typing import Annotated

from pydantic import Field, field_validator

from metaflowmaps.checkpoint import resolve_checkpoint
from metaflowmaps.cli.context import IN_SHARDS, Context, Name, OnCheckpoint, Results
from metaflowmaps.cli.drawing import left_to_others, shared_claim
from metaflowmaps.cli.results import Request
from metaflowmaps.cli.rewards import JUDGES, judge_of_pictures
from metaflowmaps.data import DataSource
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.lab.evaluate.images.experiments import EXPERIMENTS, STEERING, on_images, prepare, usual_steering
from metaflowmaps.lab.evaluate.images.stage import ImageEvalConfig
from metaflowmaps.lab.evaluate.posterior_error import PosteriorEvalConfig, evaluate_posterior
from metaflowmaps.lab.figures import plots, result_figures
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.recipes.gmm import LAW
from metaflowmaps.work.choices import build
from metaflowmaps.work.config import override, validated
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
        task = config.task or usual_steering(resolve_checkpoint(config.checkpoint))
        if task not in STEERING:
            raise unknown("task for images", task, STEERING)
        return _experiment(task, config, context, config.samples)
    from metaflowmaps.commands.steering import eval_steering

    _uncut(context)
    return eval_steering(
        config.checkpoint, config.task or "gmm-inverse", config.samples, context.out, config.settings,
        context.seed or 0, context.device, context.invocation, context.say,
    )  # fmt: skip


def value(config: ValueEvaluation, context: Context) -> Results:
    """The value from posterior draws, map and GLASS by calls. Mixtures: against the exact one; images: rollouts."""
    if config.checkpoint != EXACT and _of_images(config):
        return _experiment("value", config, context)
    from metaflowmaps.commands.steering import eval_value

    _uncut(context)
    return eval_value(
        config.checkpoint, config.task, context.out, config.settings, context.seed or 0, context.device,
        context.invocation, context.say,
    )  # fmt: skip


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


def posterior_of_mixture(config: PosteriorEvaluation, settings: PosteriorEvalConfig, context: Context) -> Results:
    """Relative sliced W2 at each t for the map and for GLASS with the map's own drift."""
    opened = OpenedModel.open(config.checkpoint, context.device)
    law = opened.judging_law(law_named(config.law), f"--law {config.law}")
    identity = {"checkpoint": opened.digest, "law": config.law, **settings.model_dump()}
    if context.dry_run:
        return context.plan("eval posterior", identity, opened.cost_of(0))
    request = Request(context, "eval posterior", identity, opened.beside(f"eval-posterior-{settings.samples}"))
    done = request.begin()
    if done is not None:
        return done
    began = time.perf_counter()
    measured = evaluate_posterior(opened.model, law, settings, lambda line: context.say(f"eval posterior: {line}"))
    metrics = measured.metrics()
    cost = {"seconds": time.perf_counter() - began, "seconds_by_sampler": measured.seconds}
    plots.save(result_figures.panels(opened.model, law, settings.seed), request.out / "posteriors.png")
    plots.save(plots.error_against_calls(metrics), request.out / "error-against-calls.png")
    return request.write(metrics, cost, opened.device)
