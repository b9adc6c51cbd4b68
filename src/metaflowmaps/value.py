r"""The value ``V_t(x) = log E[e^{r(I_1)} | I_t = x]`` and its gradient from draws, with what they are worth.

Draws x_1^i with base weights ω_i (equal, or those of recycled draws) and tilted weights ``w_i ∝ ω_i e^{r_i}``:

    V̂ = log Σ ω_i e^{r_i}                        ESS = 1/Σ w_i²

**gradient-free** (Eq. 20). Tweedie for the tilted and for the base posterior, one minus the other:
``∇V = (β_t/α_t²)(D*_t − D_t)`` with D* the mean under the tilt. Written as ``D* − D = Σ (w_i − ω_i) x_1^i`` a constant
reward gives exact zeros. With ``centre="denoise"`` D_t comes from the drift instead of the same draws.

**gradient** (Eq. 22). ``∇V̂ = Σ w_i g_i`` with ``g_i = ∇_x r(X_{0,1}(ε_i; t, x))`` (:mod:`metaflowmaps.draws`).

Standard errors are jackknife's: ``(M−1)/M Σ (θ_{−i} − mean)²`` over estimates that leave one draw out (of antithetic
noise a pair, whose draws are not independent). The delta method, which they agree with for many draws, takes a heavy
draw for as good as a light one: where one of four draws has most of the weight its square is a seventh of the squared
error. Of quasi-random noise one set tells no error: it is NaN.

Both are ratio estimators with bias O(1/N); ``correction="jackknife"`` removes the 1/N term,
``N θ − (N−1) mean_i θ_{−i}``, and pays in variance.

``D* − D`` is called the **shift**: finite at t = 0 where σ_t² is not, and what :mod:`metaflowmaps.steering` adds.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from metaflowmaps._sample_plots import show_rewards, show_samples
from metaflowmaps._shapes import Cond, Time, batch_time, check_finite, check_state, check_time, expand_time
from metaflowmaps.draws import (
    NEGLIGIBLE,
    DrawOptions,
    Draws,
    make_draws,
    tilted_weights,
    weighted,
)
from metaflowmaps.errors import InputError, check_one_of, known_keywords, unknown
from metaflowmaps.path import Path
from metaflowmaps.random import NOISES, Source
from metaflowmaps.rewards.checked import checked_reward
from metaflowmaps.unseen import missed
from metaflowmaps.work.choices import Choice, built
from metaflowmaps.work.memory import frozen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CORRECTIONS = ("none", "jackknife")


class ValueEstimate(NamedTuple):
    """V̂ and ∇V̂ at a batch of states, and what they came from.

    Examples:
        >>> posterior = mfm.ExactPosterior(mfm.LinearPath(), mfm.GaussianMixture([[0.0, 0.0]], 1.0))
        >>> estimate = mfm.value_gradient(posterior, lambda x: x[:, 0], 0.5, torch.zeros(3, 2), 8, "gradient-free")
        >>> estimate.value.shape, estimate.gradient.shape, estimate.draws.shape
        (torch.Size([3]), torch.Size([3, 2]), torch.Size([8, 3, 2]))
    """

    value: Tensor  # (B,)
    gradient: Tensor  # (B, *event)
    ess: Tensor  # (B,) in [1, num_draws]
    std_err: Tensor  # (B,) of the value, by the jackknife; infinite with one draw
    gradient_std_err: Tensor  # (B,) root of the summed variances of the gradient's coordinates
    draws: Tensor  # (num_draws, B, *event)
    rewards: Tensor  # (num_draws, B)

    def plot(self, row: int = 0) -> "Figure":
        """One state's draws, those of the highest reward first, and their rewards: a matplotlib figure.

        Args:
            row: which of the B states.
        """
        from metaflowmaps._figure import ShownFigure

        figure = ShownFigure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        rewards = self.rewards[:, row]
        order = rewards.argsort(descending=True)
        show_samples(left, self.draws[order, row], rewards[order])
        left.set_title(f"{len(rewards)} draws, worth {float(self.ess[row]):,.1f}")
        show_rewards(right, rewards)
        value = float(self.value[row])
        right.axvline(value, color="C3", label="value")
        right.legend()
        right.set_title(f"value {value:.3g} ± {float(self.std_err[row]):.2g}")
        return figure


# -- weights ------------------------------------------------------------------------------------------


def log_mean(rewards: Tensor, log_weights: Tensor) -> Tensor:
    """V̂ = log Σ ω_i e^{r_i}: (B,)."""
    return torch.logsumexp(log_weights + rewards, 0)


def ess(weights: Tensor) -> Tensor:
    """1/Σ w_i²: (B,)."""
    return 1 / weights.square().sum(0)


def value_std_err(weights: Tensor, base: Tensor, pairs: bool = False) -> Tensor:
    """Jackknife's for a logarithm of a mean, whose θ − θ_{−i} is log(1 − ω_i) − log(1 − w_i): (B,)."""
    moves = torch.log1p(-_of_groups(base, pairs)) - torch.log1p(-_of_groups(weights, pairs))
    return _jackknife_error(moves[:, :, None])


