r"""The value ``V_t(x) = log E[e^{r(I_1)} | I_t = x]`` and its gradient from draws, with what they are worth.

Draws x_1^i with base weights ω_i (equal, or those of recycled draws) and tilted weights ``w_i ∝ ω_i e^{r_i}``:

    V̂ = log Σ ω_i e^{r_i}                        ESS = 1/Σ w_i²             std_err² = M/(M−1) Σ (w_i − ω_i)²

**gradient-free** (Eq. 20). Tweedie for the tilted and for the base posterior, one minus the other:
``∇V = (β_t/α_t²)(D*_t − D_t)`` with D* the mean under the tilt. Written as ``D* − D = Σ (w_i − ω_i) x_1^i`` a constant
reward gives exact zeros. With ``centre="denoise"`` D_t comes from the drift instead of the same draws.

**gradient** (Eq. 22). ``∇V̂ = Σ w_i g_i`` with ``g_i = ∇_x r(X_{0,1}(ε_i; t, x))``. Every draw has its own copy of the
context, so one backward pass gives all g_i of a chunk and only the chunk's activations are ever held: memory is flat in
the number of draws. With ``passes=2`` the weights come first, without gradients, and only draws that carry weight are
differentiated: fewer backward passes where the reward is sharp.

Standard errors are those of independent noise; with antithetic or quasi-random noise they do not apply.

Both are ratio estimators with bias O(1/N); ``correction="jackknife"`` removes the 1/N term,
``N θ − (N−1) mean_i θ_{−i}``, and pays in variance.

``D* − D`` is called the **shift**: finite at t = 0 where σ_t² is not, and what :mod:`metaflowmaps.steering` adds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import Time, batch_time, check_count, check_state, check_time, expand_time
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.path import Path
from metaflowmaps.posterior import MapPosterior
from metaflowmaps.random import RowNoise, Source
from metaflowmaps.random import noise as draw_noise
from metaflowmaps.rewards.base import Cond, is_differentiable, rows_of
from metaflowmaps.rewards.checked import checked_reward

CORRECTIONS = ("none", "jackknife")
NEGLIGIBLE = 1e-4  # of an equal share: the second pass leaves such draws out


class ValueEstimate(NamedTuple):
    """V̂ and ∇V̂ at a batch of states, and what they came from."""

    value: Tensor  # (B,)
    gradient: Tensor  # (B, *event)
    ess: Tensor  # (B,) in [1, num_draws]
    std_err: Tensor  # (B,) of the value, by the delta method; infinite with one draw
    gradient_std_err: Tensor  # (B,) root of the summed variances of the gradient's coordinates
    draws: Tensor  # (num_draws, B, *event)
    rewards: Tensor  # (num_draws, B)


class Draws(NamedTuple):
    """Draws at a batch of contexts with their rewards and, where asked for, each one's ∇_x r(X(ε_i; t, x))."""

    x_1: Tensor  # (N, B, *event)
    rewards: Tensor  # (N, B)
    gradients: Tensor | None = None  # (N, B, *event)


# -- weights -------------------------------------------------------------------------------------------


def equal_log_weights(rewards: Tensor) -> Tensor:
    """log 1/N for each draw."""
    return torch.zeros_like(rewards).log_softmax(0)


def tilted_weights(rewards: Tensor, log_weights: Tensor) -> Tensor:
    """softmax_i(log ω_i + r_i); where every draw has reward −inf nothing can be said, and the base weights stay."""
    total = log_weights + rewards
    hopeless = total.amax(0, keepdim=True) == -torch.inf
    return torch.where(hopeless, log_weights, total).softmax(0)


def log_mean(rewards: Tensor, log_weights: Tensor) -> Tensor:
    """V̂ = log Σ ω_i e^{r_i}: (B,)."""
    return torch.logsumexp(log_weights + rewards, 0)


def ess(weights: Tensor) -> Tensor:
    """1/Σ w_i²: (B,)."""
    return 1 / weights.square().sum(0)


