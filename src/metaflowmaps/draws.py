r"""Draws from a posterior with their rewards, their weights and, where asked for, their gradients.

Draws x_1^i at a context (t, x) with base weights ω_i (equal, or those of recycled draws) have tilted weights ``w_i ∝
ω_i e^{r_i}``. ``g_i = ∇_x r(X_{0,1}(ε_i; t, x))`` is the gradient of a draw's reward in its context. Every draw has its
own copy of the context, so one backward pass gives all g_i of a chunk and only the chunk's activations are ever held:
memory is flat in the number of draws. With ``passes=2`` the weights come first, without gradients, and only draws that
carry weight are differentiated: fewer backward passes where the reward is sharp.

A **weighted posterior** has ``push_weighted(noise, t, x_t, cond) -> (x_1, ℓ)``: draws of a proposal with the logarithms
of their weights, which depend on the context too. Then ω_i ∝ e^{ℓ_i} and V̂ = log Σ e^{ℓ_i + r_i} − log Σ e^{ℓ_i} has

    ∇_x V̂ = Σ w_i g_i,      g_i = ∇_x (r_i + ℓ_i) − Σ_j ω_j ∇_x ℓ_j

so whoever weighs g_i by w_i need not know where they come from. Where weights are not asked for
(``DrawOptions.weighted``) such a posterior is drawn from by its ``draw``, which resamples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, Time, batch_time, check_count, repeat_cond, repeat_rows, select_cond
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.posterior import MapPosterior
from metaflowmaps.random import RowNoise, Source
from metaflowmaps.random import noise as draw_noise
from metaflowmaps.rewards.base import check_differentiable, rows_of

NEGLIGIBLE = 1e-4  # of an equal share: the second pass leaves such draws out
RewardCall = Callable[[Tensor, Cond], Tensor]


class Draws(NamedTuple):
    """Draws at a batch of contexts with their rewards and, where asked for, each one's ∇_x r(X(ε_i; t, x))."""

    x_1: Tensor  # (N, B, *event)
    rewards: Tensor  # (N, B)
    gradients: Tensor | None = None  # (N, B, *event)
    log_weights: Tensor | None = None  # (N, B), up to a constant of the context; None: equal

    @property
    def log_base(self) -> Tensor:
        """log ω of each draw, normalised: (N, B)."""
        return equal_log_weights(self.rewards) if self.log_weights is None else self.log_weights.log_softmax(0)


class DrawOptions(NamedTuple):
    """How many draws are made and how: their noise, how many at a time, and how they are differentiated."""

    num_draws: int
    differentiate: bool = False
    noise: str = "independent"  # or antithetic, quasi
    chunk: int = 8  # draws of every context that are held at a time
    passes: int = 1  # 2: weights first, then the gradients of those that carry weight
    negligible: float = NEGLIGIBLE
    weighted: bool = False  # whether they may come with weights


# -- weights -------------------------------------------------------------------------------------------


def equal_log_weights(rewards: Tensor) -> Tensor:
    """log 1/N for each draw: (N, B)."""
    return torch.zeros_like(rewards).log_softmax(0)


def tilted_weights(rewards: Tensor, log_weights: Tensor) -> Tensor:
    """softmax_i(log ω_i + r_i); where every draw has reward −inf nothing can be said, and the base weights stay."""
    total = log_weights + rewards
    hopeless = total.amax(0, keepdim=True) == -torch.inf
    return torch.where(hopeless, log_weights, total).softmax(0)


def weighted(weights: Tensor, y: Tensor) -> Tensor:
    """Σ_i w_i y_i over (N, B) weights and (N, B, *event) values: (B, *event)."""
    return torch.einsum("mb,mbd->bd", weights, y.flatten(2).to(weights.dtype)).reshape(y.shape[1:]).to(y.dtype)


# -- drawing -------------------------------------------------------------------------------------------


