"""Weighted draws from a deterministic flow map, by where the jump begins and by how many there are.

The map is the exact flow of a mixture, by Runge and Kutta: what is measured is the proposal and nothing else. Contexts
are from the law itself. For N draws at a context the error is that of their mean,

    √ E ‖Σ w x_1 − D_t(x_t)‖² / tr Var(x_1 | x_t),        1/√N for exact draws

over contexts and over disjoint groups of N of the same proposals, beside the ESS over all of them, as a share.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import keep, say
from metaflowmaps._shapes import Cond, Time, batch_time, event_sum, expand_time
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.path import LinearPath
from metaflowmaps.posterior import GlassPosterior
from metaflowmaps.random import stream
from metaflowmaps.recipes.gmm import LAW as LAW_2D
from metaflowmaps.recipes.mixture16 import LAW as LAW_16D
from metaflowmaps.sampling import integrate, uniform_grid
from metaflowmaps.weighted_posterior import WeightedPosterior

TIMES = (0.2, 0.5, 0.8, 0.95)
DRAWS = (4, 16, 64, 256)
CONTEXTS, PROPOSALS, FLOW_STEPS = 16, 256, 10
PATH = LinearPath()
Weighted = Callable[[Tensor, Time, Tensor], tuple[Tensor, Tensor]]


class ExactFlow:
    """X_{s,u} of a mixture."""

    path = PATH

    def __init__(self, law: GaussianMixture) -> None:
        self.law = law

    def drift(self, t: Time, x: Tensor, cond: Cond = None) -> Tensor:
        """b_t(x)."""
        return self.law.drift(PATH, t, x)

    def jump(self, s: Tensor, u: Tensor, x: Tensor, cond: Cond = None) -> Tensor:
        """In steps of the fourth order, equal in time."""
        late = 1 - 1e-9  # the drift of a mixture is not asked for at 1 itself
        grid = s + uniform_grid(FLOW_STEPS)[:, None] * (u.clamp_max(late) - s)
        return integrate(self.drift, x, grid, "rk4")


def noised_state(flow: ExactFlow, ratio: float) -> Weighted:
    """The rival: x_t itself is noised to the earlier time by the law of its past, N(ρ x_t, α_s² − ρ² α_t²)."""
    posterior = WeightedPosterior(flow, ratio, nodes=4)

    def push(noise: Tensor, t: Time, x_t: Tensor) -> tuple[Tensor, Tensor]:
        t = batch_time(t, x_t)
        s = PATH.time_of_ratio(ratio**0.5 * PATH.beta(t), PATH.alpha(t))
        rho = PATH.beta(s) / PATH.beta(t)
        std = (PATH.alpha(s) ** 2 - rho**2 * PATH.alpha(t) ** 2).sqrt()
        mean, away = expand_time(rho, x_t) * x_t, expand_time(std, x_t) * noise
        x_1 = flow.jump(s, torch.ones_like(s), mean + away)
        apart = (x_t - expand_time(PATH.beta(t), x_t) * x_1) / expand_time(PATH.alpha(t), x_t)
        gained = posterior._log_density(s, mean, away, None)
        return x_1, gained + 0.5 * event_sum(noise.square()) - 0.5 * event_sum(apart.square())

    return push


def glass(flow: ExactFlow, steps: int) -> Weighted:
    """The other way from a drift: equal weights, one call a step."""
    posterior = GlassPosterior(PATH, flow.drift, steps)

    def push(noise: Tensor, t: Time, x_t: Tensor) -> tuple[Tensor, Tensor]:
        return posterior.push(noise, t, x_t), x_t.new_zeros(len(x_t))

    return push


def proposals(flow: ExactFlow) -> dict[str, tuple[str, Weighted]]:
    """Name -> calls a draw and what draws."""
    ours = {
        f"mean noised to ratio {ratio:g}, {nodes} nodes": (
            str(nodes + 2) if ratio else "1",
            WeightedPosterior(flow, ratio, nodes).push_weighted,
        )
        for ratio, nodes in ((0.0, 1), (0.5, 2), (1.0, 1), (1.0, 2), (1.0, 4))
    }
    rivals = {f"state noised to ratio {ratio:g}": ("6", noised_state(flow, ratio)) for ratio in (0.25, 0.5)}
    return {**ours, **rivals, "GLASS, 4 steps": ("4", glass(flow, 4)), "GLASS, 30 steps": ("30", glass(flow, 30))}


def cell(law: GaussianMixture, push: Weighted, t: float) -> dict[str, Any]:
    """ESS and errors at one time."""
    x_1 = law.sample(CONTEXTS, stream(0, "weighted data", t)).double()
    x_t = PATH.interpolate(torch.randn(x_1.shape, generator=stream(0, "weighted noise", t), dtype=x_1.dtype), x_1, t)
    noise = torch.randn((PROPOSALS * CONTEXTS, law.dim), generator=stream(0, "weighted draws", t), dtype=x_1.dtype)
    wide = x_t.repeat(PROPOSALS, 1)
    made, log_weights = push(noise, batch_time(t, wide), wide)
    draws, log_weights = made.reshape(PROPOSALS, CONTEXTS, -1), log_weights.reshape(PROPOSALS, CONTEXTS)
    exact, mean = law.posterior(PATH, t, x_t).draw(2_000, stream(1, "exact", t)), law.denoise(PATH, t, x_t)
    spread = (exact - mean).square().sum(2).mean(0)
    errors = {}
    for n in DRAWS:
        grouped = draws.reshape(-1, n, CONTEXTS, law.dim)
        weights = log_weights.reshape(-1, n, CONTEXTS).softmax(1)
        means = (weights[..., None] * grouped).sum(1)
        errors[str(n)] = float(((means - mean).square().sum(2) / spread).mean().sqrt())
    ess = 1 / log_weights.softmax(0).square().sum(0)
    return {"ess_share": float(ess.mean() / PROPOSALS), "errors": errors}


@torch.no_grad()
def main() -> None:
    """benchmarks/results/weighted-posterior.json."""
    torch.set_num_threads(1)
    laws = {"plane": LAW_2D.law(), "16 dimensions": LAW_16D.law()}
    figures: dict[str, Any] = {}
    for name, law in laws.items():
        for title, (calls, push) in proposals(ExactFlow(law)).items():
            say(f"weighted-posterior: {name}, {title}")
            cells = {f"{t:g}": cell(law, push, t) for t in TIMES}
            figures.setdefault(name, {})[title] = {"calls": calls, "times": cells}
    keep("weighted-posterior", "python -m benchmarks weighted-posterior", {"laws": figures})
