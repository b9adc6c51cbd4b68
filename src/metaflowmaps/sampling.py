r"""Integrators for dx/dt = f(t, x), the loop written once.

A method is one step ``(f, t, dt, x) -> x`` and declares its order and its calls of f a step; tests measure the order.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.shapes import Time, check_count, expand_time

VelocityField = Callable[[Time, Tensor], Tensor]


class Integrator(NamedTuple):
    """A one-step method."""

    step: Callable[[VelocityField, Tensor, Tensor, Tensor], Tensor]
    order: int
    calls: int


def _euler(f: VelocityField, t: Tensor, dt: Tensor, x: Tensor) -> Tensor:
    return x + expand_time(dt, x) * f(t, x)


def _midpoint(f: VelocityField, t: Tensor, dt: Tensor, x: Tensor) -> Tensor:
    half = x + expand_time(dt / 2, x) * f(t, x)
    return x + expand_time(dt, x) * f(t + dt / 2, half)


def _heun(f: VelocityField, t: Tensor, dt: Tensor, x: Tensor) -> Tensor:
    first = f(t, x)
    second = f(t + dt, x + expand_time(dt, x) * first)
    return x + expand_time(dt / 2, x) * (first + second)


def _rk4(f: VelocityField, t: Tensor, dt: Tensor, x: Tensor) -> Tensor:
    h = expand_time(dt, x)
    k1 = f(t, x)
    k2 = f(t + dt / 2, x + h / 2 * k1)
    k3 = f(t + dt / 2, x + h / 2 * k2)
    k4 = f(t + dt, x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


INTEGRATORS = {
    "euler": Integrator(_euler, 1, 1),
    "midpoint": Integrator(_midpoint, 2, 2),
    "heun": Integrator(_heun, 2, 2),
    "rk4": Integrator(_rk4, 4, 4),
}


def integrate(f: VelocityField, x: Tensor, grid: Tensor, method: str = "euler") -> Tensor:
    """x carried along increasing times, (K+1,) or one grid a row (K+1, B), by one step of ``method`` an interval."""
    if method not in INTEGRATORS:
        raise unknown("integrator", method, INTEGRATORS)
    if grid.ndim not in (1, 2) or len(grid) < 2 or not bool((grid.diff(dim=0) > 0).all()):
        raise InputError("a time grid must be (K+1,) or (K+1, B), strictly increasing, with at least two times")
    step = INTEGRATORS[method].step
    for t, end in pairwise(grid):
        x = step(f, t, end - t, x)
    return x


def uniform_grid(steps: int, start: float = 0.0, end: float = 1.0) -> Tensor:
    """steps + 1 equally spaced times, float64 (the ends are exact)."""
    check_count(steps, "steps")
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)