def value_std_err(weights: Tensor, base: Tensor) -> Tensor:
    """√(M/(M−1) Σ (w_i − ω_i)²): the delta method for a logarithm of a mean."""
    count = len(weights)
    if count == 1:
        return torch.full_like(weights[0], torch.inf)
    return ((weights - base).square().sum(0) * (count / (count - 1))).sqrt()


def weighted(weights: Tensor, y: Tensor) -> Tensor:
    """Σ_i w_i y_i over (M, B) weights and (M, B, *event) values."""
    return torch.einsum("mb,mbd->bd", weights, y.flatten(2).to(weights.dtype)).reshape(y.shape[1:]).to(y.dtype)


def _spread(weights: Tensor, deviation: Tensor) -> Tensor:
    """√ Σ w_i² ‖y_i − ȳ‖²: (B,)."""
    return (weights.square() * deviation.flatten(2).square().sum(2)).sum(0).sqrt()


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
        return weighted(tilted_weights(draws.rewards, log_base) - log_base.softmax(0), draws.x_1)

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


# -- drawing -------------------------------------------------------------------------------------------


class DrawOptions(NamedTuple):
    """How draws are made: their noise, how many at a time, and in how many passes they are differentiated."""

    noise: str = "independent"
    chunk: int = 8
    passes: int = 1
    negligible: float = NEGLIGIBLE


def make_draws(
    posterior: Any,
    reward: Callable[[Tensor, Cond], Tensor],
    t: Time,
    x_t: Tensor,
    num_draws: int,
    differentiate: bool,
    generator: Source | None = None,
    cond: Cond = None,
    options: DrawOptions = DrawOptions(),
) -> Draws:
    """Draws, rewards and (with ``differentiate``) each draw's gradient in x_t, a chunk of draws at a time."""
    check_count(num_draws, "num_draws")
    if options.passes not in (1, 2):
        raise InputError(f"passes must be 1 (differentiate every draw) or 2 (weights first), got {options.passes}")
    check_count(options.chunk, "chunk")
    if differentiate:
        if not getattr(posterior, "pathwise", True):
            raise InputError(
                "draws of an exact mixture pick a component and have no gradient in x_t: use the gradient-free method "
                '("gradient-free", "mfm-gf"), or a GlassPosterior on its drift'
            )
        if not is_differentiable(reward):
            raise InputError(
                'this reward declares itself not differentiable: use method="mfm-gf" (value_gradient: "gradient-free")'
            )
    if isinstance(posterior, MetaFlowMap):
        posterior = MapPosterior(posterior)
    source = _Source(posterior, x_t, num_draws, generator, options.noise)
    draws, rewards, gradients = [], [], []
    for begin in range(0, num_draws, options.chunk):
        n = min(options.chunk, num_draws - begin)
        times, wide = batch_time(t, x_t).repeat(n), repeat_cond(cond, n)
        contexts = x_t.detach().repeat(n, *([1] * (x_t.ndim - 1)))
        first = differentiate and options.passes == 1
        x_1, r, g = _differentiated(source, reward, times, contexts, begin, n, wide) if first else _plain(
            source, reward, times, contexts, begin, n, wide
        )  # fmt: skip
        draws.append(x_1.reshape(n, *x_t.shape).to(x_t.dtype))
        rewards.append(r.reshape(n, -1))
        if g is not None:
            gradients.append(g.reshape(n, *x_t.shape))
    made = Draws(torch.cat(draws), torch.cat(rewards), torch.cat(gradients) if gradients else None)
    if differentiate and options.passes == 2:
        if rows_of(reward, x_t[:1]) is not None:  # each row has its own observation: leaving some out would shift them
            options = options._replace(negligible=0.0)
        made = made._replace(gradients=_second_pass(source, reward, t, x_t, made, cond, options))
    return made