def _jackknife_error(moves: Tensor) -> Tensor:
    """√((M−1)/M Σ ‖m_i − mean‖²) of m_i = θ − θ_{−i}, (M, B, *event) -> (B,); infinite where one draw is everything."""
    count = len(moves)
    if count == 1:
        return torch.full_like(moves.flatten(2)[0, :, 0], torch.inf)
    around = (moves - moves.mean(0)).flatten(2).square().sum((0, 2))
    return (around * ((count - 1) / count)).sqrt().nan_to_num(nan=torch.inf)


def _moves(log_weights: Tensor, y: Tensor, pairs: bool) -> Tensor:
    """What Σ w_i y_i loses with each draw, or each antithetic pair: θ − θ_{−i}, (M, B, *event)."""
    log_weights = log_weights.log_softmax(0)
    weights = log_weights.exp()
    mean, share = weighted(weights, y), _of_groups(weights, pairs)
    rest = _per_draw(1 / (1 - share), mean - _of_groups(_per_draw(weights, y), pairs))
    # next to the heaviest the others' weights may be rounding: theirs are taken anew
    group = torch.arange(len(y), device=y.device) % len(share)
    heaviest = share.argmax(0)
    others = log_weights.masked_fill(group[:, None] == heaviest, -torch.inf).softmax(0)
    is_heaviest = torch.arange(len(share), device=y.device)[:, None] == heaviest
    kept = is_heaviest.reshape(*is_heaviest.shape, *([1] * (y.ndim - 2)))
    return mean - torch.where(kept, weighted(others, y), rest)


