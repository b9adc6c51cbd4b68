r"""What a run at scale will take, before it is begun: parameters, memory by part, calls, hours on a named GPU.

Nothing here needs the data or the parent's weights, and the network itself is built on the meta device. What is
counted is counted on the real code: one step of the same losses on a network of the same kind three blocks deep tells
how many rows are evaluated with a gradient, without and in forward mode; one row through two and through three blocks
of full width tells the bytes that a block keeps for the backward pass. Hours are those calls' FLOPs over the GPU's
bfloat16 rate, times the share of it (``mfu``) that one assumes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks.dit import DiT
from metaflowmaps.networks.flops import forward_flops
from metaflowmaps.networks.forward_mode import forward_mode
from metaflowmaps.path import make_path
from metaflowmaps.random import randn
from metaflowmaps.training.config import TrainConfig
from metaflowmaps.training.objective import Objective
from metaflowmaps.training.teachers import GlassTeacher

GIB = 2**30


class Gpu(NamedTuple):
    """Dense bfloat16 TFLOP/s by the makers' data sheets, and memory in GiB as the driver tells it, less one."""

    tflops: float
    memory: float


GPUS = {
    "h200": Gpu(989, 139),
    "h100": Gpu(989, 78),
    "a100": Gpu(312, 78),
    "a100-40": Gpu(312, 38),
    "l40s": Gpu(362, 44),
    "rtx4090": Gpu(165, 22),
}
ROWS = 64  # of the small network's step


class Calls(NamedTuple):
    """Evaluations of a step, for each row of its batch."""

    with_gradient: float
    without: float
    forward_mode: float
    teacher: float


def plan(config: TrainConfig, gpu: str = "h200", gpus: int = 1, mfu: float = 0.4) -> dict[str, Any]:
    """The figures of ``mfm train --dry-run`` for transformers; InputError where memory does not suffice."""
    machine, spec = gpu_named(gpu), spec_of(config)
    network = DiT.on_meta(spec)
    parameters = sum(p.numel() for p in network.parameters())
    calls = count_calls(config, spec)
    rows = -(-config.batch_size // (config.micro_batches * gpus))
    kept = kept_bytes(spec, config.precision == "bf16", config.checkpoint_activations)
    share = gpus if config.shard == 0 else config.shard
    teacher = 0 if config.teacher == "none" else parameters
    memory = {
        **bytes_of_training(parameters, config.precision == "bf16", share),
        "teacher": 4 * teacher,
        "activations": kept * calls.with_gradient * rows,
    }
    total, room = sum(memory.values()), machine.memory * GIB
    flops = forward_flops(spec)
    back = 4 if config.checkpoint_activations else 3
    weight = back * calls.with_gradient + calls.without + 3 * calls.forward_mode + calls.teacher
    per_step = flops * weight * config.batch_size
    seconds = per_step / (machine.tflops * 1e12 * mfu * gpus)
    if total > room:
        raise InputError(
            f"{config.recipe} needs {total / GIB:.0f} GiB a GPU with {rows} rows at a time ("
            + ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in memory.items())
            + f"), and {gpu} has {room / GIB:.0f}: {_fix(config, total - memory['activations'] > room)}"
        )
    return {
        "parameters": parameters,
        "parameters_of_parent": network.parameters_of_parent(),
        "gpu": f"{gpus} × {gpu}",
        **{f"memory_{name}_gib": size / GIB for name, size in memory.items()},
        "memory_gib": total / GIB,
        **{f"calls_{name}": value for name, value in calls._asdict().items()},
        "steps": config.steps,
        "gflops_per_call": flops / 1e9,
        "pflops_per_step": per_step / 1e15,
        "assumed_mfu": mfu,
        "expected_seconds_per_step": seconds,
        "expected_hours": seconds * config.steps / 3600,
    }


def gpu_named(name: str) -> Gpu:
    """The GPU of that name."""
    if name not in GPUS:
        raise unknown("GPU", name, GPUS)
    return GPUS[name]


def bytes_of_training(parameters: int, low: bool, share: int = 1) -> dict[str, float]:
    """What Adam's kind of optimiser holds for so many parameters, spread over ``share`` ranks."""
    each = 4.0 * parameters / share
    held = {"weights": each, "gradients": each, "ema": each, "optimizer": 2 * each}
    return {**held, **({"low_precision_copy": 2.0 * parameters} if low else {})}


