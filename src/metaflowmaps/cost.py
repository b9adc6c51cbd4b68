"""What a computation cost, read off hooks and clocks, never computed by formula.

A **forward** is one network evaluation of one sample: a batch of B counts B. A **backward** is one backward pass
through such an evaluation. Modules are watched by hooks (:meth:`Meter.watch`); plain callables are wrapped
(:meth:`Meter.counted`) and their rows counted as they pass.

The paper's **NFE** is the sum of network and reward calls, one more for each that is differentiated.
"""

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

COUNTS = ("forwards", "backwards", "reward_calls", "reward_backwards", "decodes")


class Meter:
    """``with Meter(network) as meter: …`` and then ``meter.cost()``."""

    def __init__(self, network: nn.Module | None = None, device: torch.device | None = None) -> None:
        self.forwards = self.backwards = self.reward_calls = self.reward_backwards = self.decodes = 0
        self.seconds = 0.0
        self.peak_memory_bytes = 0
        self._device = device
        self._watched: list[tuple[nn.Module, str, str | None]] = []
        self._hooks: list[Any] = []
        if network is not None:
            self.watch(network)

    def watch(self, module: nn.Module, calls: str = "forwards", backwards: str | None = "backwards") -> None:
        """Count this module's evaluations under these names while the meter runs."""
        self._watched.append((module, calls, backwards))
        first = next(module.parameters(), None)
        if self._device is None and first is not None:
            self._device = first.device

    def counted(self, function: Callable[..., Tensor], calls: str, backwards: str | None) -> Callable[..., Tensor]:
        """``function`` with the rows of its results counted under these names."""

        def counting(*args: Any, **kwargs: Any) -> Tensor:
            out = function(*args, **kwargs)
            self._count(out, calls, backwards)
            return out

        return counting

    def __enter__(self) -> "Meter":
        self._cuda = self._device is not None and self._device.type == "cuda"
        if self._cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._resident = _mark_resident()
        for module, calls, backwards in self._watched:

            def hook(_m: nn.Module, _a: Any, out: Tensor, calls: str = calls, back: str | None = backwards) -> None:
                if threading.get_ident() == self._thread:  # others may share the module
                    self._count(out, calls, back)

            self._hooks.append(module.register_forward_hook(hook))
        self._thread = threading.get_ident()
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)
        self.seconds += time.perf_counter() - self._began
        while self._hooks:
            self._hooks.pop().remove()
        if self._cuda:
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = max(0, _peak_resident() - self._resident)
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak)

    def _count(self, out: Tensor, calls: str, backwards: str | None) -> None:
        rows = out.shape[0]
        setattr(self, calls, getattr(self, calls) + rows)
        if backwards is not None and out.requires_grad:

            def passed(_gradient: Tensor) -> None:
                setattr(self, backwards, getattr(self, backwards) + rows)

            out.register_hook(passed)

    @property
    def evaluations(self) -> int:
        """Calls and backward passes of network and reward: the paper's NFE, in total."""
        return self.forwards + self.backwards + self.reward_calls + self.reward_backwards

    def cost(self) -> dict[str, float]:
        """The figures, as results.json holds them."""
        return {
            **{name: getattr(self, name) for name in COUNTS},
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


class Extent(NamedTuple):
    """How much is estimated, and how much is tried."""

    samples: int
    tried: int
    batch_size: int


def extrapolated(trial: Callable[[int], dict[str, float]], steps: int, extent: Extent) -> dict[str, float]:
    """What ``steps`` steps cost, from trials of two and of three: counts grow by a constant a step and a sample.

    Args:
        trial: runs so many steps on ``extent.tried`` samples and says what they cost.
        steps: K.
        extent: samples that are meant, those of a trial, and at a time.

    Returns:
        The cost of all samples, with ``nfe``, of one.
    """
    # the first call allocates and compiles: it tells the memory, not the time
    first, short, longer = trial(2), trial(2), trial(3)
    counted = [key for key in short if key not in ("peak_memory_bytes", "seconds", "nfe")]
    whole = {key: short[key] + (steps - 2) * (longer[key] - short[key]) for key in counted}
    out = {key: value * extent.samples / extent.tried for key, value in whole.items()}
    per_step = max(longer["seconds"] - short["seconds"], short["seconds"] / 3)
    batches = -(-extent.samples // extent.batch_size) / -(-extent.tried // extent.batch_size)
    out["seconds"] = batches * (short["seconds"] + (steps - 2) * per_step)
    out["peak_memory_bytes"] = max(cost["peak_memory_bytes"] for cost in (first, short, longer))
    calls = ("forwards", "backwards", "reward_calls", "reward_backwards")
    out["nfe"] = sum(out[key] for key in calls) / extent.samples
    return out


def _mark_resident() -> int:
    """Where growth is counted from: the present resident size where the peak can be reset to it, else the peak."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak, to the present size
        return _status("VmHWM")
    return _peak_resident()


def _peak_resident() -> int:
    """The process's peak resident size in bytes (since it was reset, where it can be)."""
    with suppress(OSError):
        return _status("VmHWM")
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")
