r"""What draws at (t, x) have not seen: a mode that is rare under the posterior and everything under its tilt.

Nothing computed from the draws tells: their ESS and their standard errors are those of the modes that they are in. A
pool of one-step samples, draws at t = 0, knows all modes of the data. With the kernel ``K(x_1) = N(x; β_t x_1, α_t²)``
N draws are from ``p_1 K/Z`` and P of the pool from p_1, and all together from a mixture of the two, with one unknown:

    ω_n ∝ K(x_n)/(P + N c K(x_n)),      c with  Σ_n N c K(x_n)/(P + N c K(x_n)) = N

the balance heuristic of :mod:`metaflowmaps.steering.recycling` for two contexts. Where V̂ by these weights is above
that of the draws by more than chance, they have missed something. Where hardly any of the pool reach the posterior (a
late time, a high dimension), c is not known and nothing is said.
"""

import math
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, Time, batch_time, event_sum, expand_time, first_cond
from metaflowmaps.draws import Draws
from metaflowmaps.path import Path
from metaflowmaps.random import stream
from metaflowmaps.rewards.base import rows_of

LARGEST_POOL, SMALLEST_POOL, SHARE = 1024, 64, 1 / 8  # of the draws at all states together
REACHING = 4.0  # of the pool, that belong to the posterior
STANDARD_ERRORS, LARGEST_SHARE = 3.0, 0.05  # of a state, and of the states
BISECTIONS = 50
MOST_STATES = 256  # looked at, evenly over the batch


def missed(posterior: Any, reward: Any, t: Time, x_t: Tensor, draws: Draws, std_err: Tensor, cond: Cond) -> str:
    """One line where draws have missed what a pool of one-step samples knows of; empty on a good estimate.

    Args:
        posterior: what the draws are from, with its path.
        reward: ``(x, cond) -> (B,)``.
        t: float or (B,).
        x_t: contexts, (B, *event).
        draws: with their rewards, (N, B, *event) and (N, B).
        std_err: of V̂, (B,).
        cond: conditions of the contexts; where they differ no pool is theirs.
    """
    size = min(LARGEST_POOL, int(SHARE * draws.rewards.numel()))
    path: Path | None = getattr(posterior, "path", None)
    shared = all(bool((value == value[:1]).all()) for value in (cond or {}).values())
    if draws.log_weights is not None:  # the balance heuristic here counts draws that are one each
        return ""
    if path is None or size < SMALLEST_POOL or not shared or rows_of(reward, x_t[:1]) is not None:
        return ""
    some = torch.arange(0, len(x_t), -(-len(x_t) // MOST_STATES), device=x_t.device)
    seen = Draws(draws.x_1[:, some], draws.rewards[:, some])
    try:
        pool = _pool(posterior, reward, x_t[:MOST_STATES], size, cond)
    except Exception as error:  # a posterior of one's own may not know t = 0: the estimate stands
        text = " ".join(str(error).split())[:200]
        return f"whether the draws missed a mode was not looked at ({type(error).__name__}: {text})"
    gap, noise, reaching = _gap(path, batch_time(t, x_t)[some], x_t[some], seen, pool)
    bound = STANDARD_ERRORS * torch.hypot(std_err[some].double().nan_to_num(), noise)
    found = (gap > bound) & (reaching >= REACHING)
    if float(found.double().mean()) <= LARGEST_SHARE:
        return ""
    worst = float(torch.where(found, gap, 0 * gap).max())
    return (
        f"the draws have missed a mode at {int(found.sum())} of {len(found)} states: with {size} one-step samples, "
        f"weighed for these states, the value is up to {worst:.2f} higher; gradient and standard errors are those of "
        "the modes that were seen: use many more draws, or an earlier time"
    )


def _pool(posterior: Any, reward: Any, x_t: Tensor, size: int, cond: Cond) -> Draws:
    """Draws at t = 0 of noise of their own, with rewards, as many at a time as there are states: (size, 1, *event)."""
    generator, made = stream(0, "unseen"), []
    for part in torch.arange(size).split(max(len(x_t), 8)):
        context = x_t.new_zeros(len(part), *x_t.shape[1:])
        own = first_cond(cond, len(part))
        x_1 = posterior.draw(context.new_zeros(len(part)), context, 1, generator=generator, cond=own)[0]
        made.append((x_1, reward(x_1, own)))
    return Draws(*(torch.cat(parts)[:, None] for parts in zip(*made, strict=True)))


def _gap(path: Path, t: Time, x_t: Tensor, draws: Draws, pool: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """V̂ with the pool less V̂ without, its error, and how many of the pool belong to the posterior: (B,) each."""
    size, count = len(pool.x_1), len(draws.x_1)
    x_1 = torch.cat([draws.x_1, pool.x_1.expand(-1, *draws.x_1.shape[1:])])
    rewards = torch.cat([draws.rewards, pool.rewards.expand(-1, draws.rewards.shape[1])]).double()
    alpha, beta = path.alpha(expand_time(t, x_t)), path.beta(expand_time(t, x_t))
    apart = ((x_t - beta * x_1) / alpha).flatten(0, 1)
    log_kernel = (event_sum(apart.double().square()) / -2).reshape(rewards.shape)
    share = _share(log_kernel - log_kernel.amax(0), count, size)  # N c K/(P + N c K) of each
    log_weights = share.log().log_softmax(0)  # ω is proportional to it
    total = log_weights + rewards
    alone = torch.logsumexp(rewards[:count], 0) - math.log(count)
    return torch.logsumexp(total, 0) - alone, total.softmax(0).square().sum(0).sqrt(), share[count:].sum(0)


def _share(log_kernel: Tensor, count: int, size: int) -> Tensor:
    """N c K/(P + N c K) with the c that makes their sum N, by bisection of log(c N/P), which it grows with."""
    low = torch.full_like(log_kernel[0], -50.0)
    high = -log_kernel.amin(0) + 50
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        many = torch.sigmoid(log_kernel + middle).sum(0) > count
        low, high = torch.where(many, low, middle), torch.where(many, middle, high)
    return torch.sigmoid(log_kernel + (low + high) / 2)
