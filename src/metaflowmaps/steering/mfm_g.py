r"""MFM-G: the shift from reward gradients through the map, held together by recycled draws.

By itself the gradient form is fragile. It is ``Σ w_i g_i`` with g_i as large as the reward is sharp, nothing bounds it
by where the draws are, and its denominator, a mean of few e^{r_i}, is usually too small: one draw of a Gaussian
posterior of variance τ² overstates D* − D by (σ² + τ²|a|²)/σ² on average (27 × within one component of the paper's
problem). Such a step leaves the support, the next one corrects with a still larger gradient, and one mode swallows the
rest. The gradient-free form cannot do that, D̂* being a mean of draws, but it is noisy where the reward is smooth, or
the dimension high, and the gradient form is not.

``blend=True`` (the default) uses each where it is good. With F the gradient-free shift of the whole pool, Z = e^{V̂}
the pool's mean of e^r, and N draws of this step,

    G = (α²/β) Σ_i ω_i (e^{r_i}/Z) g_i (ω = 1/N)       the pool's Z: no Jensen bias from few draws
    D* − D = F + λ (G − F),   λ = v_F/(v_F + v_G),   moved by at most √v_F

F and G estimate one quantity, so any λ is consistent: G − F is a control variate, weighted by inverse variances. v_F is
F's jackknife variance plus what N_eff draws of spread s (about D_t, from the drift) would have if the tilt were
nothing, s²/N_eff; v_G the variance of G over the pool's gradients. The bound keeps a single wild gradient from going
further than F itself may be wrong.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count, event_sum
from metaflowmaps.draws import NEGLIGIBLE, DrawOptions, Draws, tilted_weights, weighted
from metaflowmaps.errors import InputError, check_one_of
from metaflowmaps.steering.from_draws import FromDraws, draw_info, halved_shift
from metaflowmaps.steering.method import Guidance, GuidedMethod
from metaflowmaps.steering.problem import FIRST, SteeringProblem
from metaflowmaps.steering.recycling import DrawPool
from metaflowmaps.value import CORRECTIONS, ess, free_shift, log_mean, reparameterised


@dataclass(frozen=True)
class MFMG(FromDraws, GuidedMethod):
    """Σ w_i ∇_x r(X(ε_i; t, x)), blended with the recycled gradient-free form or plain.

    Args:
        recycle: steps whose draws the gradient-free form uses together.
        blend: with the gradient-free form; without it the method is the paper's.
        correction: none, or jackknife for the 1/N term of the bias.
        passes: 2 differentiates only draws that carry weight.

    Examples:
        >>> model = mfm.MetaFlowMap.from_pretrained("digits")
        >>> reward = mfm.rewards.Ink(strength=50.0)
        >>> result = mfm.steer(model, reward, 4, mfm.MFMG(num_draws=1), mfm.ODE(steps=5), seed=0)
        >>> result.samples.shape
        torch.Size([4, 1, 8, 8])
    """

    name = "mfm-g"
    title = "MFM-G"
    in_words = (
        "Each step draws what the sample may become, one network call a draw, and follows the "
        "reward's gradient through the draws."
    )
    look = ("#1f6feb", "o")
    gradients: ClassVar[bool] = True
    published: ClassVar[dict[str, Any]] = {"blend": False}
    weighs: ClassVar[bool] = True

    chunk: int = 4
    recycle: int = 8
    blend: bool = True
    correction: str = "none"
    passes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.recycle, "recycle")
        check_one_of("correction", self.correction, CORRECTIONS)
        if self.passes not in (1, 2):
            raise InputError(f"passes must be 1 (differentiate every draw) or 2 (weights first), got {self.passes}")

    @property
    def calls_per_step(self) -> float:
        """The drift; a call and a reward a draw, both differentiated."""
        return 1 + 4 * self.num_draws

    @property
    def row_by_row(self) -> bool:
        """A second pass leaves rows out."""
        return self.passes == 1

    def options(self, differentiate: bool = True) -> DrawOptions:
        """How draws are made: with gradients."""
        negligible = NEGLIGIBLE if self.correction == "none" else 0.0
        return DrawOptions(
            self.num_draws, differentiate, self.noise, self.chunk, self.passes, negligible, weighted=True
        )

    def remember(self, problem: SteeringProblem) -> DrawPool:
        """The draws of the last steps, where the blend uses them."""
        self.open_posterior(problem)
        return DrawPool(problem.path, self.recycle if self.blend else 1)

    def guide(self, problem: SteeringProblem, memory: DrawPool, t: float, x: Tensor) -> Guidance:
        """The drift, and the blended shift or the plain gradient as a shift."""
        drift, looked_at = problem.drift(t, x), max(t, FIRST)
        made = problem.draws(looked_at, x, self.options())
        log_base = memory.add(looked_at, x, made)
        if not self.blend:
            shift = reparameterised(made, made.log_base, self.correction)
            return Guidance(drift, shift, draw_info(problem, looked_at, shift, made.rewards, made.log_base, self.noise))
        pool = memory.pooled()
        shift, share = blended(made, pool, log_base, problem.denoise(t, x, drift), self.correction)
        info = draw_info(problem, looked_at, shift, pool.rewards, log_base, self.noise)
        halved = halved_shift(pool, log_base)
        if halved is not None:  # the part of the blend that is gradient-free; that of the gradients has little bias
            halved = _times(1 - share, halved)
        return Guidance(drift, shift, {**info, "gradient_share": share}, halved)


def blended(
    made: Draws, pool: Draws, log_base: Tensor, denoise: Tensor, correction: str = "none"
) -> tuple[Tensor, Tensor]:
    """F + λ (G − F), bounded, and λ; gradients are in the units of a shift."""
    assert made.gradients is not None
    assert pool.gradients is not None
    base, tilted = log_base.exp(), tilted_weights(pool.rewards, log_base)
    value = log_mean(pool.rewards, log_base)
    free = free_shift(pool, log_base, correction)
    gradient = weighted(torch.exp(made.log_base + made.rewards - value), made.gradients)

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
