r"""Integrators for dx/dt = f(t, x), the loop written once.

A method is one step ``(f, t, dt, x) -> x`` and declares its order and its calls of f a step; tests measure the order.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import Time, check_count, expand_time, positive
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.path import Path

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
    check_grid(grid)
    step = INTEGRATORS[method].step
    for t, end in pairwise(grid):
        x = step(f, t, end - t, x)
    return x


def uniform_grid(steps: int, start: float = 0.0, end: float = 1.0) -> Tensor:
    """steps + 1 equally spaced times, float64 (the ends are exact)."""
    check_count(steps, "steps")
    return torch.linspace(start, end, steps + 1, dtype=torch.float64)


def power_grid(steps: int, power: float = 2.5, start: float = 0.01, end: float = 1.0) -> Tensor:
    """linspace(start, end)^power: short steps early, the grid of MFM-Search."""
    return uniform_grid(steps, start, end) ** positive(power, "power")


def log_snr_grid(path: Path, steps: int, ends: float = 0.01) -> Tensor:
    """0, then times uniform in log β/α between ends and 1 − ends, then 1."""
    check_count(steps, "steps")
    if steps < 3:
        return uniform_grid(steps)
    inner = torch.tensor([ends, 1 - ends], dtype=torch.float64)
    low, high = (path.beta(inner) / path.alpha(inner)).log().tolist()
    ratio = torch.linspace(low, high, steps - 1, dtype=torch.float64).exp()
    return torch.cat([torch.zeros(1), path.time_of_ratio(ratio, torch.ones_like(ratio)), torch.ones(1)])


GRIDS = ("uniform", "power", "log-snr")


def time_grid(path: Path, grid: str | Tensor, steps: int) -> Tensor:
    """The grid of that name with ``steps`` intervals, or a tensor of times as it is, checked."""
    if isinstance(grid, Tensor):
        check_grid(grid)
        if grid.ndim != 1 or not (float(grid[0]) >= 0 and float(grid[-1]) == 1):
            raise InputError("a steering grid must be (K+1,) times from 0, or a little later, to exactly 1")
        return grid.to("cpu", torch.float64)
    if grid == "uniform":
        return uniform_grid(steps)
    if grid == "power":
        return power_grid(steps)
    if grid == "log-snr":
        return log_snr_grid(path, steps)
    raise unknown("grid", grid, GRIDS)


def check_grid(grid: Tensor) -> None:
    """Refuse times that do not increase."""
    if grid.ndim not in (1, 2) or len(grid) < 2 or not bool((grid.diff(dim=0) > 0).all()):
        raise InputError("a time grid must be (K+1,) or (K+1, B), strictly increasing, with at least two times")
