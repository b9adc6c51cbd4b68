r"""Simulators whose posteriors are known, as tasks of simulation-based inference.

**gaussian-linear**: θ ~ N(0, .1 Id) in ten dimensions, x = θ + noise of the same law; the posterior is N(x/2, .05 Id).

**two-moons**: θ uniform on [−1, 1]², and

    x = (r cos a + .25, r sin a) + (−|θ_1 + θ_2|, θ_2 − θ_1)/√2,    a ~ U(−π/2, π/2), r ~ N(.1, .01²)

θ ↦ (θ_1 + θ_2, θ_2 − θ_1)/√2 is a rotation, so of a uniform prior the posterior draws a and r anew, solves for the two
θ (one for either sign of the first coordinate), and keeps those inside the square: two crescents, exactly.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

VARIANCE = 0.1  # of a coordinate of θ, and of the noise, in gaussian-linear
DIM = 10


def gaussian_linear(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n pairs (θ, x)."""
    theta, noise = (math.sqrt(VARIANCE) * torch.randn(n, DIM, generator=generator) for _ in range(2))
    return theta, theta + noise


def gaussian_linear_posterior(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n draws given x (10,)."""
    return x / 2 + math.sqrt(VARIANCE / 2) * torch.randn(n, DIM, generator=generator)


def two_moons(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n pairs (θ, x)."""
    theta = 2 * torch.rand(n, 2, generator=generator) - 1
    along, across = (theta[:, 0] + theta[:, 1]) / math.sqrt(2), (theta[:, 1] - theta[:, 0]) / math.sqrt(2)
    return theta, _crescent(n, generator) + torch.stack([-along.abs(), across], 1)


def two_moons_posterior(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n draws given x (2,)."""
    kept = torch.zeros(0, 2)
    while len(kept) < n:
        moved = x - _crescent(4 * n, generator)
        sign = torch.where(torch.rand(4 * n, generator=generator) < 0.5, -1.0, 1.0)
        along, across = -sign * moved[:, 0], moved[:, 1]
        theta = torch.stack([along - across, along + across], 1) / math.sqrt(2)
        possible = (moved[:, 0] <= 0) & (theta.abs() <= 1).all(1)
        kept = torch.cat([kept, theta[possible]])
    return kept[:n]


def _crescent(n: int, generator: torch.Generator) -> Tensor:
    angle = math.pi * (torch.rand(n, generator=generator) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(n, generator=generator)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)


class Task(NamedTuple):
    """A simulator, and draws of its posterior."""

    simulate: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]  # n -> θ (n, d), x (n, k)
    posterior: Callable[[Tensor, int, torch.Generator], Tensor]  # x (k,), n -> (n, d)


TASKS = {
    "gaussian-linear": Task(gaussian_linear, gaussian_linear_posterior),
    "two-moons": Task(two_moons, two_moons_posterior),
}
