r"""Anything that draws from ``p_{1|t}(· | x_t)``: one interface, five ways.

    MapPosterior      the meta flow map, k jumps a draw                      k network calls
    GlassPosterior    the auxiliary drift of any drift, integrated           steps × (calls of the integrator)
    RolloutPosterior  the memoryless SDE of any drift, from t to 1           steps network calls
    ExactPosterior    a Gaussian mixture's own posterior                     none
    TweediePosterior  the posterior mean D_t(x) as a point                   one (for all draws)

Losses train the first, values and steering consume any of them.
"""

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from metaflowmaps._shapes import (
    Cond,
    Time,
    batch_time,
    check_count,
    check_state,
    check_time,
    expand_time,
    repeat_cond,
    repeat_rows,
)
from metaflowmaps.errors import unknown
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.parameterization import GaussianChart
from metaflowmaps.path import Drift, Path, as_path, call_drift, glass_drift
from metaflowmaps.random import randn
from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.sampling import INTEGRATORS, integrate, uniform_grid


class Posterior(Protocol):
    """What steering and values ask of a posterior.

    Examples:
        >>> posterior = mfm.ExactPosterior(mfm.LinearPath(), mfm.GaussianMixture([[0.0, 0.0]], 1.0))
        >>> posterior.draw(0.5, torch.zeros(3, 2), num_draws=4).shape
        torch.Size([4, 3, 2])
    """

    def draw(
        self,
        t: Time,
        x_t: Tensor,
        num_draws: int,
        generator: torch.Generator | None = None,
        cond: Cond = None,
    ) -> Tensor:
        """num_draws draws from p_{1|t}(· | x_t): (num_draws, B, *event)."""
        ...