def _fix(config: TrainConfig, weights_alone: bool) -> str:
    if weights_alone:
        return "the weights alone do not fit, take more GPUs (--gpus, shard=0) or larger ones (--gpu)"
    more = next(m for m in range(config.micro_batches + 1, config.batch_size + 1) if config.batch_size % m == 0)
    return f"--set micro_batches={more} or more, --set checkpoint_activations=true, or more GPUs (--gpus)"


def spec_of(config: TrainConfig) -> dict[str, Any]:
    """The DiT of a configuration that says the shape of its samples."""
    network, shape = config.model.network, config.model.event_shape
    if network is None or network.name != "dit" or shape is None:
        raise InputError("a plan without data is for transformers: set model.event_shape and model.network")
    return {"channels": shape[0], "size": shape[1], **network.model_dump(exclude={"name"})}


# -- counted on the real code ------------------------------------------------------------------------------------------


class Noise:
    """A stand-in for data: labelled noise of the right shape."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        self.shape, self.num_classes = shape, classes

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return randn((n, *self.shape), generator)

    def sample_labelled(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return self.sample(n, generator), torch.randint(max(self.num_classes, 1), (n,), generator=generator)


def count_calls(config: TrainConfig, spec: dict[str, Any]) -> Calls:
    """Evaluations a row, from one step of the same losses on a small network, its teacher another such."""
    small = {**spec, "size": 2 * spec["patch"], "width": 16, "depth": 3, "heads": 2, "encoder_depth": 2}
    shape = (spec["channels"], small["size"], small["size"])
    path, counts = make_path(config.model.path), dict.fromkeys(Calls._fields, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, parent = (
            MetaFlowMap(DiT(**small), path, config.model.parameterization, 0.0, config.model.data_std or 1.0)
            for _ in range(2)
        )
    parent.requires_grad_(False)

    def counted(name: str | None) -> Any:
        def hook(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            kind = name or (
                "forward_mode" if forward_mode() else "with_gradient" if torch.is_grad_enabled() else "without"
            )
            counts[kind] += out.shape[0]

        return hook

    model.network.register_forward_hook(counted(None))
    parent.network.register_forward_hook(counted("teacher"))
    teacher = GlassTeacher(path, parent.drift, spec["num_classes"]) if config.teacher != "none" else None
    condition = config.condition if spec["num_classes"] else None
    loss = config.loss.model_copy(update={"warmup_steps": 0, "anneal_steps": 0})
    objective = Objective(Noise(shape, spec["num_classes"]), loss, config.times, teacher, ROWS, config.seed, condition)
    objective(model, objective.batch(model, 0)).sum().backward()
    if loss.consistency == "lagrangian":  # its gradient goes through the derivative: primal and tangent are kept
        counts["with_gradient"] += 2 * counts["forward_mode"]
    return Calls(**{name: count / ROWS for name, count in counts.items()})


def kept_bytes(spec: dict[str, Any], low: bool, recompute: bool) -> float:
    """Bytes that one row keeps for the backward pass, from two and three blocks of full width."""
    tokens = (int(spec["size"]) // int(spec["patch"])) ** 2
    if recompute:  # a block keeps what came in and is computed again; one block at a time is whole
        inside = (_kept(spec, 3, low) - _kept(spec, 2, low)) if spec["depth"] > 1 else 0.0
        return 4.0 * tokens * int(spec["width"]) * int(spec["depth"]) + inside
    two, three = _kept(spec, 2, low), _kept(spec, 3, low)
    return two + (int(spec["depth"]) - 2) * (three - two)


def _kept(spec: dict[str, Any], depth: int, low: bool) -> float:
    """Bytes that a second row adds: weights cast down, tables and frequencies are kept once for all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DiT(**{**spec, "depth": depth, "encoder_depth": 1})
    one, two = (_saved_by(network, spec, rows, low) for rows in (1, 2))
    return float(two - one)


def _saved_by(network: nn.Module, spec: dict[str, Any], rows: int, low: bool) -> int:
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    x, t = torch.zeros(rows, spec["channels"], spec["size"], spec["size"]), torch.full((rows,), 0.5)
    label = {"label": torch.zeros(rows, dtype=torch.int64)} if spec["num_classes"] else {}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage is counted under another's address

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            alive.append(saved)
            found[storage.data_ptr()] = storage.nbytes()
        return saved

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved),
        torch.autocast("cpu", torch.bfloat16, enabled=low),
    ):
        network(x, t, t, x, t, **label)
    return sum(found.values())
