"""Drifts that teach a map: the law's own, one learned first, or a parent's; and beginning with a parent's weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from metaflowmaps.data import Process
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.guidance import PLAIN
from metaflowmaps.laws.labelled import LabelledLaw
from metaflowmaps.losses import NoConsistency
from metaflowmaps.networks.compiling import compilable, use_compiled
from metaflowmaps.path import make_path
from metaflowmaps.training.teachers import ExactTeacher, GlassTeacher, ProcessTeacher, Teacher
from metaflowmaps.training.train_config import (
    TimesConfig,
    TrainConfig,
)
from metaflowmaps.work import ranks
from metaflowmaps.work.choices import outside


def pretrained_teacher(config: TrainConfig, model: MetaFlowMap, device: torch.device | str, parent: Any) -> Teacher:
    """GLASS on the parent's drift; the map begins with its weights where it is to."""
    name = config.parent
    assert name is not None, "TrainConfig refuses teacher=pretrained without a parent"
    if parent is None:
        parent = ranks.together(lambda: open_parent(name))
    if isinstance(parent, nn.Module):
        parent = parent.to(device)
    teacher = ranks.together(lambda: taught_by(parent, config))
    compile_teacher(parent, config, device)
    if config.start_from_drift:
        ranks.together(lambda: inherit(model, parent))
    return teacher


def learned_teacher(config: TrainConfig, model: MetaFlowMap, device: torch.device | str, drift: Path) -> Teacher:
    """GLASS on the drift of a checkpoint; the map begins with its weights where it is to."""
    learned = MetaFlowMap.from_pretrained(drift).to(device).requires_grad_(False)
    compile_teacher(learned, config, device)
    if config.start_from_drift:
        model.load_state_dict(learned.state_dict())
    return GlassTeacher(model.path, learned.drift, config.num_classes or None)


def open_parent(name: str) -> Any:
    """The model whose drift teaches: a checkpoint's map, or what ``file.py:make`` makes, such as ``mfm.wrap``."""
    if ":" not in name:
        return MetaFlowMap.from_pretrained(name).requires_grad_(False)
    made = outside(name)
    if isinstance(made, type) or not hasattr(made, "drift"):
        try:
            made = made()
        except TypeError as error:
            raise InputError(f"{name} must be a function without arguments that returns a model ({error})") from error
    if isinstance(made, nn.Module):
        made.requires_grad_(False)
    if not all(hasattr(made, part) for part in ("path", "drift")):
        raise InputError(
            f"{name} makes a {type(made).__name__}, which has no path and drift: return mfm.wrap(network, …)"
        )
    return made


def compile_teacher(parent: Any, config: TrainConfig, device: torch.device | str) -> None:
    """A teacher runs compiled where its student does, if it can be."""
    network = getattr(parent, "network", None)
    if compilable(network):
        use_compiled(network, config.compile, device, config.precision)


def taught_by(parent: Any, config: TrainConfig) -> GlassTeacher:
    """GLASS on a parent's drift, on the map's path.

    Guided by the parent itself where it has learned to read scales; else by its law, from what it gives for a label.
    """
    path = make_path(config.model.path)
    if parent.path != path:
        raise InputError(
            f"{config.parent} runs on the {parent.path.name} path, the map on the {path.name} one: "
            f"--set model.path={parent.path.name}"
        )
    law = getattr(parent, "guidance_law", None)
    reads = getattr(getattr(parent, "network", None), "guidance", None) is not None
    own = reads if law is None else law.asked
    classes = int(getattr(parent, "num_classes", getattr(getattr(parent, "network", None), "num_classes", 0)))
    if config.num_classes not in (0, classes):
        raise InputError(f"{config.parent} knows {classes} classes and the data have {config.num_classes}")
    return GlassTeacher(path, parent.drift, None if own else classes, law or PLAIN)


def inherit(model: MetaFlowMap, parent: Any) -> None:
    """Begin with a parent's weights; what it does not have (an embedding of guidance scales) begins as it is made."""
    if not isinstance(parent, MetaFlowMap) or parent.parameterization != model.parameterization:
        theirs = getattr(parent, "parameterization", "none")
        raise InputError(
            f"start_from_drift needs a parent of the same parameterisation ({model.parameterization}, not {theirs}): "
            f"--set model.parameterization={theirs}, or start_from_drift=false"
        )
    if model.data_mean.shape != parent.data_mean.shape:  # a number or an image: the parent knows
        model.data_mean = torch.zeros_like(parent.data_mean, device=model.data_mean.device)
    ours, weights = model.state_dict(), parent.state_dict()
    wrong = [key for key, value in weights.items() if key not in ours or ours[key].shape != value.shape]
    gone = [key for key in ours if key not in weights and not key.startswith("network.guidance.")]
    if wrong or gone:
        raise InputError(
            f"the parent's network is another one ({', '.join([*wrong, *gone][:3])}): leave model.network unset to "
            "take the parent's, or start_from_drift=false"
        )
    model.load_state_dict(weights, strict=False)


def exact_teacher(config: TrainConfig) -> Teacher:
    """The mixture, or the process, as its own teacher."""
    if isinstance(config.data, Process):
        return ProcessTeacher(make_path(config.model.path), config.data.exact())
    law, samples, path = config.data.law(), config.data.samples(), make_path(config.model.path)
    assert law is not None, "TrainConfig refuses an exact teacher without a law"
    classes = samples.classes if config.num_classes and isinstance(samples, LabelledLaw) else ()
    return ExactTeacher(path, law, classes)


def drift_config(config: TrainConfig) -> TrainConfig:
    """The flow-matching run that makes a learned teacher: diagonal, data targets, context time 0, noise of its own."""
    return config.model_copy(
        update={
            "teacher": "none",
            "start_from_drift": False,
            "steps": config.drift_steps,
            "batch_size": config.drift_batch_size,
            "drift_steps": 0,
            "seed": config.seed + 1_000_003,
            "condition": config.condition.model_copy(update={"guidance": (1.0,)}),
            "loss": config.loss.model_copy(update={"diagonal": "data", "consistency": NoConsistency()}),
            # GLASS at a late context asks for the drift later still, in a sliver of a: half of the rows go there
            "times": TimesConfig(context_at_zero=1.0, from_noise=0.0, last=1.0, late_share=0.5),
            "sample_every": 0,
        }
    )