def make_draws(
    posterior: Any,
    reward: RewardCall,
    t: Time,
    x_t: Tensor,
    options: DrawOptions,
    generator: Source | None = None,
    cond: Cond = None,
) -> Draws:
    """Draws of ``posterior`` at (t, x_t) with their rewards, a chunk of draws at a time.

    Args:
        posterior: anything with ``draw``, or with ``push(noise, t, x_t, cond)``; a MetaFlowMap will do.
        reward: ``(x, cond) -> (B,)``.
        t: float or (B,).
        x_t: contexts, (B, *event).
        options: how many, and how.
        generator: a generator, or a stream a row.
        cond: conditions of the contexts.

    Returns:
        Draws (N, B, *event), rewards (N, B), with ``options.differentiate`` gradients in x_t (N, B, *event), and of a
        weighted posterior, with ``options.weighted``, log-weights (N, B).
    """
    _check_options(options)
    if options.differentiate:
        _check_differentiable(posterior, reward, options.weighted)
    if isinstance(posterior, MetaFlowMap):
        posterior = MapPosterior(posterior)
    return _Drawing(posterior, reward, t, x_t, options, generator, cond).made()


class _Rows(NamedTuple):
    """Draws as rows (n · B, …): of a weighted posterior with ℓ and, where they are differentiated, ∇ℓ."""

    x_1: Tensor
    rewards: Tensor
    log_weights: Tensor | None
    gradients: Tensor | None
    slopes: Tensor | None


class _Drawing:
    """One call of :func:`make_draws`.

    Draws are made by noise of our choosing where the posterior has ``push`` and by its own ``draw`` otherwise: that
    takes a generator and no seeds, so a row's draws depend on the rest of the batch.
    """

    def __init__(
        self, posterior: Any, reward: RewardCall, t: Time, x_t: Tensor, options: DrawOptions, generator: Any, cond: Cond
    ) -> None:
        self.posterior, self.reward, self.options, self.cond = posterior, reward, options, cond
        self.x_t, self.times = x_t.detach(), batch_time(t, x_t)
        self.weighted = options.weighted and hasattr(posterior, "push_weighted")
        self.noise: Tensor | None = None
        if self.weighted or hasattr(posterior, "push"):
            self.noise = draw_noise(options.noise, options.num_draws, x_t, generator)
        elif options.noise != "independent":
            raise InputError(
                f"noise={options.noise!r} needs a posterior with push(noise, t, x_t, cond), such as mfm.MapPosterior"
            )
        else:
            self.generator = generator.generator() if isinstance(generator, RowNoise) else generator

    def made(self) -> Draws:
        """All draws, chunk by chunk."""
        n, options = self.options.num_draws, self.options
        first = options.differentiate and options.passes == 1
        parts = [self.chunk(begin, min(begin + options.chunk, n), first) for begin in range(0, n, options.chunk)]
        x_1, rewards, log_weights, gradients, slopes = (self._whole(column) for column in zip(*parts, strict=True))
        assert x_1 is not None
        assert rewards is not None
        draws = Draws(x_1.to(self.x_t.dtype), rewards, gradients, log_weights)
        if slopes is not None:
            draws = draws._replace(gradients=_centred(draws, slopes))
        if options.differentiate and options.passes == 2:
            draws = draws._replace(gradients=self.second_pass(draws))
        return draws

    def _whole(self, parts: tuple[Tensor | None, ...]) -> Tensor | None:
        """Rows of all chunks, by draw and context: (N, B, …)."""
        rows = [part for part in parts if part is not None]
        return torch.cat(rows).reshape(self.options.num_draws, len(self.x_t), *rows[0].shape[1:]) if rows else None

    def chunk(self, begin: int, end: int, differentiate: bool) -> _Rows:
        """Draws ``begin`` to ``end − 1`` of every context."""
        n, noise = end - begin, None if self.noise is None else self.noise[begin:end].flatten(0, 1)
        contexts, cond = repeat_rows(self.x_t, n), repeat_cond(self.cond, n)
        return self.rows(noise, self.times.repeat(n), contexts, cond, differentiate)

    def rows(self, noise: Tensor | None, times: Tensor, contexts: Tensor, cond: Cond, differentiate: bool) -> _Rows:
        """A draw for each row of contexts, which are copies of their own."""
        log_weights: Tensor | None = None
        with torch.set_grad_enabled(differentiate):
            contexts = contexts.requires_grad_(differentiate)
            if self.weighted:
                x_1, log_weights = self.posterior.push_weighted(noise, times, contexts, cond)
            elif noise is not None:
                x_1 = self.posterior.push(noise, times, contexts, cond)
            else:
                x_1 = self.posterior.draw(times, contexts, 1, generator=self.generator, cond=cond)[0]
            r = self.reward(x_1, cond)
            weighed = r if log_weights is None else r + log_weights
        gradients, slopes = None, None
        if differentiate:
            slopes = None if log_weights is None else pull_back(log_weights, contexts, x_1, again=True)
            gradients = reward_gradient(weighed, contexts, x_1)
        weights = None if log_weights is None else log_weights.detach()
        return _Rows(x_1.detach(), r.detach(), weights, gradients, slopes)

    def second_pass(self, made: Draws) -> Tensor:
        """Gradients of the draws whose weight is more than a negligible part of an equal share."""
        if self.noise is None:
            raise InputError("passes=2 makes draws again and needs a posterior with push(noise, t, x_t, cond)")
        # where each row has its own observation, leaving some out would shift them
        least = 0.0 if rows_of(self.reward, self.x_t[:1]) is not None else self.options.negligible
        log_base = made.log_base
        weights = tilted_weights(made.rewards, log_base)
        if self.weighted:  # a draw counts by either
            weights = torch.maximum(weights, log_base.exp())
        keep = (weights.flatten() >= least / len(weights)).nonzero()[:, 0]
        gradients, slopes = (torch.zeros_like(made.x_1).flatten(0, 1) for _ in range(2))
        for part in keep.split(self.options.chunk * len(self.x_t)):
            row = part % len(self.x_t)
            rows = self.rows(
                self.noise.flatten(0, 1)[part], self.times[row], self.x_t[row], select_cond(self.cond, row), True
            )
            if rows.gradients is not None:
                gradients[part] = rows.gradients
            if rows.slopes is not None:
                slopes[part] = rows.slopes
        gradients, slopes = gradients.reshape(made.x_1.shape), slopes.reshape(made.x_1.shape)
        return _centred(made._replace(gradients=gradients), slopes) if self.weighted else gradients


