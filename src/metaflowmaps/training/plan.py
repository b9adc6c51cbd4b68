r"""What a training run will take, before it is begun: parameters, the memory of its state, calls and seconds a step.

The network is built on the meta device: parameters, bytes and FLOPs of a call are read off shapes. Two steps are then
run and the meter read, on the same losses: with the network itself, for the time and the peak of memory, where it is
small enough for this device (two more of the drift where one is learned first: the time is that of both); else with a
small network of the same kind, for the calls alone. A run that says the
shape of its samples needs neither its data nor its parent: noise and an untrained copy stand in for them. A call that
is differentiated in forward mode counts as one, and a backward pass through it is not seen.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaflowmaps.cost import Meter
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks import DiT, DiTConfig, MLPConfig, NetworkConfig
from metaflowmaps.networks.flops import forward_flops, on_meta
from metaflowmaps.path import make_path
from metaflowmaps.random import randn
from metaflowmaps.training.building import build_classifier, build_map, event_shape
from metaflowmaps.training.classifier_objective import ClassifierObjective
from metaflowmaps.training.derivative import prepare
from metaflowmaps.training.loop import losses_of
from metaflowmaps.training.objective import Objective
from metaflowmaps.training.parents import drift_config, exact_teacher
from metaflowmaps.training.state import TrainState
from metaflowmaps.training.teachers import GlassTeacher
from metaflowmaps.training.train_config import ClassifierConfig, RunConfig, TrainConfig
from metaflowmaps.training.training_run import build_objective
from metaflowmaps.work import ranks

CPU_STEP_FLOPS = 1e12  # a step of more is not run on a processor: about a minute of one core
CPU_STATE_BYTES = 2**30
ROWS = 64  # of the small network's step


class Trial(NamedTuple):
    """Two steps' worth of meters: calls a row, and of the second step its seconds."""

    forwards: float
    backwards: float
    teacher_forwards: float
    seconds: float
    peak_memory_bytes: int


class Subject(NamedTuple):
    """What is tried: a model, its objective and, where it has one, the network that teaches."""

    model: Any
    objective: Any
    teacher: nn.Module | None = None


