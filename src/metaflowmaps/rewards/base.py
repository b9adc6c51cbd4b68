"""A reward is any callable ``(x, cond=None) -> (B,)``: a log-density tilt, already multiplied by its strength λ.

A plain function works. A class in this package also declares ``differentiable`` (may ∇r be taken?) and ``strength``.
"""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

Cond = Mapping[str, Tensor] | None


@runtime_checkable
class Reward(Protocol):
    """What the package's own rewards offer beyond being callable."""

    differentiable: bool
    strength: float

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor: ...