def _centred(draws: Draws, slopes: Tensor) -> Tensor:
    """∇(r + ℓ) less the mean of ∇ℓ under the base weights: (N, B, *event)."""
    assert draws.gradients is not None
    return draws.gradients - weighted(draws.log_base.exp(), slopes)


def pull_back(r: Tensor, x: Tensor, x_1: Tensor, again: bool = False) -> Tensor:
    """∂ Σ r/∂x; a reward or a draw without a graph is refused by name. ``again``: the graph is needed once more."""
    if not x_1.requires_grad:
        raise InputError("these draws have no gradient in x_t: use mfm.MFMGF (--method mfm-gf, or GradientFree())")
    if not r.requires_grad:
        raise InputError(
            "the reward is not differentiable: write it in torch without detach(), or use mfm.MFMGF (--method mfm-gf, "
            "or GradientFree())"
        )
    with torch.enable_grad():
        total = r.sum()
    (gradient,) = torch.autograd.grad(total, x, allow_unused=True, retain_graph=again)
    return torch.zeros_like(x) if gradient is None else gradient


def reward_gradient(r: Tensor, x: Tensor, x_1: Tensor) -> Tensor:
    """∂ Σ r/∂x, (rows, *event): zero where the reward is −inf, and refused where it is not finite at a finite draw."""
    gradient = pull_back(r, x, x_1)
    with torch.no_grad():
        forbidden = (r == -torch.inf).reshape(-1, *([1] * (gradient.ndim - 1)))
        gradient = gradient.masked_fill(forbidden, 0.0)
        bad = ~gradient.flatten(1).isfinite().all(1) & x_1.flatten(1).isfinite().all(1) & r.isfinite()
    if bool(bad.any()):
        raise InputError(
            f"the gradient of the reward is not finite at {int(bad.sum())} of {len(bad)} finite draws (a root or a "
            "norm at 0?): add a small number inside, or use mfm.MFMGF (--method mfm-gf), which needs no gradient"
        )
    return gradient


def _check_options(options: DrawOptions) -> None:
    check_count(options.num_draws, "num_draws")
    check_count(options.chunk, "chunk")
    if options.passes not in (1, 2):
        raise InputError(f"passes must be 1 (differentiate every draw) or 2 (weights first), got {options.passes}")


def _check_differentiable(posterior: Any, reward: Any, weighted: bool) -> None:
    if not getattr(posterior, "pathwise", True) and not (weighted and hasattr(posterior, "push_weighted")):
        raise InputError(
            "draws of an exact mixture pick a component and have no gradient in x_t: use the gradient-free method "
            "(mfm.MFMGF, --method mfm-gf, GradientFree()), or a GlassPosterior on its drift"
        )
    check_differentiable(reward)
