"""The image experiments as commands: mfm eval posterior, value, steering and generation on a map of images."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from metaflowmaps.checkpoint import Checkpoint, CheckpointError, resolve_checkpoint
from metaflowmaps.commands import pictures
from metaflowmaps.commands.rewards import JUDGES, judge
from metaflowmaps.commands.runs import write_results
from metaflowmaps.commands.shards import left_to_others, shared_claim
from metaflowmaps.commands.shared import Results, Say, beside, digest, open_model
from metaflowmaps.commands.stage import chosen_features, data_of, equip, open_stage
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.interop.opening import is_latent, stored
from metaflowmaps.lab.evaluate.images.class_mixture import MixtureConfig, evaluate_mixture
from metaflowmaps.lab.evaluate.images.generation import GenerationConfig, evaluate_generation
from metaflowmaps.lab.evaluate.images.inverse_problems import InverseConfig, evaluate_inverse
from metaflowmaps.lab.evaluate.images.race import RaceConfig, evaluate_race
from metaflowmaps.lab.evaluate.images.recovery import RecoveryConfig, evaluate_recovery
from metaflowmaps.lab.evaluate.images.rollout_value import ImageValueConfig, evaluate_image_value
from metaflowmaps.lab.evaluate.images.stage import ImageEvalConfig, Stage
from metaflowmaps.work.config import override, validated
from metaflowmaps.work.shards import Share, Unfinished, discard

Drawn = tuple[dict[str, Any], Callable[[Path], dict[str, str]]]  # metrics; what writes the figures -> captions


class Experiment(NamedTuple):
    """One question: its configuration, and what answers it."""

    command: str
    config: type[ImageEvalConfig]
    run: Callable[[Stage, Any, Say], Drawn]


def _recovery(stage: Stage, config: RecoveryConfig, say: Say) -> Drawn:
    found = evaluate_recovery(stage, config, say)
    return found.metrics, lambda out: pictures.recovery(found, config.times, out)


def _value(stage: Stage, config: ImageValueConfig, say: Say) -> Drawn:
    metrics = evaluate_image_value(stage, config, say)
    return metrics, lambda out: pictures.value(metrics, out)


def _mixture(stage: Stage, config: MixtureConfig, say: Say) -> Drawn:
    found = evaluate_mixture(stage, config, say)
    return found.metrics, lambda out: pictures.mixture(found, out)


def _race(stage: Stage, config: RaceConfig, say: Say) -> Drawn:
    found = evaluate_race(stage, config, say)
    return found.metrics, lambda out: pictures.race(found, out)


def _inverse(stage: Stage, config: InverseConfig, say: Say) -> Drawn:
    found = evaluate_inverse(stage, config, say)
    return found.metrics, lambda out: pictures.inverse(found, config.draws, out)


def _generation(stage: Stage, config: GenerationConfig, say: Say) -> Drawn:
    found = evaluate_generation(stage, config, say)
    return found.metrics, lambda out: pictures.generation(found, out)


EXPERIMENTS = {
    "posterior": Experiment("eval posterior", RecoveryConfig, _recovery),
    "value": Experiment("eval value", ImageValueConfig, _value),
    "generation": Experiment("eval generation", GenerationConfig, _generation),
    "class-mixture": Experiment("eval steering", MixtureConfig, _mixture),
    "race": Experiment("eval steering", RaceConfig, _race),
    "inverse": Experiment("eval steering", InverseConfig, _inverse),
}
IMAGE_TASKS = ("class-mixture", "race", "inverse")


PIXELS_ONLY = ("class-mixture", "inverse")


def trained_on_images(checkpoint: str) -> bool:
    """Is this a map of images or of latents (and not of a mixture)? What cannot be opened is not: its command says why.

    An exported run keeps its data in mind; published weights are known by their autoencoder.
    """
    found = _found(checkpoint)
    return found is not None and (data_of(found) is not None or "vae" in stored(found))


def image_task(task: str | None, checkpoint: str = "") -> str:
    """The steering experiment of that name; where none is named the class mixture, or of latents the race."""
    if task is not None and task not in IMAGE_TASKS:
        raise unknown("task for images", task, IMAGE_TASKS)
    found = _found(checkpoint) if task is None else None
    latent = found is not None and ("vae" in stored(found) or getattr(data_of(found), "latent", False))
    return task or ("race" if latent else IMAGE_TASKS[0])


def _found(checkpoint: str) -> Checkpoint | None:
    if checkpoint in ("", "exact"):
        return None
    try:
        return resolve_checkpoint(checkpoint)
    except CheckpointError:
        return None


def evaluate_images(
    name: str,
    checkpoint: str,
    out: Path | None,
    settings: Iterable[str],
    seed: int,
    device: str,
    invocation: str,
    say: Say,
    share: Share = Share(),
) -> Results:
    """Run one experiment on a checkpoint; figures, results.json. What it draws is kept, and shared by workers."""
    if name not in EXPERIMENTS:
        raise unknown("task", name, EXPERIMENTS)
    experiment = EXPERIMENTS[name]
    config = override(validated(experiment.config, {"seed": seed}), settings)
    model, found, target = open_model(checkpoint, device)
    if name in PIXELS_ONLY and (is_latent(model) or "vae" in stored(found)):
        raise InputError(
            f"{name} looks at pixels and at classifiers of them, {checkpoint} makes latents: mfm eval steering "
            f"{checkpoint} --task race takes any reward on pictures"
        )
    judging = config.model_copy(update={"features": chosen_features(config, model)})
    alone = name == "generation" and judging.features == "inception" and config.statistics is not None
    stage, sources = open_stage(checkpoint, found, model, judging, alone)
    sources |= equip(stage, found, judging, lambda text: _by_text(text, found), JUDGES)
    out = out or beside(checkpoint, found, f"eval-{name}")
    full = {"checkpoint": digest(found), "experiment": name, **config.asked(), **sources}
    with shared_claim(out, experiment.command, full, "cells", share, say, _drawn) as (done, shards):
        if done is not None:
            say(f"{out} is complete")
            return done
        stage.shards, stage.shard = shards, shards.size(share, stage.shard)
        try:
            metrics, draw = experiment.run(stage, config, lambda line: say(f"{experiment.command}: {line}"))
        except Unfinished as left:
            return left_to_others(out, shards, left)
        written: dict[str, Any] = {"seed": config.seed, "device": target, "invocation": invocation}
        cost = shards.cost()
        write_results(out, experiment.command, full, metrics, cost, **written)
        # the figures come last: what was measured is on disk before anything is drawn, and without them it is not all
        metrics["captions"] = draw(out)
        results = write_results(out, experiment.command, full, metrics, cost, **written)
        discard(shards.folder)
    return {**results, "out": str(out / "results.json")}


def _by_text(text: str, found: Checkpoint) -> Any:
    """A judge of pictures, as --reward names it."""
    return judge(text, 1.0, found) if text.partition(":")[0].partition("@")[0] in JUDGES else None


def _drawn(results: Results) -> bool:
    """Are the figures there too?"""
    return "captions" in results["metrics"]