class _Source:
    """A posterior's draws, by noise of our choosing where it has ``push`` and by its own ``draw`` otherwise.

    Its own draw takes a generator and no seeds: there a row's draws depend on the rest of the batch.
    """

    def __init__(self, posterior: Any, x_t: Tensor, num_draws: int, generator: Source | None, kind: str) -> None:
        self.posterior = posterior
        self.noise: Tensor | None = None
        if hasattr(posterior, "push"):
            self.noise = draw_noise(kind, num_draws, x_t, generator)
        elif kind != "independent":
            raise InputError(
                f"noise={kind!r} needs a posterior with push(noise, t, x_t, cond), such as mfm.MapPosterior"
            )
        else:
            self.generator = generator.generator() if isinstance(generator, RowNoise) else generator

    def __call__(self, times: Tensor, contexts: Tensor, begin: int, n: int, cond: Cond) -> Tensor:
        """n draws a context; contexts (n·B, *event) repeat the batch n times."""
        out: Tensor
        if self.noise is not None:
            out = self.posterior.push(self.noise[begin : begin + n].flatten(0, 1), times, contexts, cond)
        else:
            out = self.posterior.draw(times, contexts, 1, generator=self.generator, cond=cond)[0]
        return out

    def rows(self, keep: Tensor, times: Tensor, contexts: Tensor, cond: Cond) -> Tensor:
        """The draws with flat indices ``keep`` made again."""
        if self.noise is None:
            raise InputError("passes=2 makes draws again and needs a posterior with push(noise, t, x_t, cond)")
        out: Tensor = self.posterior.push(self.noise.flatten(0, 1)[keep], times, contexts, cond)
        return out


Made = tuple[Tensor, Tensor, Tensor | None]


def _plain(
    source: _Source, reward: Callable[..., Tensor], times: Tensor, contexts: Tensor, begin: int, n: int, cond: Cond
) -> Made:
    with torch.no_grad():
        x_1 = source(times, contexts, begin, n, cond)
        return x_1, reward(x_1, cond), None


def _differentiated(
    source: _Source, reward: Callable[..., Tensor], times: Tensor, contexts: Tensor, begin: int, n: int, cond: Cond
) -> Made:
    with torch.enable_grad():
        contexts = contexts.requires_grad_(True)
        x_1 = source(times, contexts, begin, n, cond)
        r = reward(x_1, cond)
        return x_1.detach(), r.detach(), pull_back(r, contexts, x_1)