def plan(config: TrainConfig | ClassifierConfig, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The figures of ``mfm train --dry-run``; ``not_measured`` says why a run is too large to be tried here."""
    device = torch.device(device)
    shapes = (
        on_meta(_network(config), shape_of(config)) if isinstance(config, TrainConfig) else build_classifier(config)
    )
    memory, flops = bytes_of_training(shapes, config, ranks.size()), forward_flops(shapes)
    if isinstance(config, TrainConfig) and config.teacher in ("learned", "pretrained"):
        memory["teacher"] = memory["weights"]
    too_large = _too_large(sum(memory.values()), 4 * flops * config.batch_size, device)
    if too_large is None:
        trial = try_steps(_prepared(config, device), config, device)
        drift = _drift(config, device)
        measured: dict[str, Any] = {
            "peak_memory_bytes": trial.peak_memory_bytes,
            "seconds_per_step": trial.seconds,
            **drift,
            "expected_seconds": trial.seconds * config.steps
            + drift.get("drift_steps", 0) * drift.get("seconds_per_drift_step", 0.0),
        }
    else:
        assert isinstance(config, TrainConfig), "classifiers are small"
        trial, measured = count_calls(config, shapes, device), {"not_measured": too_large}
    parent = {"parameters_of_parent": shapes.parameters_of_parent()} if isinstance(shapes, DiT) else {}
    # a backward pass is two forward passes; a block that is computed again is one more
    weight = trial.forwards + (2 + config.checkpoint_activations) * trial.backwards + trial.teacher_forwards
    return {
        "parameters": count(shapes),
        **parent,
        "memory_bytes": sum(memory.values()),
        **{f"memory_{part}_bytes": size for part, size in memory.items()},
        "gflops_per_call": flops / 1e9,
        "forwards_per_row": trial.forwards,
        "backwards_per_row": trial.backwards,
        "teacher_forwards_per_row": trial.teacher_forwards,
        "tflops_per_step": weight * flops * config.batch_size / 1e12,
        "steps": config.steps,
        **measured,
    }


def _drift(config: TrainConfig | ClassifierConfig, device: torch.device) -> dict[str, Any]:
    """Of the flow matching that makes a learned teacher, before the map's own steps."""
    if not isinstance(config, TrainConfig) or config.teacher != "learned":
        return {}
    drift = drift_config(config)
    trial = try_steps(_prepared(drift, device), drift, device)
    return {"drift_steps": drift.steps, "seconds_per_drift_step": trial.seconds}


def count(network: nn.Module) -> int:
    """How many weights it has."""
    return sum(p.numel() for p in network.parameters())


def bytes_of_training(shapes: nn.Module, config: Any, size: int = 1) -> dict[str, int]:
    """What a rank holds of weights, gradients, their average and the optimiser, activations aside.

    Args:
        shapes: the network, on any device.
        config: a :class:`RunConfig` or what else has ``optimizer`` and ``precision``.
        size: how many ranks there are; ``config.shard`` of them share one copy (0: all).
    """
    parameters = count(shapes)
    # Adam keeps two copies of the weights; SOAP two more square factors, with their eigenvectors, for each matrix
    state = 2 * parameters
    if config.optimizer.name == "soap":
        state += sum(2 * (p.shape[0] ** 2 + p[0].numel() ** 2) for p in shapes.parameters() if p.ndim > 1)
    share = size if getattr(config, "shard", 1) == 0 else min(getattr(config, "shard", 1), size)
    held = {"weights": parameters, "gradients": parameters, "ema": parameters, "optimizer": state}
    memory = {part: -(-4 * numbers // share) for part, numbers in held.items()}
    return {**memory, **({"low_precision_copy": 2 * parameters} if config.precision == "bf16" else {})}


def shape_of(config: TrainConfig) -> tuple[int, ...]:
    """The shape of a sample; where it is said, without a look at the data."""
    return config.model.event_shape or event_shape(config)


def _network(config: TrainConfig) -> NetworkConfig:
    assert config.model.network is not None, "fitted() sizes it"
    return config.model.network


def _too_large(state_bytes: float, step_flops: float, device: torch.device) -> str | None:
    """Why a run is not tried on this device, None if it is."""
    gib, needed = 2**30, f"its state alone takes {state_bytes / 2**30:.1f} GiB"
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return f"{needed} and {device} has {free / gib:.1f} free" if state_bytes > free else None
    if state_bytes > CPU_STATE_BYTES:
        return f"{needed}: try it with --device cuda"
    if step_flops > CPU_STEP_FLOPS:
        return f"a step of about {step_flops / 1e12:.1f} TFLOP takes minutes here: try it with --device cuda"
    return None


# -- two steps ---------------------------------------------------------------------------------------------------------


class Noise:
    """A stand-in for data: labelled noise of the right shape."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        self.shape, self.num_classes = shape, classes

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return randn((n, *self.shape), generator)

    def sample_labelled(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return self.sample(n, generator), torch.randint(max(self.num_classes, 1), (n,), generator=generator)


def subject(config: TrainConfig | ClassifierConfig) -> Subject:
    """What trains as configured, from data where their shape is not said."""
    if isinstance(config, ClassifierConfig):
        return Subject(build_classifier(config), ClassifierObjective(config.data.load()[0], config))
    if config.model.event_shape is not None:
        return _stand_in(config, _network(config), config.model.event_shape)
    model = build_map(config)
    teacher, network = _teacher(config, model)
    return Subject(model, build_objective(config, teacher), network)


def _prepared(config: TrainConfig | ClassifierConfig, device: torch.device) -> Subject:
    tried = subject(config)
    prepare(tried.model.to(device), config, device, tried.objective)
    return tried


def count_calls(config: TrainConfig, shapes: nn.Module, device: torch.device | str = "cpu") -> Trial:
    """Calls a row of a step, from the same losses on a small network, its teacher another such.

    Args:
        config: of the run.
        shapes: its network; how derivatives are taken depends on its size.
        device: where it will run.
    """
    network, shape = _network(config), shape_of(config)
    small: NetworkConfig
    if isinstance(network, DiTConfig):  # whose calls may be in forward mode: of the same kind
        small = network.model_copy(update={"width": 16, "depth": 3, "heads": 2, "encoder_depth": 2})
        shape = (shape[0], 2 * network.patch, 2 * network.patch)
    else:
        small = MLPConfig(width=8, num_classes=network.num_classes, guidance=bool(network.guidance))
    plain = {"compile": False, "micro_batches": 1, "precision": "float32", "checkpoint_activations": False}
    changed = config.model_copy(update={**plain, "batch_size": ROWS})
    tried = _stand_in(changed, small, shape)
    prepare(shapes, config, device, tried.objective)
    return try_steps(tried, changed)


def _stand_in(config: TrainConfig, network: NetworkConfig, shape: tuple[int, ...]) -> Subject:
    """An untrained map that learns noise; past its warm-up, when every loss is taken."""
    mean = config.model.data_mean
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = MetaFlowMap(
            network.network(shape),
            make_path(config.model.path),
            config.model.parameterization,
            0.0 if mean == "image" else mean,
            config.model.data_std or 1.0,
        )
    data = Noise(shape, network.num_classes)
    teacher, parent = _teacher(config, model)
    loss = config.loss.model_copy(update={"warmup_steps": 0, "anneal_steps": 0})
    condition = config.condition if network.num_classes else None
    objective = Objective(data, loss, config.times, teacher, config.batch_size, config.seed, condition)
    return Subject(model, objective, parent)


def _teacher(config: TrainConfig, model: MetaFlowMap) -> tuple[Any, nn.Module | None]:
    """The teacher and its network; a learned one, or a parent, costs what the map itself costs."""
    if config.teacher == "none":
        return None, None
    if config.teacher == "exact":
        return exact_teacher(config), None
    parent = copy.deepcopy(model).requires_grad_(False)
    return GlassTeacher(parent.path, parent.drift, model.network.num_classes), parent  # type: ignore[arg-type]


def try_steps(tried: Subject, config: RunConfig, device: torch.device | str = "cpu") -> Trial:
    """Two updates as the loop makes them, read off the meter."""
    device, model, objective = torch.device(device), tried.model.to(device), tried.objective
    parent = None if tried.teacher is None else tried.teacher.to(device)
    optimizer = TrainState(model, config.optimizer).optimizer
    meter, taught = Meter(getattr(model, "network", model)), Meter(getattr(parent, "network", None), device)
    rows, seconds = 0, 0.0
    for step in range(2):  # the first allocates and warms up
        before = meter.seconds
        with taught, meter:
            batch = objective.batch(model, step)
            _update(model, objective, batch, config, device)
            optimizer.step()
            optimizer.zero_grad()
        rows, seconds = rows + len(batch), meter.seconds - before
    return Trial(
        meter.forwards / rows, meter.backwards / rows, taught.forwards / rows, seconds, meter.peak_memory_bytes
    )


def _update(model: nn.Module, objective: Any, batch: Any, config: RunConfig, device: torch.device) -> None:
    """The gradient of a step, in micro-batches."""
    try:
        for losses in losses_of(model, objective, batch, config, device):
            loss = losses.float().sum() / len(batch)
            loss.backward()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise InputError(f"the loss of a first step is {value}: check optimizer.lr, model.data_std and the law")
    except torch.OutOfMemoryError:
        rows = -(-len(batch) // config.micro_batches)
        raise InputError(
            f"{rows} rows at a time do not fit in the memory of {device}: --set "
            f"micro_batches={2 * config.micro_batches} or more, or --set checkpoint_activations=true"
        ) from None
