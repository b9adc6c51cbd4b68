"""The image experiments as commands: mfm eval posterior, value, steering and generation on a map of images."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from metaflowmaps.checkpoint import Checkpoint, CheckpointError, load_classifier, load_model, resolve_checkpoint
from metaflowmaps.checkpoint.shipped import shipped
from metaflowmaps.commands import pictures
from metaflowmaps.commands.shards import elsewhere, shared_claim
from metaflowmaps.commands.shared import Results, Say, beside, digest, open_model, run_of
from metaflowmaps.config import override, validated
from metaflowmaps.data import DataConfig, Examples, load_data
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.evaluation.images.generation import GenerationConfig, evaluate_generation
from metaflowmaps.evaluation.images.inverse import InverseConfig, evaluate_inverse
from metaflowmaps.evaluation.images.mixture import MixtureConfig, evaluate_mixture
from metaflowmaps.evaluation.images.race import RaceConfig, evaluate_race
from metaflowmaps.evaluation.images.recovery import RecoveryConfig, evaluate_recovery
from metaflowmaps.evaluation.images.stage import ImageEvalConfig, Judge, Stage
from metaflowmaps.evaluation.images.value import ImageValueConfig, evaluate_image_value
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.runs import write_results
from metaflowmaps.sharding import Elsewhere, Share, discard, own_device

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


def trained_on_images(checkpoint: str) -> bool:
    """Is this a map of images (and not of a mixture)? What cannot be opened is not: its own command says why."""
    if checkpoint == "exact":
        return False
    try:
        return resolve_checkpoint(checkpoint).config.get("training", {}).get("data") is not None
    except CheckpointError:
        return False


def image_task(task: str | None) -> str:
    """The steering experiment of that name; the class mixture where none is named."""
    if task is not None and task not in IMAGE_TASKS:
        raise unknown("task for images", task, IMAGE_TASKS)
    return task or IMAGE_TASKS[0]


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
    model, found, target = open_model(checkpoint, own_device(device))
    stage, sources = open_stage(checkpoint, found, model, config)
    out = out or beside(checkpoint, found, f"eval-{name}")
    full = {"checkpoint": digest(found), "experiment": name, **config.model_dump(), **sources}
    with shared_claim(out, experiment.command, full, "cells", share, say, _drawn) as (done, pieces):
        if done is not None:
            say(f"{out} is complete")
            return done
        stage.pieces, stage.shard = pieces, pieces.size(share, stage.shard)
        try:
            metrics, draw = experiment.run(stage, config, lambda line: say(f"{experiment.command}: {line}"))
        except Elsewhere as left:
            return elsewhere(out, pieces, left)
        written: dict[str, Any] = {"seed": config.seed, "device": target, "invocation": invocation}
        cost = pieces.cost()
        write_results(out, experiment.command, full, metrics, cost, **written)
        # the figures come last: what was measured is on disk before anything is drawn, and without them it is not all
        metrics["captions"] = draw(out)
        results = write_results(out, experiment.command, full, metrics, cost, **written)
        discard(pieces.folder)
    return {**results, "out": str(out / "results.json")}


def _drawn(results: Results) -> bool:
    """Are the figures there too?"""
    return "captions" in results["metrics"]


def open_stage(
    checkpoint: str, found: Checkpoint, model: MetaFlowMap, config: ImageEvalConfig
) -> tuple[Stage, dict[str, Any]]:
    """The stage of a checkpoint, and what identifies its parts."""
    given = found.config.get("training", {}).get("data")
    if given is None:
        raise InputError(f"{checkpoint} was not trained on images by this package: nothing to judge it with")
    data = validated(DataConfig, {**given, **({"path": config.data} if config.data else {})})
    run = run_of(found)
    sources: dict[str, Any] = {}

    def part(role: str, chosen: str | None, load: Callable[..., Any]) -> Any:
        place = _place(data.name, role, chosen, run)
        if place is None:
            return None
        loaded = load(place).to(model.device)
        if tuple(loaded.event_shape) != model.event_shape:
            raise InputError(
                f"{role} {place} takes images of shape {tuple(loaded.event_shape)}, the map's are {model.event_shape}"
            )
        sources[role] = digest(resolve_checkpoint(place))
        return loaded

    guide, judge = part("guide", config.guide, load_classifier), part("judge", config.judge, load_classifier)
    if judge is not None and "guide" in sources and sources["guide"] == sources["judge"]:
        raise InputError("guide and judge are one and the same classifier: a reward must not be judged by itself")
    drift = part("drift", config.drift, load_model)
    train, held_out = _parts(data, guide is not None or judge is not None)
    if train.event_shape != model.event_shape:
        raise InputError(f"{checkpoint} makes images of shape {model.event_shape}, the data have {train.event_shape}")
    if len(held_out) < 2:
        raise InputError(
            f"{checkpoint} has one image held out, and judging takes more: train with --set data.hold_out=N"
        )
    for role, classifier in (("guide", guide), ("judge", judge)):
        if classifier is not None and train.labels is not None and classifier.num_classes != train.num_classes:
            raise InputError(
                f"the {role} knows {classifier.num_classes} classes, the images have {train.num_classes}: "
                f"name another with --set {role}=RUN"
            )
    stage = Stage(model, train, held_out, Judge(judge, train), guide, None if drift is None else drift.drift)
    return stage, sources


def _parts(data: DataConfig, labelled: bool) -> tuple[Examples, Examples]:
    """The images; with their classes too where classifiers know them, though the map was trained without."""
    try:
        if labelled and not data.labels:
            with suppress(InputError):
                return load_data(data.model_copy(update={"labels": True}))
        return load_data(data)
    except InputError as error:  # training calls it data.path, judging data
        raise InputError(str(error).replace("--set data.path=", "--set data=")) from None


def _place(name: str, role: str, chosen: str | None, run: Path | None) -> str | None:
    """Where a part is: as told, beside the run, in it, or in the package."""
    if chosen is not None:
        return None if chosen == "none" else chosen
    candidates = []
    if run is not None:
        candidates = [run / "drift"] if role == "drift" else [run.parent / f"{name}-{role}"]
    for path in candidates:
        if (path / "checkpoints").is_dir():
            return str(path)
    carried = None if role == "drift" and run is not None else shipped(f"{name}-{role}")
    return None if carried is None else str(carried)
