"""From a configuration to a trained map in a directory: build, resume, train.

With ``teacher=learned`` a drift is first trained from data alone (flow matching: the diagonal at context time 0) in
``out/drift``, by the same loop; GLASS on it then teaches the map. With ``teacher=pretrained`` the drift is that of a
checkpoint, such as ``mfm convert`` makes of published weights, and the map may begin with its weights.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from metaflowmaps.checkpoint import Checkpoint
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks.low_rank import adapt
from metaflowmaps.random import stream
from metaflowmaps.training.building import build_classifier, build_map
from metaflowmaps.training.classifier_objective import ClassifierObjective
from metaflowmaps.training.derivative import prepare
from metaflowmaps.training.loop import TrainResult, Watch, train
from metaflowmaps.training.objective import Objective
from metaflowmaps.training.parents import drift_config, exact_teacher, learned_teacher, pretrained_teacher
from metaflowmaps.training.starting import starting_point
from metaflowmaps.training.teachers import Teacher
from metaflowmaps.training.train_config import (
    ClassifierConfig,
    DistillConfig,
    TrainConfig,
)
from metaflowmaps.work import ranks
from metaflowmaps.work.claims import claim, release
from metaflowmaps.work.notebook import notebook_report


def build_objective(config: TrainConfig, teacher: Teacher | None) -> Objective:
    """The objective of the configuration."""
    condition = config.condition if config.num_classes else None
    made = Objective(
        config.data.samples(), config.loss, config.times, teacher, config.batch_size, config.seed, condition
    )
    made.on_device = config.stream == "device"
    return made


def run_training(
    config: TrainConfig,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    resume: str = "auto",
    watch: Watch = Watch(),  # frozen
    parent: Any = None,
) -> TrainResult:
    """Train a map, after its drift where that is learned first.

    Args:
        config: of the run.
        out: its directory; the run goes on from what is there.
        device: where.
        resume: auto, none, or a run or checkpoint to start from.
        watch: who is told.
        parent: with teacher=pretrained, a model at hand, such as ``mfm.wrap`` makes, which ``config.parent`` names.

    Returns:
        Where the map's run stands; its seconds include the drift's.
    """
    model, seconds_before = build_map(config), 0.0
    teacher: Teacher | None = None
    if config.teacher == "exact":
        teacher = exact_teacher(config)
    elif config.teacher == "pretrained":
        teacher = pretrained_teacher(config, model, device, parent)
    elif config.teacher == "learned":
        told = replace(watch, stage="drift", on_sample=None, note=Watch().note)
        drift = run_training(drift_config(config), out / "drift", device=device, watch=told)
        seconds_before = drift.seconds
        teacher = learned_teacher(config, model, device, drift.checkpoint)
    if isinstance(config, DistillConfig) and config.low_rank:
        adapt(model.network, config.low_rank, stream(config.seed, "low-rank"))
    start = starting_point(config, out, resume)
    config = config.model_copy(update={"stream": stream_of(config, device, start)})
    objective = build_objective(config, teacher)
    for line in ranks.together(lambda: prepare(model, config, device, objective, ranks.size())):
        watch.note(line)
    result = train(model, objective, config, out, device=device, start=start, watch=watch)
    return replace(result, seconds=result.seconds + seconds_before)


def trained_map(
    config: TrainConfig, folder: Path, command: str, device: torch.device | str = "cpu", parent: Any = None
) -> MetaFlowMap:
    """Train in a folder that is one request's, or go on there, and open the map.

    Args:
        config: of the run.
        folder: claimed for it.
        command: what is asked for, as the folder says it.
        device: where.
        parent: as :func:`run_training` has it.
    """
    claim(folder, command, config.model_dump(mode="json"))
    try:
        watch = Watch(report=notebook_report())
        result = run_training(config, folder, device=device, watch=watch, parent=parent)
    finally:
        release(folder)
    return MetaFlowMap.from_pretrained(result.checkpoint).to(device)


def stream_of(config: TrainConfig, device: torch.device | str, start: Checkpoint | None) -> str:
    """Where the batches of a run are made: it goes on as it has begun, wherever it goes on."""
    if config.stream != "auto":
        return config.stream
    if start is not None:
        begun = start.config.get("training", {}).get("stream", "host")
        return "host" if begun == "auto" else str(begun)
    return "device" if torch.device(device).type == "cuda" else "host"


def run_classifier_training(
    config: ClassifierConfig,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    resume: str = "auto",
    watch: Watch = Watch(),  # frozen
) -> TrainResult:
    """Train a classifier in ``out`` by the same loop."""
    classifier = build_classifier(config)
    ranks.together(lambda: prepare(classifier, config, device))
    objective = ClassifierObjective(config.data.load()[0], config)
    start = starting_point(config, out, resume)
    return train(
        classifier, objective, config, out, device=device, start=start, watch=replace(watch, stage="classifier")
    )