def pull_back(r: Tensor, x: Tensor, x_1: Tensor) -> Tensor:
    """∂ Σ r/∂x; a reward or a draw without a graph is refused by name."""
    if not x_1.requires_grad:
        raise InputError('these draws have no gradient in x_t: use method="mfm-gf" (value_gradient: "gradient-free")')
    if not r.requires_grad:
        raise InputError(
            'the reward is not differentiable: write it in torch without detach(), or use method="mfm-gf" '
            '(value_gradient: "gradient-free")'
        )
    with torch.enable_grad():
        total = r.sum()
    (gradient,) = torch.autograd.grad(total, x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def _second_pass(
    source: _Source, reward: Callable[..., Tensor], t: Time, x_t: Tensor, made: Draws, cond: Cond, options: DrawOptions
) -> Tensor:
    """Gradients of the draws whose weight is more than a negligible part of an equal share."""
    weights = tilted_weights(made.rewards, equal_log_weights(made.rewards))
    keep = (weights.flatten() >= options.negligible / len(weights)).nonzero()[:, 0]
    gradients = torch.zeros_like(made.x_1).flatten(0, 1)
    batch, times = len(x_t), batch_time(t, x_t)
    for part in keep.split(options.chunk * batch):
        row = part % batch
        wide = None if cond is None else {k: v[row] for k, v in cond.items()}
        with torch.enable_grad():
            contexts = x_t.detach()[row].requires_grad_(True)
            x_1 = source.rows(part, times[row], contexts, wide)
            gradients[part] = pull_back(reward(x_1, wide), contexts, x_1)
    return gradients.reshape(made.x_1.shape)


def repeat_cond(cond: Cond, times: int) -> Cond:
    """The condition of a batch repeated ``times`` times."""
    return None if cond is None else {k: v.repeat(times) for k, v in cond.items()}


# -- the public estimate -------------------------------------------------------------------------------


@torch.no_grad()
def value_gradient(
    posterior: Any,
    reward: Callable[..., Tensor],
    t: Time,
    x_t: Tensor,
    num_draws: int,
    method: str = "gradient",
    generator: Source | None = None,
    cond: Cond = None,
    *,
    centre: str = "draws",
    correction: str = "none",
    noise: str = "independent",
    chunk: int = 8,
    passes: int = 1,
    path: Path | None = None,
) -> ValueEstimate:
    """V̂_t(x_t) and ∇V̂_t(x_t) from num_draws draws of ``posterior`` (anything with ``draw``; a model will do).

    method "gradient" (MFM-G) or "gradient-free" (MFM-GF; centre "draws" or "denoise"). ``chunk`` draws are held at a
    time; ``noise`` independent, antithetic or quasi; ``correction`` none or jackknife; ``path`` where the posterior
    does not carry one.
    """
    if method not in ("gradient", "gradient-free"):
        raise unknown("method", method, ("gradient", "gradient-free"))
    if centre not in ("draws", "denoise"):
        raise unknown("centre", centre, ("draws", "denoise"))
    if correction not in CORRECTIONS:
        raise unknown("correction", correction, CORRECTIONS)
    check_state(x_t, "x_t")
    check_time(t)
    checked = checked_reward(reward)
    # with one draw left out, one that carries no weight may come to carry it all
    options = DrawOptions(noise, chunk, passes, NEGLIGIBLE if correction == "none" else 0.0)
    draws = make_draws(posterior, checked, t, x_t, num_draws, method == "gradient", generator, cond, options)
    log_base = equal_log_weights(draws.rewards)
    base, tilted = log_base.exp(), tilted_weights(draws.rewards, log_base)
    value = _corrected(lambda log_weights: log_mean(draws.rewards, log_weights), log_base, correction)
    if method == "gradient":
        assert draws.gradients is not None
        gradient = reparameterised(draws, log_base, correction)
        error = _spread(tilted, draws.gradients - weighted(tilted, draws.gradients))
    else:
        gain = _tweedie_gain(path or getattr(posterior, "path", None), t, x_t)
        mean, tilted_mean = weighted(base, draws.x_1), weighted(tilted, draws.x_1)
        if centre == "draws":
            shift = free_shift(draws, log_base, correction)
            influence = _per_draw(tilted, draws.x_1 - tilted_mean) - _per_draw(base, draws.x_1 - mean)
        else:
            shift = free_shift_from(draws, log_base, _denoise(posterior, t, x_t, cond), correction)
            influence = _per_draw(tilted, draws.x_1 - tilted_mean)
        gradient = gain * shift
        error = gain.flatten() * _spread(torch.ones_like(tilted), influence)
    if num_draws == 1:
        error = torch.full_like(error, torch.inf)
    return ValueEstimate(
        value, gradient, ess(tilted), value_std_err(tilted, base), error, draws.x_1, draws.rewards
    )  # fmt: skip


def _per_draw(weights: Tensor, y: Tensor) -> Tensor:
    return weights.reshape(*weights.shape, *([1] * (y.ndim - 2))) * y


def _tweedie_gain(path: Path | None, t: Time, x_t: Tensor) -> Tensor:
    """β_t/α_t²."""
    if path is None:
        raise InputError("the gradient-free form needs the path: give path=, or a posterior that has one")
    if bool((batch_time(t, x_t) == 1).any()):
        raise InputError("at t = 1 the posterior is the state itself and ∇V = ∇r: differentiate the reward there")
    t = expand_time(t, x_t)
    return path.beta(t) / path.alpha(t) ** 2


def _denoise(posterior: Any, t: Time, x_t: Tensor, cond: Cond) -> Tensor:
    if hasattr(posterior, "denoise"):
        out: Tensor = posterior.denoise(t, x_t, cond)
    elif hasattr(posterior, "drift") and hasattr(posterior, "path"):
        times = batch_time(t, x_t)
        out = posterior.path.to_denoise(times, x_t, posterior.drift(times, x_t, cond), "drift")
    else:
        raise InputError('centre="denoise" needs a posterior with denoise(t, x, cond); use centre="draws"')
    return out