class MapPosterior:
    """X_{0,1}(ε; t, x) in ``steps`` jumps.

    Args:
        model: the map.
        steps: jumps, and network calls, a draw.

    Examples:
        >>> posterior = mfm.MapPosterior(mfm.MetaFlowMap.from_pretrained("digits"), steps=2)
        >>> posterior.draw(0.5, torch.zeros(3, 1, 8, 8), num_draws=4).shape
        torch.Size([4, 3, 1, 8, 8])
    """

    def __init__(self, model: MetaFlowMap, steps: int = 1) -> None:
        check_count(steps, "steps")
        self.model, self.steps, self.path = model, steps, model.path

    def push(self, noise: Tensor, t: Time, x_t: Tensor, cond: Cond = None) -> Tensor:
        """Noise to draws, one a row: (B, *event)."""
        return self.model.push(noise, t, x_t, self.steps, cond)

    def denoise(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """D_t(x)."""
        return self.model.denoise(t, x, cond)

    def draw(
        self,
        t: Time,
        x_t: Tensor,
        num_draws: int,
        generator: torch.Generator | None = None,
        cond: Cond = None,
    ) -> Tensor:
        return self.model.draw(t, x_t, num_draws, self.steps, generator, cond)


class GlassPosterior:
    """The GLASS ODE dx̄/ds = b̄_s(x̄; t, x) from noise at s = 0 to a draw at s = 1.

    Steps are equal in the angle of :mod:`metaflowmaps.parameterization` for data of spread ``data_std``: late contexts
    form their posterior near s = 1, where equal steps in s have nearly nothing left. The later the context, the less
    depends on the spread: 1 serves data of any (docs/log.md: GLASS by angles).

    Args:
        path: of the drift.
        drift: ``drift(t, x)`` or ``drift(t, x, cond)``, (B, *event) -> (B, *event).
        steps: of the inner ODE.
        method: its integrator.
        data_std: of a coordinate of the data; None for steps equal in s.

    Examples:
        >>> path, law = mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25)
        >>> posterior = mfm.GlassPosterior(path, lambda t, x: law.drift(path, t, x), steps=10)
        >>> posterior.draw(0.5, torch.zeros(3, 2), num_draws=4).shape
        torch.Size([4, 3, 2])
    """

    def __init__(
        self,
        path: Path,
        drift: Drift,
        steps: int = 30,
        method: str = "euler",
        data_std: float | None = 1.0,
    ) -> None:
        if method not in INTEGRATORS:
            raise unknown("integrator", method, INTEGRATORS)
        self.path, self.drift, self.method, self.data_std = as_path(path), drift, method, data_std
        self.grid = uniform_grid(steps)

    def _grid(self, times: Tensor, x_t: Tensor) -> Tensor:
        if self.data_std is None:
            return self.grid
        chart = GaussianChart(self.path, times, x_t, 0.0, self.data_std)
        # at t = 1 the posterior is a point, and its times, equal in the angle, are all 1
        angles = [chart.time_out(torch.full_like(times, a)) for a in self.grid.tolist()]
        inner = [torch.where(times == 1, a, s) for a, s in zip(self.grid.tolist(), angles, strict=True)]
        return torch.stack([torch.zeros_like(times), *inner[1:-1], torch.ones_like(times)])

    def draw(
        self,
        t: Time,
        x_t: Tensor,
        num_draws: int,
        generator: torch.Generator | None = None,
        cond: Cond = None,
    ) -> Tensor:
        _check(t, x_t, num_draws)
        noise = randn((num_draws, *x_t.shape), generator, x_t.dtype, x_t.device)
        contexts = repeat_rows(x_t, num_draws)
        times = batch_time(t, x_t).repeat(num_draws)
        wide = repeat_cond(cond, num_draws)
        return self.push(noise.flatten(0, 1), times, contexts, wide).reshape(noise.shape)

    def push(self, noise: Tensor, t: Time, x_t: Tensor, cond: Cond = None) -> Tensor:
        """Noise to draws, one a row: (B, *event)."""

        def drift(t: Time, x: Tensor) -> Tensor:
            return call_drift(self.drift, t, x, cond)

        times = batch_time(t, x_t)
        return integrate(
            lambda s, x: glass_drift(self.path, drift, s, x, times, x_t),
            noise,
            self._grid(times, x_t),
            self.method,
        )

    def denoise(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """D_t(x)."""
        return _posterior_mean(self.path, self.drift, t, x, cond)


class RolloutPosterior:
    """The end of the memoryless SDE ``dX = (b + (σ²/2) score) dt + σ dB`` started at x_t: exact as steps grow.

    Each step is the Gaussian bridge that holds the posterior mean fixed (:meth:`Path.bridge`), on equal steps from t to
    1. Slow: it is the inner rollout that maps and GLASS save, and what they are judged by.
    """

    def __init__(self, path: Path, drift: Drift, steps: int = 200) -> None:
        check_count(steps, "steps")
        self.path, self.drift, self.steps = as_path(path), drift, steps

    def draw(
        self,
        t: Time,
        x_t: Tensor,
        num_draws: int,
        generator: torch.Generator | None = None,
        cond: Cond = None,
    ) -> Tensor:
        _check(t, x_t, num_draws)
        x = repeat_rows(x_t, num_draws)
        wide = repeat_cond(cond, num_draws)
        start = batch_time(t, x_t).repeat(num_draws)
        times = [start + (1 - start) * (i / self.steps) for i in range(self.steps)] + [torch.ones_like(start)]
        for now, then in pairwise(times):
            bridge = self.path.bridge(expand_time(now, x), expand_time(then, x))
            # at t = 1 the bridge is 0/0, and the state its own posterior mean
            there = expand_time(now, x) == 1
            keep, data, std = (torch.where(there, at, c) for at, c in zip((0.0, 1.0, 0.0), bridge, strict=True))
            noise = randn(tuple(x.shape), generator, x.dtype, x.device)
            x = keep * x + data * self.denoise(now, x, wide) + std * noise
        return x.reshape(num_draws, *x_t.shape)

    def denoise(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """D_t(x)."""
        return _posterior_mean(self.path, self.drift, t, x, cond)


class ExactPosterior:
    """A mixture's own posterior, drawn exactly. A draw picks a component: it has no pathwise gradient in x_t.

    Args:
        path: the interpolant.
        law: of the data.

    Examples:
        >>> posterior = mfm.ExactPosterior(mfm.LinearPath(), mfm.GaussianMixture([[-2.0], [2.0]], 0.25))
        >>> draws = posterior.draw(0.2, torch.zeros(1, 1), 1000, torch.Generator().manual_seed(0))
        >>> bool(((draws > 0).float().mean() - 0.5).abs() < 0.1)  # half of them on either side
        True
    """

    pathwise = False

    def __init__(self, path: Path, law: GaussianMixture) -> None:
        self.path, self.law = as_path(path), law

    def draw(
        self,
        t: Time,
        x_t: Tensor,
        num_draws: int,
        generator: torch.Generator | None = None,
        cond: Cond = None,
    ) -> Tensor:
        _check(t, x_t, num_draws)
        return self.law.posterior(self.path, t, x_t).draw(num_draws, generator)

    def denoise(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """D_t(x)."""
        return self.law.denoise(self.path, t, x)


class TweediePosterior:
    """The point mass at D_t(x): what DPS-like methods put in place of the posterior.

    Args:
        path: of the drift.
        drift: ``drift(t, x)`` or ``drift(t, x, cond)``.

    Examples:
        >>> path, law = mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25)
        >>> posterior = mfm.TweediePosterior(path, lambda t, x: law.drift(path, t, x))
        >>> posterior.draw(0.5, torch.zeros(1, 2), 3).std(0)  # one point, so often as asked
        tensor([[0., 0.]])
    """

    def __init__(self, path: Path, drift: Drift) -> None:
        self.path, self.drift = as_path(path), drift

    def draw(
        self,
        t: Time,
        x_t: Tensor,
        num_draws: int,
        generator: torch.Generator | None = None,
        cond: Cond = None,
    ) -> Tensor:
        _check(t, x_t, num_draws)
        mean = self.denoise(t, x_t, cond)
        return mean.expand(num_draws, *mean.shape)

    def denoise(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """D_t(x)."""
        return _posterior_mean(self.path, self.drift, t, x, cond)


class ExactModel:
    """A mixture in the form of a model: path, event_shape, drift, draw, value.

    Args:
        path: the interpolant.
        law: of the data.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> model.draw(0.5, torch.zeros(3, 2), num_draws=4).shape
        torch.Size([4, 3, 2])
    """

    pathwise = False

    def __init__(self, path: Path, law: GaussianMixture) -> None:
        self.path, self.law = as_path(path), law
        self.event_shape = (law.dim,)
        self.dtype = law.dtype
        self._posterior = ExactPosterior(path, law)

    def drift(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """b_t(x)."""
        return self.law.drift(self.path, t, x)

    def draw(
        self,
        t: Time,
        x_t: Tensor,
        num_draws: int,
        generator: torch.Generator | None = None,
        cond: Cond = None,
    ) -> Tensor:
        """Exact draws: (num_draws, B, d)."""
        return self._posterior.draw(t, x_t, num_draws, generator, cond)

    def value(self, t: Time, x: Tensor, reward: LinearGaussian) -> Tensor:
        """V_t(x), exact."""
        return self.law.value(self.path, t, x, reward)


def _posterior_mean(path: Path, drift: Drift, t: Time, x: Tensor, cond: Cond) -> Tensor:
    """D_t(x) from the drift."""
    times = batch_time(t, x)
    return path.to_denoise(times, x, call_drift(drift, times, x, cond), "drift")


def _check(t: Time, x_t: Tensor, num_draws: int) -> None:
    check_time(t)
    check_state(x_t, "x_t")
    check_count(num_draws, "num_draws")