def _of_groups(values: Tensor, pairs: bool) -> Tensor:
    """Sums over draws that are not independent: draw i and its mirror image, half the draws later."""
    if not pairs:
        return values
    half = -(-len(values) // 2)
    sums = values[:half].clone()
    sums[: len(values) - half] += values[half:]
    return sums


def jackknife(estimate: Callable[[Tensor], Tensor], log_weights: Tensor) -> Tensor:
    """N θ − (N−1) mean_i θ_{−i}, with draw i left out by a base weight of 0."""
    count = len(log_weights)
    if count < 2:
        raise InputError("the jackknife leaves one draw out: num_draws must be at least 2")
    left_out = torch.zeros_like(estimate(log_weights))
    for i in range(count):
        without = log_weights.clone()
        without[i] = -torch.inf
        left_out += estimate(without.log_softmax(0))
    return count * estimate(log_weights) - (count - 1) / count * left_out


# -- estimators ----------------------------------------------------------------------------------------


def free_shift(draws: Draws, log_weights: Tensor, correction: str = "none") -> Tensor:
    """Σ (w_i − ω_i) x_1^i, the gradient-free D* − D: (B, *event)."""

    def shift(log_base: Tensor) -> Tensor:
        moved = tilted_weights(draws.rewards, log_base) - log_base.softmax(0)
        # they sum to 0 up to rounding, which would count for x_1 itself and not for the spread of the draws
        return weighted(moved, draws.x_1) - _per_draw(moved.sum(0, keepdim=True), draws.x_1[:1])[0].to(draws.x_1.dtype)

    return _corrected(shift, log_weights, correction)


def free_shift_from(draws: Draws, log_weights: Tensor, denoise: Tensor, correction: str = "none") -> Tensor:
    """Σ w_i x_1^i − D_t(x), centred on a posterior mean that comes from elsewhere."""
    tilted = _corrected(
        lambda log_base: weighted(tilted_weights(draws.rewards, log_base), draws.x_1), log_weights, correction
    )
    return tilted - denoise


def reparameterised(draws: Draws, log_weights: Tensor, correction: str = "none") -> Tensor:
    """Σ w_i g_i, MFM-G's ∇V̂: (B, *event)."""
    gradients = draws.gradients
    assert gradients is not None
    return _corrected(
        lambda log_base: weighted(tilted_weights(draws.rewards, log_base), gradients), log_weights, correction
    )


def _corrected(estimate: Callable[[Tensor], Tensor], log_weights: Tensor, correction: str) -> Tensor:
    if correction not in CORRECTIONS:
        raise unknown("correction", correction, CORRECTIONS)
    plain = estimate(log_weights)
    if correction == "none":
        return plain
    better = jackknife(estimate, log_weights)
    # without one draw there may be nothing left to say, as when all others have reward −inf
    return torch.where(better.isfinite(), better, plain)


# -- the public estimate -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimator(Choice, ABC):
    """How ∇V is estimated from draws.

    Args:
        correction: none, or jackknife for the 1/N term of the bias.
        noise: independent, antithetic or quasi(-random).
        chunk: draws that are held at a time.
    """

    kind: ClassVar[str] = "estimator of ∇V"
    differentiates: ClassVar[bool]

    correction: str = "none"
    noise: str = "independent"
    chunk: int = 8

    def __post_init__(self) -> None:
        check_one_of("correction", self.correction, CORRECTIONS)
        check_one_of("noise", self.noise, NOISES)

    @property
    def paired(self) -> bool:
        """Are two draws at a time one independent piece?"""
        return self.noise == "antithetic"

    def options(self, num_draws: int) -> DrawOptions:
        """How the draws are made."""
        # with one draw left out, one that carries no weight may come to carry it all
        negligible = NEGLIGIBLE if self.correction == "none" else 0.0
        passes = getattr(self, "passes", 1)
        return DrawOptions(num_draws, self.differentiates, self.noise, self.chunk, passes, negligible, weighted=True)

    @abstractmethod
    def gradient(self, at: "_Estimate") -> tuple[Tensor, Tensor]:
        """∇V̂ (B, *event) and the root of its summed variances (B,)."""


@dataclass(frozen=True)
class Gradient(Estimator):
    """MFM-G (Eq. 22): Σ w_i ∇_x r(X(ε_i; t, x)).

    Args:
        passes: 2 makes weights first and differentiates only draws that carry weight.

    Examples:
        >>> model = mfm.MetaFlowMap.from_pretrained("digits")
        >>> ink, x_t = mfm.rewards.Ink(), torch.zeros(1, 1, 8, 8)
        >>> estimate = mfm.value_gradient(model, ink, 0.5, x_t, 8, mfm.Gradient(passes=2))
        >>> estimate.gradient.shape
        torch.Size([1, 1, 8, 8])
    """

    name = "gradient"
    differentiates = True

    passes: int = 1

    def gradient(self, at: "_Estimate") -> tuple[Tensor, Tensor]:
        """Σ w_i g_i."""
        gradients = at.draws.gradients
        assert gradients is not None
        error = _jackknife_error(_moves(at.log_base + at.draws.rewards, gradients, self.paired))
        return reparameterised(at.draws, at.log_base, self.correction), error


@dataclass(frozen=True)
class GradientFree(Estimator):
    """MFM-GF (Eq. 20): (β/α²)(D* − D) from reward values alone.

    Args:
        centre: D from the same ``draws``, or from the drift (``denoise``).

    Examples:
        >>> posterior = mfm.ExactPosterior(mfm.LinearPath(), mfm.GaussianMixture([[0.0, 0.0]], 1.0))
        >>> method = mfm.GradientFree(correction="jackknife")
        >>> estimate = mfm.value_gradient(posterior, lambda x: x[:, 0], 0.5, torch.zeros(3, 2), 8, method)
        >>> estimate.gradient.shape
        torch.Size([3, 2])
    """

    name = "gradient-free"
    differentiates = False

    centre: str = "draws"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("centre", self.centre, ("draws", "denoise"))

    def gradient(self, at: "_Estimate") -> tuple[Tensor, Tensor]:
        """(β/α²) Σ (w_i − ω_i) x_1^i, or with D_t(x) in place of Σ ω_i x_1^i."""
        gain, draws = _tweedie_gain(at.path, at.t, at.x_t), at.draws.x_1
        moves = _moves(at.log_base + at.draws.rewards, draws, self.paired)
        if self.centre == "draws":
            shift = free_shift(at.draws, at.log_base, self.correction)
            moves = moves - _moves(at.log_base, draws, self.paired)
        else:
            shift = free_shift_from(at.draws, at.log_base, at.denoise(), self.correction)
        return gain * shift, gain.flatten() * _jackknife_error(moves)


class _Estimate(NamedTuple):
    """What an estimator is given."""

    posterior: Any
    t: Time
    x_t: Tensor
    cond: Cond
    draws: Draws
    log_base: Tensor
    base: Tensor
    tilted: Tensor

    @property
    def path(self) -> Path:
        """The posterior's path."""
        path: Path | None = getattr(self.posterior, "path", None)
        if path is None:
            raise InputError("the gradient-free form needs the path: give the posterior an attribute path")
        return path

    def denoise(self) -> Tensor:
        """D_t(x), which the posterior knows by itself or by its drift."""
        if hasattr(self.posterior, "denoise"):
            out: Tensor = self.posterior.denoise(self.t, self.x_t, self.cond)
        elif hasattr(self.posterior, "drift") and hasattr(self.posterior, "path"):
            times = batch_time(self.t, self.x_t)
            drift = self.posterior.drift(times, self.x_t, self.cond)
            out = self.posterior.path.to_denoise(times, self.x_t, drift, "drift")
        else:
            raise InputError('centre="denoise" needs a posterior with denoise(t, x, cond); use centre="draws"')
        return out


@known_keywords
@torch.no_grad()
def value_gradient(
    posterior: Any,
    reward: Callable[..., Tensor],
    t: Time,
    x_t: Tensor,
    num_draws: int,
    method: str | Estimator = "gradient",
    generator: Source | None = None,
    cond: Cond = None,
) -> ValueEstimate:
    """V̂_t(x_t) and ∇V̂_t(x_t) from draws of a posterior.

    Args:
        posterior: anything with ``draw``; a model will do. One with weighted draws (``mfm.WeightedPosterior``) is
            weighed.
        reward: a function of x (B, *event) -> (B,), and of cond where it has a place for it.
        t: float or (B,).
        x_t: states, (B, *event).
        num_draws: N.
        method: "gradient" (MFM-G), "gradient-free" (MFM-GF), or an object with their options:
            ``Gradient(passes=2)``, ``GradientFree(centre="denoise", correction="jackknife")``.
        generator: of the draws' noise.
        cond: conditions, one row a state.

    Returns:
        The value (B,), its gradient (B, *event), the ESS (B,), standard errors, and the draws with their rewards.

    Examples:
        >>> law = mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25)
        >>> posterior = mfm.ExactPosterior(mfm.LinearPath(), law)
        >>> reward = mfm.rewards.LinearGaussian(torch.tensor([1.0, 0.0]), 2.0, 1.0)
        >>> x_t, g = torch.zeros(1, 2), torch.Generator().manual_seed(0)
        >>> estimate = mfm.value_gradient(posterior, reward, 0.5, x_t, 400, method="gradient-free", generator=g)
        >>> exact = law.value(mfm.LinearPath(), 0.5, x_t, reward)
        >>> bool((estimate.value - exact).abs() < 4 * estimate.std_err)
        True
    """
    estimator = built(Estimator, method)
    check_state(x_t, "x_t")
    check_finite(x_t, "x_t")
    check_time(t)
    looked = checked_reward(reward)
    with frozen(posterior, reward):
        draws = make_draws(posterior, looked, t, x_t, estimator.options(num_draws), generator, cond)
    log_base = draws.log_base
    base, tilted = log_base.exp(), tilted_weights(draws.rewards, log_base)
    value = _corrected(lambda log_weights: log_mean(draws.rewards, log_weights), log_base, estimator.correction)
    gradient, error = estimator.gradient(_Estimate(posterior, t, x_t, cond, draws, log_base, base, tilted))
    std_err = value_std_err(tilted, base, estimator.paired)
    if estimator.noise == "quasi":
        std_err, error = torch.full_like(std_err, torch.nan), torch.full_like(error, torch.nan)
    note = missed(posterior, looked, t, x_t, draws, std_err, cond)
    if note:
        warnings.warn(note, UserWarning, stacklevel=2)
    return ValueEstimate(value, gradient, ess(tilted), std_err, error, draws.x_1, draws.rewards)


def _per_draw(weights: Tensor, y: Tensor) -> Tensor:
    return weights.reshape(*weights.shape, *([1] * (y.ndim - 2))) * y


def _tweedie_gain(path: Path, t: Time, x_t: Tensor) -> Tensor:
    """β_t/α_t²."""
    if bool((batch_time(t, x_t) == 1).any()):
        raise InputError("at t = 1 the posterior is the state itself and ∇V = ∇r: differentiate the reward there")
    t = expand_time(t, x_t)
    return path.beta(t) / path.alpha(t) ** 2
