"""What a computation cost, read off hooks and clocks, never computed by formula.

A **forward** is one network evaluation of one sample: a batch of B counts B.
"""

import resource
import sys
import time
from types import TracebackType
from typing import Any

import torch
from torch import nn


class Meter:
    """``with Meter(network) as meter: …`` and then ``meter.cost()``."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.forwards = 0
        self.seconds = 0.0
        self.peak_memory_bytes = 0

    def __enter__(self) -> "Meter":
        first = next(self.network.parameters(), None)
        self._cuda = first is not None and first.is_cuda
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._resident = _peak_resident()
        self._hook = self.network.register_forward_hook(self._count)
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._began
        self._hook.remove()
        if self._cuda:
            self.peak_memory_bytes = torch.cuda.max_memory_allocated()
        else:
            self.peak_memory_bytes = _peak_resident() - self._resident

    def _count(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        self.forwards += output.shape[0]

    def cost(self) -> dict[str, float]:
        """The figures, as results.json holds them."""
        return {
            "forwards": self.forwards,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def _peak_resident() -> int:
    """The process's peak resident size in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
