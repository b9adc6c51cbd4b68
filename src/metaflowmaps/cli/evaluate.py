"""Measure a checkpoint; writes results.json and figures."""

import time
from typing import Annotated

from pydantic import Field, field_validator

from metaflowmaps.checkpoint import resolve_checkpoint
from metaflowmaps.cli.context import IN_SHARDS, Argument, Context, Name, OnCheckpoint, Results
from metaflowmaps.cli.drawing import left_to_others, shared_claim
from metaflowmaps.cli.results import Request
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.lab.evaluate.context_error import ContextEvalConfig
from metaflowmaps.lab.evaluate.forecast_error import ForecastEvalConfig
from metaflowmaps.lab.evaluate.images.experiments import EXPERIMENTS, STEERING, on_images, prepare, usual_steering
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig
from metaflowmaps.lab.evaluate.on_contexts import forecasts_on_data, posterior_on_process, source_of
from metaflowmaps.lab.evaluate.on_mixtures import (
    EXACT,
    Measurement,
    law_named,
    posterior_on_mixture,
    steering_on_mixture,
    value_on_mixture,
)
from metaflowmaps.lab.evaluate.posterior_error import PosteriorEvalConfig
from metaflowmaps.lab.evaluate.steering_error import SteeringEvalConfig
from metaflowmaps.lab.evaluate.value_error import ValueEvalConfig
from metaflowmaps.lab.named_rewards import JUDGES, judge_of_pictures
from metaflowmaps.lab.opened import OpenedModel, is_own
from metaflowmaps.work.config import C, override, validated
from metaflowmaps.work.shards import Unfinished, discard

OWN = "file.py:name"  # a reward of the user's


class Evaluation(OnCheckpoint):
    """What every evaluation is told; the settings of its experiment are reached by --set."""

    shared = IN_SHARDS

    settings: Annotated[tuple[str, ...], Name(("--set",), "KEY=VALUE")] = Field(
        (), description="Change a setting: key.sub=value (repeatable)."
    )


class OfModels(Evaluation):
    """Of what a user's own network can do too."""

    checkpoint: Annotated[str, Argument("CHECKPOINT")] = Field(
        description="A run or checkpoint directory, a hub id, digits, or file.py:make, a wrapped network."
    )


class PosteriorEvaluation(OfModels):
    """Of posterior draws."""

    law: str = Field("gmm", description="Mixtures: the law whose posteriors are known: gmm, or file.py:Name.")
    samples: int | None = Field(None, ge=2, description="Samples a set (mixtures: 8192).")

    @field_validator("law")
    @classmethod
    def _known(cls, law: str) -> str:
        law_named(law)
        return law


class ForecastEvaluation(Evaluation):
    """Of forecasts."""

    samples: int | None = Field(None, ge=2, description="Draws a forecast (128).")


class SteeringEvaluation(Evaluation):
    """Of steering methods."""

    task: str | None = Field(
        None, description="Mixtures: gmm-inverse, mixture-16d. Images: class-mixture, race, inverse; latents: race."
    )
    samples: int | None = Field(None, ge=2, description="Samples a run (mixtures: 4096).")


class ValueEvaluation(OfModels):
    """Of value estimates."""

    task: str = Field("gmm-inverse", description="Mixtures: gmm-inverse or mixture-16d.")


class GenerationEvaluation(Evaluation):
    """Of samples."""

    samples: int | None = Field(None, ge=2, description="How many samples (2048).")


def posterior(config: PosteriorEvaluation, context: Context) -> Results:
    """Posterior draws, map and GLASS by calls.

    Mixtures, and processes by number of observations: relative sliced W2. Images: Fréchet distance in classifier
    features, over noised held-out images. Latents: that of their pictures, posterior FID with --set statistics=FILE.
    """
    if _of_images(config):
        return _experiment("posterior", config, context, config.samples)
    opened = None if is_own(config.checkpoint) else OpenedModel.open(config.checkpoint, context.device)
    if opened is not None and source_of(opened) is not None:
        return measure(
            posterior_on_process(opened, _settings(ContextEvalConfig, config, context, config.samples)), context
        )
    settings = _settings(PosteriorEvalConfig, config, context, config.samples)
    return measure(posterior_on_mixture(config.checkpoint, config.law, settings, context.device), context)


