"""From a configuration to a trained map in a directory: build, resume, train.

With ``teacher=learned`` a drift is first trained from data alone (flow matching: the diagonal at context time 0) in
``out/drift``, by the same loop; GLASS on it then teaches the map. With ``teacher=pretrained`` the drift is that of a
checkpoint, such as ``mfm convert`` makes of published weights, and the map may begin with its weights.
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metaflowmaps.checkpoint import Checkpoint, CheckpointStore, resolve_checkpoint
from metaflowmaps.data import ContextSource, Examples, Process
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.guidance import PLAIN
from metaflowmaps.laws.labelled import LabelledLaw
from metaflowmaps.losses import NoConsistency
from metaflowmaps.networks import (
    DiTConfig,
    MLPConfig,
    NetworkConfig,
    Observed,
    ObservedConfig,
    UNetConfig,
    read_network,
)
from metaflowmaps.networks.compiling import compilable, use_compiled
from metaflowmaps.networks.low_rank import adapt
from metaflowmaps.path import make_path
from metaflowmaps.random import stream
from metaflowmaps.training.classifier_objective import ClassifierObjective
from metaflowmaps.training.derivative import prepare
from metaflowmaps.training.loop import TrainResult, Watch, train
from metaflowmaps.training.objective import Objective
from metaflowmaps.training.teachers import ExactTeacher, GlassTeacher, ProcessTeacher, Teacher
from metaflowmaps.training.train_config import (
    ClassifierConfig,
    DistillConfig,
    RunConfig,
    TimesConfig,
    TrainConfig,
)
from metaflowmaps.work import ranks
from metaflowmaps.work.choices import outside
from metaflowmaps.work.config import differences, validated
from metaflowmaps.work.own_code import named_by_a_file

AnyTrainConfig = TypeVar("AnyTrainConfig", bound=TrainConfig)


def build_map(config: TrainConfig) -> MetaFlowMap:
    """The untrained map, a function of the configuration and its seed."""
    assert config.model.data_std is not None, "fitted() measures it"
    mean: Tensor | float
    mean = mean_image(config.data.load()[0]) if config.model.data_mean == "image" else config.model.data_mean
    with _seeded(config.seed):
        model = MetaFlowMap(
            network_of(config),
            make_path(config.model.path),
            config.model.parameterization,
            mean,
            config.model.data_std,
        )
    if isinstance(config.data, ContextSource):
        if not isinstance(model.network, Observed):
            raise InputError("general contexts need a network that reads them: set model.network=observed")
        model.network.fit(*config.data.fit(model.network.config.nodes))
    return model


def fitted(config: AnyTrainConfig) -> AnyTrainConfig:
    """The configuration with what it leaves open measured on its images: shape, spread, network, classes."""
    if config.parent is not None and config.model.network is None:
        config = like_parent(config)
    if isinstance(config.data, ContextSource):
        return _reading(config, config.data)
    counted = bool(config.num_classes) or config.data.classes is not None
    if not config.data.open and None not in (config.model.data_std, config.model.network) and counted:
        return config  # a full recipe
    images = config.data.load()[0]
    data = config.data.settled(images)
    model = config.model
    if model.data_std is None:
        if model.data_mean == "image":
            squared = images.std**2 - float((mean_image(images).double() - images.mean).square().mean())
        else:
            squared = images.std**2 + (images.mean - model.data_mean) ** 2
        model = model.model_copy(update={"data_std": round(math.sqrt(max(squared, 1e-6)), 4)})
    network = model.network
    if network is None:
        network = sized(images.event_shape).model_copy(update={"guidance": config.condition.guided})
    if data.classes is None and not network.num_classes:
        network = network.model_copy(update={"num_classes": images.num_classes})
    model = model.model_copy(update={"network": network})
    return validated(type(config), {**config.model_dump(), "data": data, "model": model.model_dump()})


def _reading(config: AnyTrainConfig, data: ContextSource) -> AnyTrainConfig:
    """The configuration with what the data decide of a network that reads observations."""
    network = config.model.network
    if not isinstance(network, ObservedConfig):
        raise InputError("general contexts need a network that reads them: set model.network=observed")
    network = network.model_copy(update=data.network_options())
    return config.model_copy(update={"model": config.model.model_copy(update={"network": network})})


def like_parent(config: AnyTrainConfig, described: Mapping[str, Any] | None = None) -> AnyTrainConfig:
    """The configuration with the parent's path, parameterisation and network, and guidance where it is asked for.

    Args:
        config: of the run.
        described: the parent as ``MetaFlowMap.describe`` has it; None: as its checkpoint has it.
    """
    found = resolve_checkpoint(str(config.parent)).config if described is None else described
    network = read_network(found["network"])[0]
    network = network.model_copy(update={"guidance": network.guidance or config.condition.guided})
    model = {
        **config.model.model_dump(),
        "path": found["path"],
        "parameterization": found["parameterization"],
        "data_std": found["data_std"],
        "network": network,
    }
    return validated(type(config), {**config.model_dump(), "model": model})


def sized(event_shape: tuple[int, ...]) -> NetworkConfig:
    """A network for samples of this shape: a perceptron to 12 pixels a side, a U-Net to 64, a transformer above."""
    if len(event_shape) != 3:
        return MLPConfig(width=256, depth=4)
    channels, size, _ = event_shape
    if size <= 12:
        return MLPConfig(width=256 if channels == 1 else 512, depth=6, modulation=True)
    if size <= 64:
        levels, side = 1, size
        while side % 2 == 0 and side // 2 >= 6 and levels < 4:
            side, levels = side // 2, levels + 1
        attention = (side,) if side <= 16 else ()
        return UNetConfig(width=32, multipliers=(1, 2, 2, 2)[:levels], blocks=1, attention=attention)
    patch = next(p for p in range(max(2, size // 32), size + 1) if size % p == 0)
    return DiTConfig(patch=patch, width=192, depth=6, heads=3, encoder_depth=4)


def mean_image(images: Examples) -> Tensor:
    """The mean of a set's images, (C, H, W); sets that do not fit in memory know it."""
    known: Tensor | None = getattr(images, "mean_image", None)
    if known is not None:
        return known.float()
    total = torch.zeros(images.event_shape, dtype=torch.float64)
    for part in torch.arange(len(images)).split(1024):
        total += images.tensor(part).double().sum(0)
    return (total / len(images)).float()


