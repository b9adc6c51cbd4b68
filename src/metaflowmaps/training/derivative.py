r"""How a loss takes its derivative of the network, and how the network is set up for a run.

Three ways to ``(∂_a + c·∇)F`` or ``∂_b F``, measured in docs/scale.md:

    forward      torch.func.jvp, attention composed of products: exact, but holds maps of N × N numbers a head
    fused        the same under no_grad with Triton's attention (:mod:`metaflowmaps.networks.tangents`): CUDA, bfloat16
    difference   ordinary calls only; the error is h² of truncation and rounding/h

``auto`` takes ``forward`` while its maps fit in :data:`ROOM`, whatever memory the machine has: a run resumed on another
machine goes on with the same arithmetic. A gradient through the JVP (the Lagrangian) keeps the maps of every block and
cannot go with activation checkpointing.
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metaflowmaps.errors import InputError
from metaflowmaps.losses import Consistency, Derivative
from metaflowmaps.networks.attention import attend
from metaflowmaps.networks.compiling import Compile, Precision, use_compiled
from metaflowmaps.networks.dit import DiT
from metaflowmaps.training.train_config import RunConfig, TrainConfig

Form = Literal["none", "forward", "fused", "difference"]

ROOM = 8 * 2**30  # bytes that N × N maps may take
MAPS = 6  # of them at a time: scores, their softmax, their tangents, what becomes of them
STEPS = {"float32": 5e-3, "bf16": 5e-2}  # of differences: measured, docs/scale.md


@dataclass(frozen=True)
class Differentiation:
    """What a run does and, in a line, why."""

    form: Form
    why: str
    step: float

    def __str__(self) -> str:
        of = f" (step {self.step:g})" if self.form == "difference" else ""
        return f"derivatives: {self.form}{of}, {self.why}"


def choose(
    loss: Consistency,
    network: nn.Module,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    rows: int = 1,
    recompute: bool = False,
) -> Differentiation:
    """The form for ``rows`` samples at a time; ``recompute``: with activation checkpointing."""
    step = getattr(loss, "h", None) or STEPS[precision]
    if loss.differentiates == "no":
        return Differentiation("none", "this loss takes none", step)
    if loss.differentiates == "differences":
        return Differentiation("difference", "by the loss's own definition", step)
    through, device = loss.differentiates == "through", torch.device(device)
    asked: Derivative = getattr(loss, "derivative", "auto")
    if asked == "auto":
        form, why = _best(network, device, precision, rows, recompute, through)
        return Differentiation(form, why, step)
    if asked == "forward" and through and recompute:
        raise InputError(
            "checkpoint_activations=true cannot go with a gradient through the JVP: set "
            "loss.consistency.derivative=difference, or checkpoint_activations=false"
        )
    missing = _fused_needs(network, device, precision, through) if asked == "fused" else None
    if missing:
        raise InputError(f"loss.consistency.derivative=fused {missing}: set loss.consistency.derivative=auto")
    return Differentiation(asked, "as asked", step)


def _best(
    network: nn.Module, device: torch.device, precision: str, rows: int, recompute: bool, through: bool
) -> tuple[Form, str]:
    """The form that ``auto`` takes, and why."""
    if through and recompute:
        return "difference", "because a gradient through the JVP cannot go with checkpointed activations"
    if not isinstance(network, DiT):
        return "forward", "exact, and this network is small"
    entries = network.map_entries * (len(network.blocks) if through else 1)
    size = 4 * MAPS * rows * entries
    taken = f"the attention maps of {rows} rows take {size / 2**30:.1f} of {ROOM / 2**30:.0f} GiB"
    if size <= ROOM:
        return "forward", f"exact, and {taken}"
    missing = _fused_needs(network, device, precision, through)
    if not missing:
        return "fused", f"because {taken}"
    return "difference", f"because {taken}, and the fused kernel {missing}"


def _fused_needs(network: nn.Module, device: torch.device, precision: str, through: bool) -> str | None:
    """What keeps the fused kernel from being used, None if nothing does."""
    if through:
        return "has no gradient, which this loss takes"
    if not isinstance(network, DiT):
        return "is for model.network.name=dit"
    if device.type != "cuda":
        return f"is for CUDA, not {device.type}"
    if precision != "bf16":
        return "is for precision=bf16"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton (pip install 'triton>=3.7')"
    error = fused_error(device, network.config.width // network.config.heads)
    return None if error < 0.03 else f"is wrong on this device (relative error {error:.2g})"


def fused_error(device: torch.device | str, width: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Largest error of the kernel's tangent relative to the largest tangent, against the composed form in float64.

    A rounding of bfloat16 is .004 and a tangent is made of sums of a few; 0.03 is past any of them.
    """
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn((6, 2, 2, 100, width), generator=generator).to(dtype).double()
    reference = torch.func.jvp(attend, tuple(exact[:3]), tuple(exact[3:]))[1]
    given = exact.to(device, dtype)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, fused_tangents=True)

    with torch.no_grad():
        tangent = torch.func.jvp(fused, tuple(given[:3]), tuple(given[3:]))[1]
    return float((tangent.double().cpu() - reference).abs().max() / reference.abs().max())


def prepare(
    model: nn.Module, config: RunConfig, device: torch.device | str = "cpu", objective: Any = None, ranks: int = 1
) -> list[str]:
    """Set a map (or a classifier) and its objective up as configured; a line for each thing worth telling."""
    network, lines = getattr(model, "network", model), []
    if config.checkpoint_activations and not isinstance(network, DiT):
        raise InputError("checkpoint_activations=true is for model.network.name=dit: set checkpoint_activations=false")
    fused = False
    if isinstance(config, TrainConfig):
        on_diagonal = round(config.loss.diagonal_share * config.batch_size)
        rows = -(-(config.batch_size - on_diagonal) // (config.micro_batches * ranks))
        loss = config.loss.consistency
        way = choose(loss, network, device, config.precision, rows, config.checkpoint_activations)
        objective.differentiation, fused = way, way.form == "fused"
        if loss.differentiates in ("detached", "through"):  # there was a choice
            lines.append(str(way))
    compiled = use_compiled(network, _compile(network, config, ranks), device, config.precision)
    if compiled is not None:
        lines.append(f"network: {compiled}")
    if isinstance(network, DiT):
        if config.checkpoint_activations:
            lines.append("blocks: computed again in the backward pass instead of remembered")
        network.configure(config.checkpoint_activations, fused)
    return lines


def _compile(network: nn.Module, config: RunConfig, ranks: int) -> Compile:
    """What is compiled; of a network whose weights are spread, blocks that gather their own, and no more."""
    spread = ranks > 1 and config.shard != 1 and config.optimizer.name != "soap"
    if not spread or isinstance(network, DiT):
        return config.compile
    if config.compile is True:
        raise InputError("compile=true compiles this network whole, which must not be spread: set shard=1")
    return False