def steering(config: SteeringEvaluation, context: Context) -> Results:
    """Every steering method with its cost.

    Mixtures: against the exact tilted law; CHECKPOINT "exact" is the mixture itself. Images: by a judge no method saw.
    """
    if _of_images(config):
        experiment = config.task or usual_steering(resolve_checkpoint(config.checkpoint))
        if experiment not in STEERING:
            raise unknown("task for images", experiment, STEERING)
        return _experiment(experiment, config, context, config.samples)
    settings = _settings(SteeringEvalConfig, config, context, config.samples)
    task = config.task or "gmm-inverse"
    return measure(steering_on_mixture(config.checkpoint, task, settings, context.device), context)


def value(config: ValueEvaluation, context: Context) -> Results:
    """The value from posterior draws, map and GLASS by calls. Mixtures: against the exact one; images: rollouts."""
    if _of_images(config):
        return _experiment("value", config, context)
    settings = _settings(ValueEvalConfig, config, context)
    return measure(value_on_mixture(config.checkpoint, config.task, settings, context.device), context)


def generation(config: GenerationEvaluation, context: Context) -> Results:
    """Images by network calls: refinement and composed jumps of the map against ODE steps.

    Of a map of latents pictures are judged, of all its classes; FID with --set statistics=FILE, which needs no data.
    """
    return _experiment("generation", config, context, config.samples)


def forecast(config: ForecastEvaluation, context: Context) -> Results:
    """Forecasts of held-out sequences: CRPS, energy score and coverage by calls, beside rivals without a network."""
    settings = _settings(ForecastEvalConfig, config, context, config.samples)
    return measure(forecasts_on_data(config.checkpoint, settings, context.device), context)


COMMANDS = {
    "posterior": posterior,
    "forecast": forecast,
    "steering": steering,
    "value": value,
    "generation": generation,
}


def measure(measurement: Measurement, context: Context) -> Results:
    """Run an evaluation on a mixture: claim its directory, measure, draw, write. It is one piece."""
    if context.worker is not None or context.shard_size is not None:
        raise InputError("on mixtures evaluations are not cut into shards: leave --worker and --shard-size out")
    command = measurement.command
    if context.dry_run:
        return context.plan(command, measurement.identity, measurement.planned)
    request = Request(context, command, measurement.identity, measurement.out)
    done = request.begin()
    if done is not None:
        return done
    began = time.perf_counter()
    metrics, draw = measurement.measure(lambda line: context.say(f"{command}: {line}"))
    cost = {"seconds": time.perf_counter() - began, **metrics.pop("cost", {})}
    draw(request.out)
    return request.write(metrics, cost, measurement.device)


def measure_images(name: str, checkpoint: str, config: ImageEvalConfig, context: Context) -> Results:
    """Run an experiment on a map of images; what it draws is kept, and shared by workers."""
    experiment, opened = EXPERIMENTS[name], OpenedModel.open(checkpoint, context.device)
    setup, identity = prepare(name, opened, config, lambda text: judge_of_pictures(text, opened), (*JUDGES, OWN))
    if context.dry_run:
        return context.plan(experiment.command, identity, opened.cost_of(config.calls()))
    request = Request(context, experiment.command, identity, opened.beside(f"eval-{name}"))
    with shared_claim(request, "cells", _drawn) as (done, shards):
        if done is not None:
            context.say(f"{request.out} is complete")
            return done
        setup.shards, setup.shard = shards, shards.size(context.share, setup.shard)
        try:
            metrics, draw = experiment.run(setup, config, lambda line: context.say(f"{experiment.command}: {line}"))
        except Unfinished as left:
            return left_to_others(request, shards, left)
        cost = shards.cost()
        request.write(metrics, cost, opened.device)
        # the figures come last: what was measured is on disk before anything is drawn, and without them it is not all
        metrics["captions"] = draw(request.out)
        results = request.write(metrics, cost, opened.device)
        discard(shards.folder)
    return results


def _of_images(config: Evaluation) -> bool:
    if config.checkpoint == EXACT or is_own(config.checkpoint):
        return False
    return on_images(resolve_checkpoint(config.checkpoint))


def _experiment(name: str, config: Evaluation, context: Context, samples: int | None = None) -> Results:
    settings = _settings(EXPERIMENTS[name].config, config, context, samples)
    return measure_images(name, config.checkpoint, settings, context)


def _settings(kind: type[C], config: Evaluation, context: Context, samples: int | None = None) -> C:
    """The settings of an experiment: --seed, --samples, --set."""
    given = {"seed": context.seed or 0, **({} if samples is None else {"samples": samples})}
    return override(validated(kind, given), config.settings)


def _drawn(results: Results) -> bool:
    """Are the figures there too?"""
    return "captions" in results["metrics"]
