r"""Draws of ``p_{1|t}(· | x_t)`` from a deterministic flow map, with weights.

A flow map ``X_{s,1}`` carries p_s to p_1 along the drift's own lines: given its start its end is a point, and no draw
of a posterior. What makes one is noise put in before the jump, and a weight.

**Which law to jump from.** Pull the posterior ``p_1(x_1) N(x_t; β_t x_1, α_t²)/p_t(x_t)`` back through ``X_{s,1}``: its
ends have the law p_1 where its starts have p_s. For every f

    ∫ f(X_{s,1}(z)) p_s(z) N(x_t; β_t X_{s,1}(z), α_t²) dz = ∫ f(x_1) p_1(x_1) N(x_t; β_t x_1, α_t²) dx_1

so z must have the density ``π(z) ∝ p_s(z) N(x_t; β_t X_{s,1}(z), α_t²)``. There is no Jacobian in it, at any s.

**What is proposed.** The posterior mean, noised to the time s <= t: ``z = m + α_s ξ`` with ``m = β_s D_t(x_t)`` and
``ξ ~ N(0, Id)``. The weight of ``x_1 = X_{s,1}(z)`` is

    log w = log p_s(z) − log p_s(m) − ‖x_t − β_t x_1‖²/(2 α_t²) + ‖ξ‖²/2

up to constants of the context. At s = 0 m is 0, p_s is the law of ξ, and its density cancels the last term: samples of
p_1, weighed by their likelihood. Above, only a difference of log-densities is needed, and the score, which the map's
diagonal gives, is its gradient:

    log p_s(z) − log p_s(m) = ∫_0^1 (z − m)·∇ log p_s(m + λ (z − m)) dλ

by Gauss and Legendre with ``nodes`` points: exact for Gaussian data with one, and its error falls geometrically in them
wherever p_s is smooth. ``ratio`` is the proposal's signal to noise over the context's, ``(β_s/α_s)²/(β_t/α_t)²``.

**Why there.** Around a mode of spread δ, π has the variance ``α_t² (α_s² + β_s² δ²)/(α_t² + β_t² δ²)``. At ratio 1 that
is α_t² whatever δ is, the proposal's own, and the means differ by g (1 − g)/√(1 − g²) <= .30 of α_t for a typical x_t,
with ``g = β_t δ/√(α_t² + β_t² δ²)``: nothing early, nothing late. At a smaller ratio the proposal is wider than π in
stiff directions, never narrower, and less of the way between modes is integrated over. Noising x_t itself in place of
its mean, ``N(ρ x_t, α_s² − ρ² α_t²)`` with ρ = β_s/β_t, is too narrow as s nears t (docs/log.md: weighted draws).

**What is exact.** Self-normalised sums ``Σ w f(x_1)/Σ w`` converge to E[f | x_t] as draws and nodes grow. At N draws
the bias is O(1/N) and the variance about that of N/(1 + Var w) draws: read the ESS. The variance of log w grows with
the dimension. A map or a score that is wrong is not corrected, nor a score that is no gradient.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaflowmaps._shapes import (
    Cond,
    Time,
    batch_time,
    check_count,
    check_state,
    check_time,
    event_sum,
    expand_time,
    positive,
    repeat_cond,
    repeat_rows,
)
from metaflowmaps.errors import InputError
from metaflowmaps.path import Path, call_drift
from metaflowmaps.random import rand, randn


class WeightedDraws(NamedTuple):
    """Draws of a proposal and the logarithms of their weights, normalised over the draws of each context."""

    x_1: Tensor  # (N, B, *event)
    log_weights: Tensor  # (N, B)


class WeightedPosterior:
    """Weighted draws of p_{1|t}(· | x_t) by one jump of a deterministic flow map from a noised posterior mean.

    A draw costs ``nodes`` + 1 evaluations of the drift and ``steps`` of the map; at ``ratio=0`` those of the map alone.

    Args:
        map: has ``path``, ``jump(s, u, x, cond=None)`` and, but for ``ratio=0``, ``drift(t, x, cond=None)``: what
            ``mfm.wrap(…, flow_map=True)`` makes.
        ratio: signal to noise where the jump begins, over that of the context: in [0, 1].
        nodes: of the integral of the score.
        candidates: proposals a draw, of which ``draw`` picks by weight.
        steps: jumps of the map a draw, equal in time.

    Examples:
        >>> network = lambda z, r, t: 0 * z  # the average velocities of MeanFlow, say
        >>> flow = mfm.wrap(network, flow_map=True, event_shape=(2,))
        >>> posterior = mfm.WeightedPosterior(flow)
        >>> posterior.draw(0.5, torch.zeros(3, 2), num_draws=4).shape
        torch.Size([4, 3, 2])
    """

    pathwise = False  # of ``draw``: a pick has no gradient

    def __init__(self, map: Any, ratio: float = 1.0, nodes: int = 2, candidates: int = 4, steps: int = 1) -> None:
        for name in ("path", "jump"):
            if not hasattr(map, name):
                raise InputError(
                    f"a weighted posterior needs a flow map with path and jump(s, u, x, cond=None), and "
                    f"{type(map).__name__} has no {name}: wrap the network with mfm.wrap(…, flow_map=True)"
                )
        if positive(ratio, "ratio", or_zero=True) > 1:
            raise InputError(f"ratio compares signal to noise with the context's, in [0, 1], got {ratio}")
        check_count(nodes, "nodes")
        check_count(candidates, "candidates")
        check_count(steps, "steps")
        self.map, self.ratio, self.candidates, self.steps = map, float(ratio), candidates, steps
        self.path: Path = map.path
        places, weights = np.polynomial.legendre.leggauss(nodes)
        self._nodes = [((1 + float(x)) / 2, float(w) / 2) for x, w in zip(places, weights, strict=True)]

    def push_weighted(self, noise: Tensor, t: Time, x_t: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor]:
        """Proposals and their log-weights, one a row.

        Args:
            noise: ξ, (B, *event).
            t: A number, or (B,).
            x_t: Contexts, (B, *event).
            cond: Their conditions.

        Returns:
            x_1 (B, *event) and log w (B,), up to a constant of the context.
        """
        t = batch_time(t, x_t)
        # at t = 1 the posterior is the state itself: all draws are, of equal weight
        certain = self.path.alpha(t) == 0
        inner = torch.where(certain, 0.5, t)
        s = self.path.time_of_ratio(math.sqrt(self.ratio) * self.path.beta(inner), self.path.alpha(inner))
        away = expand_time(self.path.alpha(s), x_t) * noise
        mean, gained = torch.zeros_like(x_t), 0.5 * event_sum(noise.square())
        if self.ratio == 0:
            gained = torch.zeros_like(gained)
        else:
            mean = expand_time(self.path.beta(s), x_t) * self.denoise(inner, x_t, cond)
            gained = gained + self._log_density(s, mean, away, cond)
        x_1 = self._jumped(s, mean + away, cond)
        alpha, beta = (expand_time(c(inner), x_t) for c in (self.path.alpha, self.path.beta))
        log_weights = gained - 0.5 * event_sum(((x_t - beta * x_1) / alpha).square())
        rows = certain.reshape(-1, *([1] * (x_t.ndim - 1)))
        return torch.where(rows, x_t, x_1), torch.where(certain, 0.0, log_weights)

    def _jumped(self, s: Tensor, z: Tensor, cond: Cond) -> Tensor:
        """X_{s,1}(z): (B, *event)."""
        for i in range(1, self.steps):
            u = s + (1 - s) / (self.steps + 1 - i)
            s, z = u, self.map.jump(s, u, z, cond)
        out: Tensor = self.map.jump(s, torch.ones_like(s), z, cond)
        return out

    def _log_density(self, s: Tensor, mean: Tensor, away: Tensor, cond: Cond) -> Tensor:
        """log p_s(mean + away) − log p_s(mean): the score along the line, (B,)."""
        total = mean.new_zeros(len(mean))
        for place, weight in self._nodes:
            x = mean + place * away
            score = self.path.convert(s, x, call_drift(self.map.drift, s, x, cond), "drift", "score")
            total = total + weight * event_sum(score * away)
        return total

    def weighted_draws(
        self, t: Time, x_t: Tensor, num_draws: int, generator: torch.Generator | None = None, cond: Cond = None
    ) -> WeightedDraws:
        """Proposals with their weights.

        Args:
            t: A number, or (B,).
            x_t: Contexts, (B, *event).
            num_draws: N.
            generator: Of the noise.
            cond: Conditions of the contexts.

        Returns:
            x_1 (N, B, *event) and log-weights (N, B), the logarithms of numbers that sum to 1 over the draws.
        """
        check_time(t)
        check_state(x_t, "x_t")
        check_count(num_draws, "num_draws")
        noise = randn((num_draws, *x_t.shape), generator, x_t.dtype, x_t.device)
        times = batch_time(t, x_t).repeat(num_draws)
        contexts, wide = repeat_rows(x_t, num_draws), repeat_cond(cond, num_draws)
        x_1, log_weights = self.push_weighted(noise.flatten(0, 1), times, contexts, wide)
        return WeightedDraws(x_1.reshape(noise.shape), log_weights.reshape(num_draws, -1).log_softmax(0))

    @torch.no_grad()
    def draw(
        self, t: Time, x_t: Tensor, num_draws: int, generator: torch.Generator | None = None, cond: Cond = None
    ) -> Tensor:
        """Draws of equal weight, each picked by weight from ``candidates`` · num_draws proposals, without gradient.

        Args:
            t: A number, or (B,).
            x_t: Contexts, (B, *event).
            num_draws: N.
            generator: Of the noise and the picks.
            cond: Conditions of the contexts.

        Returns:
            (N, B, *event).
        """
        check_count(num_draws, "num_draws")
        made = self.weighted_draws(t, x_t, self.candidates * num_draws, generator, cond)
        edges = made.log_weights.double().exp().cumsum(0).T.contiguous()  # (B, M)
        uniform = rand((len(x_t), num_draws), generator, torch.float64, x_t.device)
        picked = torch.searchsorted(edges, uniform).clamp_max(len(made.x_1) - 1).T
        return made.x_1[picked, torch.arange(len(x_t), device=x_t.device)]

    def denoise(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """D_t(x), by the drift: (B, *event)."""
        times = batch_time(t, x)
        return self.path.to_denoise(times, x, call_drift(self.map.drift, times, x, cond), "drift")