def event_shape(config: TrainConfig) -> tuple[int, ...]:
    """The shape of a sample, as the law or the examples have it."""
    shape = config.data.event_shape()
    if config.model.event_shape not in (None, shape):
        raise InputError(
            f"{config.recipe} is for samples of shape {config.model.event_shape}, the data have {shape}: "
            f"--set model.event_shape={list(shape)}"
        )
    return shape


def network_of(config: TrainConfig) -> nn.Module:
    """The untrained network, for samples of the law or the data."""
    assert config.model.network is not None, "fitted() sizes it"
    return config.model.network.network(event_shape(config))


def build_classifier(config: ClassifierConfig) -> nn.Module:
    """The untrained classifier."""
    train_set, _ = config.data.load()
    if train_set.labels is None:
        raise InputError(f"{train_set.name} has no labels to train a classifier with: --set data.labels=true")
    with _seeded(config.seed):
        return config.network.network(train_set.event_shape, train_set.num_classes)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # module initialisers know only the global generator: fork it, so that nobody else's stream moves
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build_objective(config: TrainConfig, teacher: Teacher | None) -> Objective:
    """The objective of the configuration."""
    condition = config.condition if config.num_classes else None
    made = Objective(
        config.data.samples(), config.loss, config.times, teacher, config.batch_size, config.seed, condition
    )
    made.on_device = config.stream == "device"
    return made


def exact_teacher(config: TrainConfig) -> Teacher:
    """The mixture, or the process, as its own teacher."""
    if isinstance(config.data, Process):
        return ProcessTeacher(make_path(config.model.path), config.data.exact())
    law, samples, path = config.data.law(), config.data.samples(), make_path(config.model.path)
    assert law is not None, "TrainConfig refuses an exact teacher without a law"
    classes = samples.classes if config.num_classes and isinstance(samples, LabelledLaw) else ()
    return ExactTeacher(path, law, classes)


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
        teacher = _pretrained_teacher(config, model, device, parent)
    elif config.teacher == "learned":
        told = replace(watch, stage="drift", on_sample=None, note=Watch().note)
        drift = run_training(drift_config(config), out / "drift", device=device, watch=told)
        seconds_before = drift.seconds
        teacher = _learned_teacher(config, model, device, drift.checkpoint)
    if isinstance(config, DistillConfig) and config.low_rank:
        adapt(model.network, config.low_rank, stream(config.seed, "low-rank"))
    start = starting_point(config, out, resume)
    config = config.model_copy(update={"stream": stream_of(config, device, start)})
    objective = build_objective(config, teacher)
    for line in ranks.together(lambda: prepare(model, config, device, objective, ranks.size())):
        watch.note(line)
    result = train(model, objective, config, out, device=device, start=start, watch=watch)
    return replace(result, seconds=result.seconds + seconds_before)


