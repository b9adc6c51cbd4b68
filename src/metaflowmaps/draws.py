r"""Draws from a posterior with their rewards, their weights and, where asked for, their gradients.

Draws x_1^i at a context (t, x) with base weights ω_i (equal, or those of recycled draws) have tilted weights ``w_i ∝
ω_i e^{r_i}``. ``g_i = ∇_x r(X_{0,1}(ε_i; t, x))`` is the gradient of a draw's reward in its context. Every draw has its
own copy of the context, so one backward pass gives all g_i of a chunk and only the chunk's activations are ever held:
memory is flat in the number of draws. With ``passes=2`` the weights come first, without gradients, and only draws that
carry weight are differentiated: fewer backward passes where the reward is sharp.
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


class DrawOptions(NamedTuple):
    """How many draws are made and how: their noise, how many at a time, and how they are differentiated."""

    num_draws: int
    differentiate: bool = False
    noise: str = "independent"  # or antithetic, quasi
    chunk: int = 8  # draws of every context that are held at a time
    passes: int = 1  # 2: weights first, then the gradients of those that carry weight
    negligible: float = NEGLIGIBLE


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
        Draws (N, B, *event), rewards (N, B) and, with ``options.differentiate``, gradients in x_t (N, B, *event).
    """
    _check_options(options)
    if options.differentiate:
        _check_differentiable(posterior, reward)
    if isinstance(posterior, MetaFlowMap):
        posterior = MapPosterior(posterior)
    return _Drawing(posterior, reward, t, x_t, options, generator, cond).made()


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
        self.noise: Tensor | None = None
        if hasattr(posterior, "push"):
            self.noise = draw_noise(options.noise, options.num_draws, x_t, generator)
        elif options.noise != "independent":
            raise InputError(
                f"noise={options.noise!r} needs a posterior with push(noise, t, x_t, cond), such as mfm.MapPosterior"
            )
        else:
            self.generator = generator.generator() if isinstance(generator, RowNoise) else generator

    def made(self) -> Draws:
        """All draws, chunk by chunk."""
        n, shape = self.options.num_draws, self.x_t.shape
        first = self.options.differentiate and self.options.passes == 1
        parts = [
            self.chunk(begin, min(begin + self.options.chunk, n), first) for begin in range(0, n, self.options.chunk)
        ]
        draws = Draws(
            torch.cat([part.x_1 for part in parts]).reshape(n, *shape).to(self.x_t.dtype),
            torch.cat([part.rewards for part in parts]).reshape(n, -1),
            torch.cat([part.gradients for part in parts if part.gradients is not None]).reshape(n, *shape)
            if first
            else None,
        )
        if self.options.differentiate and self.options.passes == 2:
            draws = draws._replace(gradients=self.second_pass(draws))
        return draws

    def chunk(self, begin: int, end: int, differentiate: bool) -> Draws:
        """Draws ``begin`` to ``end − 1`` of every context, as rows: (n · B, …)."""
        n = end - begin
        contexts, cond = repeat_rows(self.x_t, n), repeat_cond(self.cond, n)
        with torch.set_grad_enabled(differentiate):
            contexts = contexts.requires_grad_(differentiate)
            times = self.times.repeat(n)
            x_1: Tensor = (
                self.posterior.push(self.noise[begin:end].flatten(0, 1), times, contexts, cond)
                if self.noise is not None
                else self.posterior.draw(times, contexts, 1, generator=self.generator, cond=cond)[0]
            )
            r = self.reward(x_1, cond)
        gradients = reward_gradient(r, contexts, x_1) if differentiate else None
        return Draws(x_1.detach(), r.detach(), gradients)

    def second_pass(self, made: Draws) -> Tensor:
        """Gradients of the draws whose weight is more than a negligible part of an equal share."""
        if self.noise is None:
            raise InputError("passes=2 makes draws again and needs a posterior with push(noise, t, x_t, cond)")
        # where each row has its own observation, leaving some out would shift them
        least = 0.0 if rows_of(self.reward, self.x_t[:1]) is not None else self.options.negligible
        weights = tilted_weights(made.rewards, equal_log_weights(made.rewards))
        keep = (weights.flatten() >= least / len(weights)).nonzero()[:, 0]
        gradients = torch.zeros_like(made.x_1).flatten(0, 1)
        batch = len(self.x_t)
        for part in keep.split(self.options.chunk * batch):
            row = part % batch
            cond = select_cond(self.cond, row)
            with torch.enable_grad():
                contexts = self.x_t[row].requires_grad_(True)
                x_1 = self.posterior.push(self.noise.flatten(0, 1)[part], self.times[row], contexts, cond)
                gradients[part] = reward_gradient(self.reward(x_1, cond), contexts, x_1)
        return gradients.reshape(made.x_1.shape)


def pull_back(r: Tensor, x: Tensor, x_1: Tensor) -> Tensor:
    """∂ Σ r/∂x; a reward or a draw without a graph is refused by name."""
    if not x_1.requires_grad:
        raise InputError("these draws have no gradient in x_t: use mfm.MFMGF (--method mfm-gf, or GradientFree())")
    if not r.requires_grad:
        raise InputError(
            "the reward is not differentiable: write it in torch without detach(), or use mfm.MFMGF (--method mfm-gf, "
            "or GradientFree())"
        )
    with torch.enable_grad():
        total = r.sum()
    (gradient,) = torch.autograd.grad(total, x, allow_unused=True)
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


def _check_differentiable(posterior: Any, reward: Any) -> None:
    if not getattr(posterior, "pathwise", True):
        raise InputError(
            "draws of an exact mixture pick a component and have no gradient in x_t: use the gradient-free method "
            "(mfm.MFMGF, --method mfm-gf, GradientFree()), or a GlassPosterior on its drift"
        )
    check_differentiable(reward)
