r"""Networks compiled by torch.compile, where on this machine that computes what is written.

A network names the part of itself that is compiled by deriving it from :class:`Compilable`: a function of tensors whose
course depends on shapes alone. Everything else (labels, scales, times, forward-mode AD) runs as it is written. The
first size of batch is compiled for itself; when a second one comes, once more for any size; then nothing is.

**Trust.** Compilers have been wrong: torch 2.13 gets gradients wrong by up to 40 %, silently, where a transformer
block's input is not contiguous. So before a network is first used compiled, a small batch goes through a shallow one of
its configuration, with random weights, on this device and in the run's precision: value f and gradients must obey

    |f_compiled − f₃₂| ≤ max(1e-3, 3 |f_written − f₃₂|)        relative to the largest |f₃₂| of each

with f₃₂ as it is written, in float32: in bfloat16 a compiler that fuses rounds less. The answer is remembered in the
user's cache for this version of torch, device, precision and configuration.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from metaflowmaps._files import read_regular, write_json
from metaflowmaps.errors import InputError
from metaflowmaps.networks.family import NetworkConfig, describe_network
from metaflowmaps.networks.forward_mode import forward_mode

Compile = Literal["auto"] | bool
Precision = Literal["float32", "bf16"]
LEAST_ALLOWED = 1e-3  # sums in another order give 1e-6, TF32 5e-4, a wrong gradient tenths
ROUNDINGS_ALLOWED = 3  # times the error of what is written, in the same precision
_checked: dict[str, "Comparison"] = {}


class Comparison(NamedTuple):
    """A compiled network beside the one that is written."""

    error: float
    allowed: float
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether it may be used; NaN does not."""
        return self.error <= self.allowed


class Compilable(nn.Module):
    """A module with a ``core`` that may run compiled."""

    compiled = False

    def core(self, *inputs: Tensor) -> Tensor:
        """What is compiled: tensors to a tensor, without a look at their values."""
        raise NotImplementedError

    def run(self, *inputs: Tensor) -> Tensor:
        """:meth:`core`, compiled or as it is written."""
        if not self.compiled or forward_mode():  # compilers do not know dual numbers
            return self.core(*inputs)
        # of an input that is not contiguous (patches are not) the compiler of torch 2.13 gets the gradient wrong
        kind: Any = type(self)
        return compiled_core(kind)(self, *(x.contiguous() for x in inputs))


@cache
def compiled_core(kind: type[Compilable]) -> Callable[..., Tensor]:
    """The compiled core of a class: one for all its modules, which are arguments, and no part of their state."""
    compiled: Callable[..., Tensor] = torch.compile(kind.core)
    return compiled


def use_compiled(
    network: Any, choice: Compile, device: torch.device | str = "cpu", precision: Precision = "float32"
) -> str | None:
    """Have a network run compiled, or as it is written; in a line what is worth telling.

    Args:
        network: any; of one that is not made of :class:`Compilable` parts nothing can be compiled.
        choice: auto (on CUDA, where it computes what is written), true (or an error) or false.
        device: where it runs,
        precision: and in which.
    """
    device, parts = torch.device(device), compilable(network)
    if choice is True and not parts:
        raise InputError(
            f"compile=true is for networks that say what can be compiled (docs/extending.md), and "
            f"{type(network).__name__} does not: set compile=false"
        )
    line, on = None, False
    if parts and (choice is True or (choice == "auto" and device.type == "cuda")):
        on, line = _trusted(network, device, precision)
        if choice is True and not on:
            raise InputError(f"compile=true {line}, or set compile=false")
    for part in parts:
        part.compiled = on
    if line is None or on:
        return line
    return f"not compiled: torch.compile {line}"


def compilable(network: Any) -> list[Compilable]:
    """The parts of a network that can be compiled; none of one that no configuration makes."""
    if not isinstance(network, nn.Module) or not isinstance(getattr(network, "config", None), NetworkConfig):
        return []
    return [part for part in network.modules() if isinstance(part, Compilable)]


