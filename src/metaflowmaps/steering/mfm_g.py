r"""MFM-G: the shift from reward gradients through the map, held together by recycled draws.

By itself the gradient form is fragile. It is ``Σ w_i g_i`` with g_i as large as the reward is sharp, nothing bounds it
by where the draws are, and its denominator, a mean of few e^{r_i}, is usually too small: one draw of a Gaussian
posterior of variance τ² overstates D* − D by (σ² + τ²|a|²)/σ² on average (27 × within one component of the paper's
problem). Such a step leaves the support, the next one corrects with a still larger gradient, and one mode swallows the
rest. The gradient-free form cannot do that, D̂* being a mean of draws, but it is noisy where the reward is smooth, or
the dimension high, and the gradient form is not.

``blend=True`` (the default) uses each where it is good. With F the gradient-free shift of the whole pool, Z = e^{V̂} the
pool's mean of e^r, and N draws of this step,

    G = (α²/β) (1/N) Σ_i (e^{r_i}/Z) g_i        the pool's Z: no Jensen bias from few draws
    D* − D = F + λ (G − F),   λ = v_F/(v_F + v_G),   moved by at most √v_F

F and G estimate one quantity, so any λ is consistent: G − F is a control variate, weighted by inverse variances. v_F is
F's jackknife variance plus what N_eff draws of spread s (about D_t, from the drift) would have if the tilt were
nothing, s²/N_eff; v_G the variance of G over the pool's gradients. The bound keeps a single wild gradient from going
further than F itself may be wrong.
"""

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count, event_sum
from metaflowmaps.steering.mfm_gf import draw_info
from metaflowmaps.steering.problem import FIRST, Info, Problem
from metaflowmaps.steering.recycling import DrawPool
from metaflowmaps.value import (
    NEGLIGIBLE,
    DrawOptions,
    Draws,
    equal_log_weights,
    ess,
    free_shift,
    log_mean,
    reparameterised,
    tilted_weights,
    weighted,
)


class GradientGuide:
    """Σ w_i ∇_x r(X(ε_i; t, x)), blended with the recycled gradient-free form or plain."""

    def __init__(
        self,
        num_draws: int,
        recycle: int = 8,
        blend: bool = True,
        correction: str = "none",
        noise: str = "independent",
        chunk: int = 4,
        passes: int = 1,
    ) -> None:
        check_count(num_draws, "num_draws")
        check_count(recycle, "recycle")
        self.num_draws, self.blend, self.correction = num_draws, blend, correction
        self.recycle = recycle if blend else 1
        self.options = DrawOptions(noise, chunk, passes, NEGLIGIBLE if correction == "none" else 0.0)

    def start(self, problem: Problem) -> DrawPool:
        return DrawPool(problem.path, self.recycle)

    def guide(self, problem: Problem, memory: DrawPool, t: float, x: Tensor) -> tuple[Tensor, Tensor, Info]:
        drift, looked_at = problem.drift(t, x), max(t, FIRST)
        made = problem.draws(looked_at, x, self.num_draws, self.options, differentiate=True)
        log_base = memory.add(looked_at, x, made)
        pool = memory.pooled()
        if not self.blend:
            shift = reparameterised(made, equal_log_weights(made.rewards), self.correction)
            return drift, shift, draw_info(problem, looked_at, shift, made.rewards, equal_log_weights(made.rewards))
        denoise = problem.denoise(t, x, drift)
        shift, share = blended(made, pool, log_base, denoise, self.correction)
        return drift, shift, {**draw_info(problem, looked_at, shift, pool.rewards, log_base), "gradient_share": share}


def blended(
    made: Draws, pool: Draws, log_base: Tensor, denoise: Tensor, correction: str = "none"
) -> tuple[Tensor, Tensor]:
    """F + λ (G − F), bounded, and λ; gradients are in the units of a shift."""
    assert made.gradients is not None
    assert pool.gradients is not None
    base, tilted = log_base.exp(), tilted_weights(pool.rewards, log_base)
    value = log_mean(pool.rewards, log_base)
    free = free_shift(pool, log_base, correction)
    ratio = torch.exp(made.rewards - value)
    gradient = weighted(ratio / len(ratio), made.gradients)

    spread = (base * _square(pool.x_1 - denoise)).sum(0)
    influence = _leave_one_out(tilted, pool.x_1) - _leave_one_out(base, pool.x_1)
    v_free = _square(influence).sum(0) + spread / ess(base)
    centred = _times(torch.exp(pool.rewards - value), pool.gradients) - weighted(tilted, pool.gradients)
    v_gradient = (base * _square(centred)).sum(0) / len(made.rewards)

    share = torch.nan_to_num(v_free / (v_free + v_gradient), nan=0.0)
    move = torch.nan_to_num(_times(share, gradient - free), nan=0.0, posinf=0.0, neginf=0.0)
    size = event_sum(move.square()).sqrt().clamp_min(torch.finfo(move.dtype).tiny)
    return free + _times((v_free.sqrt() / size).clamp_max(1), move), share


def _leave_one_out(weights: Tensor, y: Tensor) -> Tensor:
    """What the mean loses with each draw: w/(1 − w) (y_i − ȳ); a draw that is everything counts as 1000 to 1."""
    return _times(weights / (1 - weights).clamp_min(1e-3), y - weighted(weights, y))


def _square(y: Tensor) -> Tensor:
    return y.flatten(2).square().sum(2)


def _times(weights: Tensor, y: Tensor) -> Tensor:
    return weights.reshape(*weights.shape, *([1] * (y.ndim - weights.ndim))) * y
