r"""Parameterisations: the inner coordinates in which a network learns the auxiliary flow.

The auxiliary process of a context (t, x) runs from ``N(0, Id)`` at s = 0 to ``p_{1|t}(·|x)`` at s = 1. A **chart** is
a change of coordinates ``(s, x̄) ↔ (a, z)``, one for each context, with a = 0 at s = 0 and a = 1 at s = 1. Flow maps
and the identities that characterise them (diagonal, Eulerian, Lagrangian, semigroup) keep their form under a change
of coordinates, so the losses are written once, for ``Z_{a,b}(z) = z + (b − a) F_{a,b}(z)``, and hold in every chart.

**plain**: a = s, z = x̄, F = v = net.

**gaussian**: the exact answer for Gaussian data N(μ, δ²) plus a residual. For such data the posterior of the context is
``N(m, τ²)``, with

    den_t = α_t² + β_t² δ²      m = μ + β_t δ²/den_t · (x − β_t μ)      τ² = δ² α_t²/den_t

and ``Ī_s ~ N(β_s m, g_s²)``, ``g_s² = α_s² + β_s² τ²``. Whitened by these,

    z = (x̄ − β_s m)/g_s      x̂ = (x_1 − m)/τ      a = (2/π) atan2(β_s τ, α_s)

the auxiliary process is ``z_a = cos(πa/2) ε + sin(πa/2) x̂`` for *every* context: a trigonometric path from N(0, Id) to
the whitened posterior, whose data target has bounded variance at every t. Gaussian data have F = 0. Back outside,

    X_{s,u}(x̄) = β_u m + g_u Z_{a,b}(z),      v = v^G + g_u (b − a)/(u − s) F
    v^G = [β] m + [g]/g_s · (x̄ − β_s m),      [f] = (f_u − f_s)/(u − s)

with the divided differences taken without 0/0 at u = s. As t → 1 the map becomes exact whatever F is.

**residual**: the same Gaussian answer without the change of coordinates: a = s, z = x̄, ``F = v = v^G + τ net``,
squared errors weighted by 1/τ². The other form of the same idea; docs/log.md holds the measurement that chose between
them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from metaflowmaps._shapes import expand_time, repeat_rows
from metaflowmaps.errors import unknown
from metaflowmaps.path import Path, TrigonometricPath


class Chart(ABC):
    """Inner coordinates at a batch of contexts. Times here are (B,) tensors, states (B, *event)."""

    inner_path: Path  # the path of the auxiliary process in this chart
    context: Tensor  # what the network sees of x_t
    context_time: Tensor  # what the network sees of t, in [0, 1]
    weight: Tensor | None = None  # of squared errors in F, (B,); None is 1
    shift: Tensor | float = 0.0  # the data end in this chart: x̂ = (x_1 − shift)/scale
    scale: Tensor | float = 1.0

    @abstractmethod
    def flow(self, network: Callable[..., Tensor], a: Tensor, b: Tensor, z: Tensor) -> Tensor:
        """F_{a,b}(z) from ``network(z, a, b)``, whose context is already bound."""

    @abstractmethod
    def time_in(self, s: Tensor) -> Tensor:
        """s -> a."""

    @abstractmethod
    def time_out(self, a: Tensor) -> Tensor:
        """a -> s."""

    @abstractmethod
    def state_in(self, s: Tensor, x_s: Tensor) -> Tensor:
        """x̄ -> z, at time s."""

    @abstractmethod
    def state_out(self, s: Tensor, z: Tensor) -> Tensor:
        """z -> x̄, at time s."""

    def endpoint(self, x_1: Tensor) -> Tensor:
        """x_1 -> x̂, the data end of the auxiliary process."""
        return (x_1 - self.shift) / self.scale

    @abstractmethod
    def velocity_out(self, s: Tensor, u: Tensor, x_s: Tensor, flow: Tensor) -> Tensor:
        """F_{a,b} -> v_{s,u}."""

    @abstractmethod
    def velocity_in(self, s: Tensor, x_s: Tensor, velocity: Tensor) -> Tensor:
        """An auxiliary drift b̄_s -> dz/da."""


class PlainChart(Chart):
    """a = s, z = x̄, F = v = net."""

    def __init__(self, path: Path, t: Tensor, x_t: Tensor, data_mean: Tensor | float, data_std: Tensor | float) -> None:
        self.inner_path = path
        self.context, self.context_time = x_t, t

    def flow(self, network: Callable[..., Tensor], a: Tensor, b: Tensor, z: Tensor) -> Tensor:
        return network(z, a, b)

    def time_in(self, s: Tensor) -> Tensor:
        return s

    def time_out(self, a: Tensor) -> Tensor:
        return a

    def state_in(self, s: Tensor, x_s: Tensor) -> Tensor:
        return x_s

    def state_out(self, s: Tensor, z: Tensor) -> Tensor:
        return z

    def velocity_out(self, s: Tensor, u: Tensor, x_s: Tensor, flow: Tensor) -> Tensor:
        return flow

    def velocity_in(self, s: Tensor, x_s: Tensor, velocity: Tensor) -> Tensor:
        return velocity


class GaussianChart(Chart):
    """Whitened by the posterior that N(μ, δ²) data would have."""

    def __init__(self, path: Path, t: Tensor, x_t: Tensor, data_mean: Tensor | float, data_std: Tensor | float) -> None:
        self.path, self.inner_path = path, TrigonometricPath()
        self.batch_shape = (-1, *([1] * (x_t.ndim - 1)))
        time = expand_time(t, x_t)
        alpha, beta = path.alpha(time), path.beta(time)
        root = (alpha**2 + beta**2 * data_std**2).sqrt()
        self.context = (x_t - beta * data_mean) / root
        self.context_time = _angle(beta * data_std, alpha).flatten()
        self.m = data_mean + beta * data_std**2 / root * self.context
        self.tau = data_std * alpha / root
        self.tiny = torch.finfo(x_t.dtype).tiny ** 0.5
        self.shift, self.scale = self.m, self.tau.clamp_min(self.tiny)

    def flow(self, network: Callable[..., Tensor], a: Tensor, b: Tensor, z: Tensor) -> Tensor:
        return math.pi / 2 * network(z, a, b)  # dz/da of a unit rotation has size π/2

    def _coefficients(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """α_s, β_s, g_s; g_s is 0 only at s = t = 1, where z is 0 too."""
        s = s.reshape(self.batch_shape)
        alpha, beta = self.path.alpha(s), self.path.beta(s)
        return alpha, beta, (alpha**2 + beta**2 * self.tau**2).sqrt().clamp_min(self.tiny)

    def time_in(self, s: Tensor) -> Tensor:
        alpha, beta, _ = self._coefficients(s)
        return _angle(beta * self.tau, alpha).flatten()

    def time_out(self, a: Tensor) -> Tensor:
        a = a.reshape(self.batch_shape)
        return self.path.time_of_ratio(self.inner_path.beta(a), self.tau * self.inner_path.alpha(a)).flatten()

    def state_in(self, s: Tensor, x_s: Tensor) -> Tensor:
        _, beta, g = self._coefficients(s)
        return (x_s - beta * self.m) / g

    def state_out(self, s: Tensor, z: Tensor) -> Tensor:
        _, beta, g = self._coefficients(s)
        return beta * self.m + g * z

    def gaussian_velocity(self, s: Tensor, u: Tensor, x_s: Tensor) -> Tensor:
        """v^G_{s,u}(x̄), the answer for Gaussian data."""
        alpha_s, beta_s, g_s = self._coefficients(s)
        alpha_u, beta_u, g_u = self._coefficients(u)
        s, u = s.reshape(self.batch_shape), u.reshape(self.batch_shape)
        beta_slope = self.path.beta_slope(s, u)
        alpha_square_slope = self.path.alpha_slope(s, u) * (alpha_u + alpha_s)
        beta_square_slope = beta_slope * (beta_u + beta_s)
        g_slope = (alpha_square_slope + self.tau**2 * beta_square_slope) / (g_u + g_s)
        return beta_slope * self.m + g_slope * (x_s - beta_s * self.m) / g_s

    def velocity_out(self, s: Tensor, u: Tensor, x_s: Tensor, flow: Tensor) -> Tensor:
        alpha_s, beta_s, _ = self._coefficients(s)
        alpha_u, beta_u, g_u = self._coefficients(u)
        gaussian = self.gaussian_velocity(s, u, x_s)
        s, u = s.reshape(self.batch_shape), u.reshape(self.batch_shape)
        # b − a is the angle between the directions (α, βτ) at s and at u: sine and cosine as below
        sine_slope = self.tau * self.path.cross_slope(s, u)
        cosine = alpha_u * alpha_s + self.tau**2 * beta_u * beta_s
        angle_slope = sine_slope * _angle_over_sine((u - s) * sine_slope, cosine.clamp_min(self.tiny**2))
        return gaussian + g_u * angle_slope * flow

    def velocity_in(self, s: Tensor, x_s: Tensor, velocity: Tensor) -> Tensor:
        _, _, g = self._coefficients(s)
        gaussian = self.gaussian_velocity(s, s, x_s)
        s = s.reshape(self.batch_shape)
        # da/ds = (2/π) τ (β̇α − α̇β)/g², and dz/da − dz^G/da = (b̄ − v^G)/g · ds/da
        speed = 2 / math.pi * self.tau * self.path.cross_slope(s, s)
        return g * (velocity - gaussian) / speed.clamp_min(self.tiny)


class ResidualChart(PlainChart):
    """Plain coordinates; the Gaussian answer plus a residual scaled by τ."""

    def __init__(self, path: Path, t: Tensor, x_t: Tensor, data_mean: Tensor | float, data_std: Tensor | float) -> None:
        super().__init__(path, t, x_t, data_mean, data_std)
        self.white = GaussianChart(path, t, x_t, data_mean, data_std)
        self.context, self.weight = self.white.context, self.white.tau.flatten().clamp_min(1e-3) ** -2

    def flow(self, network: Callable[..., Tensor], a: Tensor, b: Tensor, z: Tensor) -> Tensor:
        # z may stack several states a context: the whitening is per context
        n = self.context.shape[0]
        chunks = list(zip(a.split(n), b.split(n), z.split(n), strict=True))
        white = torch.cat([self.white.state_in(a, z) for a, _, z in chunks])
        gaussian = torch.cat([self.white.gaussian_velocity(a, b, z) for a, b, z in chunks])
        tau = repeat_rows(self.white.tau, len(chunks))
        return gaussian + tau * network(white, a, b)


def _angle(sine: Tensor, cosine: Tensor) -> Tensor:
    """(2/π) atan2, an angle in [0, π/2] as a number in [0, 1]."""
    return 2 / math.pi * torch.atan2(sine, cosine)


def _angle_over_sine(sine: Tensor, cosine: Tensor) -> Tensor:
    """(2/π) atan2(y, x)/y for y >= 0, x > 0; by its series below 1e-3, where the first term left out is 1e-19 of it."""
    ratio = sine / cosine
    small = ratio < 1e-3
    safe = torch.where(small, cosine, sine)
    exact = torch.atan2(safe, cosine) / safe
    square = torch.where(small, ratio, torch.zeros_like(ratio)) ** 2
    series = (1 - square / 3 + square**2 / 5) / cosine
    return 2 / math.pi * torch.where(small, series, exact)


CHARTS: dict[str, type[Chart]] = {"plain": PlainChart, "gaussian": GaussianChart, "residual": ResidualChart}


def chart_class(name: str) -> type[Chart]:
    """The chart of a parameterisation's name."""
    if not isinstance(name, str) or name not in CHARTS:
        raise unknown("parameterization", name, CHARTS)
    return CHARTS[name]
