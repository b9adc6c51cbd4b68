"""Where a network trained elsewhere finds a given ratio of data to noise: its weights there, and its clock."""

from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from metaflowmaps._shapes import as_numbers, expand_time, positive
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.path import Path, make_path


class View(NamedTuple):
    """What a network sees at one information: weights of noise and data, its clock, and their rates by that clock."""

    a: Tensor
    b: Tensor
    clock: Tensor
    rates: tuple[Tensor, Tensor] | None = None

    def over(self, x: Tensor) -> "View":
        """Weights and rates (B,), shaped to multiply states; the clock stays (B,)."""
        a, b = expand_time(self.a, x), expand_time(self.b, x)
        rates = None if self.rates is None else (expand_time(self.rates[0], x), expand_time(self.rates[1], x))
        return View(a, b, self.clock, rates)


class Schedule(Protocol):
    """Where a network finds a ratio of data to noise; ``velocity``: whether its clock has rates."""

    velocity: bool

    def at(self, alpha: Tensor, beta: Tensor) -> View:
        """The view with b/a = beta/alpha: (B,) tensors, alpha² + beta² = 1."""
        ...


class PathSchedule:
    """One of our paths, its clock running to data or from it."""

    velocity = True

    def __init__(self, path: Path, data_at_1: bool) -> None:
        self.path, self.data_at_1 = path, data_at_1

    def at(self, alpha: Tensor, beta: Tensor) -> View:
        path, t = self.path, self.path.time_of_ratio(beta, alpha)
        sign = 1 if self.data_at_1 else -1
        rates = (sign * path.alpha_dot(t), sign * path.beta_dot(t))
        return View(path.alpha(t), path.beta(t), t if self.data_at_1 else 1 - t, rates)


class TableSchedule:
    """Diffusion steps k with ᾱ_k, ``y = √ᾱ_k x_1 + √(1−ᾱ_k) ε``; between steps log(b/a) is linear in k."""

    velocity = False

    def __init__(self, alphas_cumprod: Tensor, data_at_1: bool) -> None:
        table = torch.as_tensor(alphas_cumprod, dtype=torch.float64).flatten().cpu().clone()
        noisy, beside = (0, 1) if data_at_1 else (-1, -2)
        if len(table) >= 2 and table[noisy] < 1e-6:  # a last step of pure noise may be lifted past the one before it
            table[noisy] = torch.minimum(table[noisy], table[beside] / 2)
        inside = bool(((table >= 0) & (table < 1)).all()) and len(table) >= 2
        steps = table.diff()
        if not inside or not bool((steps < 0).all() if not data_at_1 else (steps > 0).all()):
            order = "rise" if data_at_1 else "fall"
            raise InputError(
                f"a schedule of diffusion steps must {order} within [0, 1) for time='data-at-{int(data_at_1)}': "
                "give alphas_cumprod with the other time, or check the numbers"
            )
        table = table.clamp_min(1e-12)  # a last step of pure noise
        self.logs = (table / (1 - table)).log() / 2
        self.rising = data_at_1

    def at(self, alpha: Tensor, beta: Tensor) -> View:
        logs, last = self.logs.to(beta.device), len(self.logs) - 1
        logs = logs if self.rising else logs.flip(0)
        wanted = (beta.double().clamp_min(1e-30).log() - alpha.double().clamp_min(1e-30).log()).clamp(logs[0], logs[-1])
        left = (torch.searchsorted(logs, wanted, right=True) - 1).clamp(0, last - 1)
        k = left + (wanted - logs[left]) / (logs[left + 1] - logs[left])
        b = torch.sigmoid(2 * wanted).sqrt()
        a = torch.sigmoid(-2 * wanted).sqrt()
        clock = k if self.rising else last - k
        return View(a.to(beta), b.to(beta), clock.to(beta))


class ExplodingSchedule:
    """``y = x_1 + σ ε`` with σ as the clock (EDM, variance exploding), up to ``largest``."""

    velocity = False

    def __init__(self, largest: float = 80.0, smallest: float = 2e-3) -> None:
        self.largest, self.smallest = largest, smallest

    def at(self, alpha: Tensor, beta: Tensor) -> View:
        sigma = (alpha / beta.clamp_min(1e-30)).clamp(self.smallest, self.largest)
        return View(sigma, torch.ones_like(sigma), sigma)


def schedule_of(given: Any, time: str) -> Schedule:
    """The schedule of ``wrap``'s ``schedule`` and ``time``."""
    data_at_1 = time == "data-at-1"
    table = getattr(given, "alphas_cumprod", given)
    if isinstance(given, str) and given == "ddpm":
        table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    listed = isinstance(table, list | tuple) and len(table) and not isinstance(table[0], str)
    if isinstance(table, Tensor | np.ndarray) or listed:
        return TableSchedule(as_numbers(table, "alphas_cumprod"), data_at_1)
    if isinstance(given, Path):
        return PathSchedule(given, data_at_1)
    name, *options = given if isinstance(given, tuple) else (given,)
    if name == "exploding":
        if data_at_1:
            raise InputError("σ is 0 at the data: give time='data-at-0' with schedule='exploding'")
        if len(options) > 1:
            raise InputError(f"schedule=('exploding', largest σ) takes one number, got {len(options)}")
        return ExplodingSchedule(*(positive(option, "the largest σ") for option in options))
    if options or name not in ("linear", "trigonometric"):
        shown = given if isinstance(given, str | tuple) else type(given).__name__
        raise unknown("schedule", shown, ("linear", "trigonometric", "ddpm", "exploding", "a tensor alphas_cumprod"))
    return PathSchedule(make_path(name), data_at_1)
