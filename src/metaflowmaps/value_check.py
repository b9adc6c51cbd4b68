"""``mfm.value_gradient``: the estimate, and a warning where samples of the model contradict it.

Draws that have never seen a mode agree with each other: their standard errors say nothing of it. One-step samples of
the data law do: weighed by the kernel N(x_t; β x_1, α²) they are draws of the same posterior, and those of a rare mode
that e^r favours are among them as often as the mode is in the data. Where their V̂ differs from that of the draws by
more than both errors, one of the two has missed something.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, Time, batch_time, expand_time, select_cond
from metaflowmaps.draws import DrawOptions, make_draws
from metaflowmaps.random import Source, stream
from metaflowmaps.rewards.base import rows_of
from metaflowmaps.rewards.checked import checked_reward
from metaflowmaps.value import Estimator, ValueEstimate, ess, log_mean, value_std_err
from metaflowmaps.value import value_gradient as estimated
from metaflowmaps.work.memory import frozen

SHARE, SMALLEST, LARGEST = 1 / 8, 256, 2048  # samples: of the draws that were asked for, at least, at most
STATES = 8  # that are looked at
TELLING_ESS = 16.0  # of the samples at a state, else they know less than the draws
STANDARD_ERRORS, LEAST_GAP = 5.0, 0.5


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
    """V̂_t(x_t) and ∇V̂_t(x_t) from draws of a posterior; warns where samples of the model contradict many draws.

    Args:
        posterior: anything with ``draw``; a model will do.
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
    """
    estimate = estimated(posterior, reward, t, x_t, num_draws, method, generator, cond)
    size = min(LARGEST, int(SHARE * estimate.rewards.numel()))
    if size >= SMALLEST and hasattr(posterior, "path") and rows_of(reward, x_t[:1]) is None:
        rows = slice(0, STATES)
        times = batch_time(t, x_t)[rows]
        note = missed(posterior, reward, times, x_t[rows].detach(), estimate, select_cond(cond, rows), size)
        if note:
            warnings.warn(note, UserWarning, stacklevel=2)
    return estimate


@torch.no_grad()
def missed(
    posterior: Any,
    reward: Callable[..., Tensor],
    t: Tensor,
    x_t: Tensor,
    estimate: ValueEstimate,
    cond: Cond,
    size: int,
) -> str:
    """What samples under the states' conditions say against an estimate; nothing where they agree or cannot tell.

    Args:
        posterior: what the draws came from; at t = 0 it draws samples of the data law.
        reward: as given.
        t: (S,) times of the states that are looked at.
        x_t: (S, *event), the first states of the estimate.
        estimate: of at least these states.
        cond: of these states.
        size: samples for all of them together.
    """
    states, path = len(x_t), posterior.path
    each = max(1, size // states)
    options, noise = DrawOptions(each, chunk=64), stream(0, "value check")
    with frozen(posterior, reward):
        made = make_draws(posterior, checked_reward(reward), 0.0, torch.zeros_like(x_t), options, noise, cond)
    if bool((made.x_1 == made.x_1[:1]).all()):
        return ""  # a point estimate, which no sample contradicts
    if cond is None:  # then all samples serve every state
        samples, rewards = (y.flatten(0, 1)[:, None] for y in (made.x_1, made.rewards))
    else:
        samples, rewards = made.x_1, made.rewards
    alpha, beta = (expand_time(f(t.to(x_t)), x_t) for f in (path.alpha, path.beta))
    away = ((x_t - beta * samples) / alpha.clamp_min(1e-12)).flatten(2).double().square().sum(2)
    base = (-away / 2).log_softmax(0)
    rewards = rewards.double().expand_as(base)
    tilted = (base + rewards).softmax(0)
    gap = log_mean(rewards, base) - estimate.value[:states].double()
    known = estimate.std_err[:states].double().nan_to_num(math.inf, math.inf)
    error = (value_std_err(tilted, base.exp()).square() + known.square()).sqrt()
    against = (ess(base.exp()) >= TELLING_ESS) & (gap.abs() > STANDARD_ERRORS * error) & (gap.abs() > LEAST_GAP)
    if not bool(against.any()):
        return ""
    worst = int((gap.abs() * against).argmax())
    theirs, ours = float(estimate.value[worst] + gap[worst]), float(estimate.value[worst])
    return (
        f"{len(base)} samples of the model put V at {theirs:.3g} where the draws have {ours:.3g} ± "
        f"{float(known[worst]):.2g} ({int(against.sum())} of {states} states): the draws have missed a mode that the "
        "reward favours, or the posterior is not the model's; use more draws, or hold it against mfm.Resampling()"
    )