def stream_of(config: TrainConfig, device: torch.device | str, start: Checkpoint | None) -> str:
    """Where the batches of a run are made: it goes on as it has begun, wherever it goes on."""
    if config.stream != "auto":
        return config.stream
    if start is not None:
        begun = start.config.get("training", {}).get("stream", "host")
        return "host" if begun == "auto" else str(begun)
    return "device" if torch.device(device).type == "cuda" else "host"


def _pretrained_teacher(config: TrainConfig, model: MetaFlowMap, device: torch.device | str, parent: Any) -> Teacher:
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


def _learned_teacher(config: TrainConfig, model: MetaFlowMap, device: torch.device | str, drift: Path) -> Teacher:
    """GLASS on the drift of a checkpoint; the map begins with its weights where it is to."""
    learned = MetaFlowMap.from_pretrained(drift).to(device).requires_grad_(False)
    compile_teacher(learned, config, device)
    if config.start_from_drift:
        model.load_state_dict(learned.state_dict())
    return GlassTeacher(model.path, learned.drift, config.num_classes or None)


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


def _check_empty(store: CheckpointStore, out: Path) -> None:
    if store.steps():
        raise InputError(f"--resume none, but {out} already holds checkpoints: move it away or choose another --out")


def _source(config: RunConfig, resume: str) -> Checkpoint:
    """The checkpoint that --resume names; refused where it cannot be gone on with."""
    checkpoint = resolve_checkpoint(resume)
    if not checkpoint.has("optimizer.safetensors"):
        raise InputError(f"--resume {resume}: this checkpoint holds a model without a training state")
    theirs, ours = checkpoint.config.get("training", {}), config.model_dump(mode="json")
    for part in ("model", "network", "optimizer"):
        if part not in ours:
            continue
        lines = differences(_as_read(config, part, theirs.get(part)), ours[part])
        if lines:
            raise InputError(f"--resume {resume} has another {part} ({'; '.join(lines[:3])}): repeat its settings")
    step = checkpoint.document("position.json")["step"]
    if step >= config.steps:
        raise InputError(f"--resume {resume} stands at step {step}, this run ends at {config.steps}: raise steps")
    return checkpoint


@named_by_a_file()
def _as_read(config: RunConfig, part: str, stored: Any) -> Any:
    """A part of a checkpoint's configuration with what versions before this one did not write."""
    try:
        return validated(type(config), {**config.model_dump(), part: stored}).model_dump(mode="json")[part]
    except InputError:  # it differs, and the two do not go together
        return stored


def tidy(config: RunConfig, out: Path) -> None:
    """Remove from a finished run what its disk refused to remove while it lasted."""
    for folder in (out, out / "drift"):
        store = CheckpointStore(folder / "checkpoints", config.keep_last, config.keep_best)
        store.clean()
        store.prune(max(store.steps(), default=0))


def starting_point(config: RunConfig, out: Path, resume: str) -> Checkpoint | None:
    """auto: the newest valid checkpoint of ``out``. none: nothing, and there must be nothing. Else: that checkpoint."""
    store = CheckpointStore(out / "checkpoints", config.keep_last, config.keep_best)
    ranks.first(store.clean)
    if resume == "none":
        ranks.first(lambda: _check_empty(store, out))
        return None
    checkpoint, skipped = store.latest_for_all()
    for line in skipped:
        warnings.warn(f"skipped {line}", stacklevel=2)
    if checkpoint is not None:
        step = checkpoint.document("position.json")["step"]
        ranks.first(lambda: store.prune(step))  # a kill may have come between a save and its pruning
    if checkpoint is None and skipped:
        warnings.warn("no valid checkpoint is left: starting from step 0", stacklevel=2)
    if checkpoint is None and resume != "auto":
        checkpoint = ranks.together(lambda: _source(config, resume))
    return checkpoint