def _trusted(network: nn.Module, device: torch.device, precision: Precision) -> tuple[bool, str]:
    """Whether compiling it computes what is written here, and a line on either."""
    here = f"torch {torch.__version__} on {device.type}"
    try:
        found, fresh = compare(network, device, precision)
    except Exception as failure:  # compilers have many kinds
        needed = "g++" if device.type == "cpu" else "Triton (pip install triton)"
        reason = " ".join(str(failure).split())[:160]
        return False, f"fails with {here} ({type(failure).__name__}: {reason}): install {needed}"
    if not found.agrees:
        return False, (
            f"is wrong with {here}: value and gradients are off by {found.error:.2g} (at most {found.allowed:.2g}): "
            "use another version of torch"
        )
    when = f"checked in {found.seconds:.0f} s" if fresh else "checked before"
    return True, f"compiled by {here}, except under forward-mode AD ({when}: off by {found.error:.1g})"


def compare(network: nn.Module, device: torch.device, precision: Precision) -> tuple[Comparison, bool]:
    """A network of this configuration compiled and as it is written, and whether it was compared just now."""
    key = _key(network, device, precision)
    if key not in _checked:
        _checked.update(_remembered())
    if key in _checked:
        return _checked[key], False
    began = time.perf_counter()
    error, allowed = _errors(network, device, precision)
    _checked[key] = Comparison(error, allowed, time.perf_counter() - began)
    with suppress(OSError):  # a home that cannot be written to
        cache_file().parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_file(), {name: list(one) for name, one in {**_remembered(), **_checked}.items()})
    return _checked[key], True


def cache_file() -> Path:
    """Where comparisons are remembered."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "metaflowmaps" / "compiled.json"


def _remembered() -> dict[str, Comparison]:
    """What the user's cache holds; nothing where it is damaged or missing."""
    with suppress(OSError, ValueError, TypeError, AttributeError, InputError):
        held = json.loads(read_regular(cache_file()))
        return {str(key): Comparison(*map(float, values)) for key, values in held.items()}
    return {}


def _key(network: nn.Module, device: torch.device, precision: Precision) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    text = json.dumps([torch.__version__, name, precision, describe_network(network)], sort_keys=True)
    return sha256(text.encode()).hexdigest()


@torch.enable_grad()
def _errors(network: nn.Module, device: torch.device, precision: Precision) -> tuple[float, float]:
    """Largest errors of value and gradients, relative to the largest number of each: compiled, and what is allowed."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        config: Any = network.config
        made = config.shallow().network(tuple(network.event_shape)).eval()  # type: ignore[arg-type]
    for weight in made.parameters():
        scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.2
        weight.data = scale * torch.randn(weight.shape, generator=generator)
    made.to(device)
    z, context = (torch.randn(3, *made.event_shape, generator=generator).to(device) for _ in "zx")
    a, b, t = torch.rand(3, 3, generator=generator).to(device)
    z.requires_grad_()

    def gradients(compiled: bool, rounded: bool) -> list[Tensor]:
        for part in compilable(made):
            part.compiled = compiled
        with torch.autocast(device.type, torch.bfloat16, enabled=rounded):
            out = made(z, a, b, context, t)
        given = torch.autograd.grad(out.float().square().sum(), [z, *made.parameters()], allow_unused=True)
        return [out.detach(), *(g for g in given if g is not None)]

    def error(sides: list[Tensor]) -> float:
        pairs = zip(sides, exact, strict=True)
        errors = [(one - other).abs().max() / other.abs().max().clamp_min(1e-30) for one, other in pairs]
        return float(torch.stack(errors).max())

    half = precision == "bf16"
    exact = gradients(False, False)
    allowed = max(LEAST_ALLOWED, ROUNDINGS_ALLOWED * error(gradients(False, half)))
    try:
        return error(gradients(True, half)), allowed
    finally:
        torch.compiler.reset()  # the run's own sizes are then the first that are compiled
