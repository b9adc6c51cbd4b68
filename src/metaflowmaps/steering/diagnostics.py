r"""What a steered result can say against itself, without a known truth.

- **Collapse.** One draw carries all the weight at most steps.
- **Half of the draws.** A ratio estimate from N draws has a bias of order 1/N, so what half of the draws would have
  moved the samples differently, on average, is about the bias that is there: ``info["bias"]``, in standard deviations
  of the samples. Noise of the mean over n samples is taken off.
- **A pilot pool** of one-step samples, at most a fortieth of what the run has cost, knows what the base model holds.
  Weighed by e^r it estimates means of the tilted law and the evidence with known errors; where samples differ from it
  by more than these and by more than a little, a mode was missed or the tilt was overdone. A few samples left behind
  where e^r leaves next to nothing move no mean: they are counted. Where so few of the pool carry the weight that it
  estimates nothing, its best may still beat nearly all samples; and a method that makes no draws is unconfirmed.
- **Support.** Noised to t = .8 and denoised again, a sample that the model could have made comes back; one that
  steering has carried off does not: its squared change is held against that of the pool.

Each is one line that says what to change.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, first_cond
from metaflowmaps.cost import Meter
from metaflowmaps.errors import InputError
from metaflowmaps.random import RowNoise
from metaflowmaps.rewards.base import rows_of
from metaflowmaps.steering.method import Method, Process
from metaflowmaps.steering.one_step import OneStep
from metaflowmaps.steering.problem import Info, SteeringProblem
from metaflowmaps.steering.resampling import effective

COLLAPSED_ESS = 1.2  # one draw has it all
LARGEST_BIAS = 0.05  # standard deviations: docs/log.md, diagnostics
POOL, SMALLEST_POOL, SHARE = 1024, 64, 1 / 40
TELLING_ESS = 16  # of the pool: below it, it estimates nothing
STANDARD_ERRORS, LARGEST_SHIFT = 5.0, 0.3  # errors beyond chance, and standard deviations beyond a little
DIRECTIONS = 8
BEATEN = 0.9  # of the samples
RARE, LEFT_BEHIND = 0.1, 3  # samples expected by chance where that many are counted: three of a tenth are 1 in 6,000
RENOISED_AT, CHANGED, LARGEST_SHARE = 0.8, 3.0, 0.25


_WITH_POOL: ContextVar[bool] = ContextVar("with pilot pool", default=True)


@contextmanager
def without_pilot_pool() -> Iterator[None]:
    """No evaluations for warnings inside: where many cells are compared with a truth that is known."""
    token = _WITH_POOL.set(False)
    try:
        yield
    finally:
        _WITH_POOL.reset(token)


@dataclass(frozen=True)
class SteeredBatch:
    """What is looked at: the finished samples with all that they came from."""

    problem: SteeringProblem
    method: Method
    process: Process
    samples: Tensor
    rewards: Tensor
    info: Info
    cond: Cond


@torch.no_grad()
def checked(batch: SteeredBatch) -> tuple[str, ...]:
    """The findings; whatever goes wrong in looking for them, the samples are there and are not lost by it."""
    try:
        return tuple(findings(batch))
    except (Exception, KeyboardInterrupt) as error:
        text = " ".join(str(error).split())[:200]
        return (f"the samples are finished and were not looked at ({type(error).__name__}: {text})",)


def findings(batch: SteeredBatch) -> list[str]:
    """Lines that a user should read before trusting the samples; none on a good run."""
    found = [*_lost(batch), *batch.method.notes(batch.info), *_collapsed(batch), *_biased(batch)]
    if len(batch.samples) and bool(batch.samples.isfinite().all()):
        pool = _pool(batch)
        if pool is not None:
            found += [*_against_pool(batch, pool), *_off_support(batch, pool)]
    return found


def bias_of(moves: Tensor, samples: Tensor) -> Tensor:
    """‖mean move‖ without what chance gives a mean of n, in standard deviations of the samples; 0 within chance.

    Args:
        moves: what half of the draws would have moved each sample, (n, *event).
        samples: (n, *event).
    """
    n, flat = len(moves), moves.flatten(1).double()
    if n < 8:  # a variance of so few is none
        return torch.tensor(math.nan, dtype=torch.float64)
    noise = flat.var(0).sum() / n
    moved = flat.mean(0).square().sum()
    squared = torch.where(moved > 4 * noise, moved - noise, 0 * moved)
    return (squared / samples.flatten(1).double().var(0).sum()).sqrt()


def _lost(batch: SteeredBatch) -> Iterator[str]:
    bad = int((~batch.samples.flatten(1).isfinite().all(1)).sum())
    if bad:
        yield (
            f"{bad} of {len(batch.samples)} samples are not finite: the steering is too stiff for these steps; "
            "use more steps, renormalize='clip', or mfm.MFMGF"
        )


def _collapsed(batch: SteeredBatch) -> Iterator[str]:
    seen, base = batch.info.get("ess"), batch.info.get("base_ess")
    if seen is None or base is None or float(base.mean()) < 2:
        return
    few = seen < COLLAPSED_ESS
    if float(few.double().mean()) > 0.5:
        yield (
            f"one draw carries all the weight (ESS < {COLLAPSED_ESS}) at {int(few.sum())} of {len(seen)} steps: the "
            "reward is too sharp for these draws; use more draws, recycle=8 or more, or a smaller strength"
        )


def _biased(batch: SteeredBatch) -> Iterator[str]:
    bias = batch.info.get("bias")
    if bias is not None and float(bias) > LARGEST_BIAS:
        yield (
            f"the estimates are short of draws: half of them would move the samples by {float(bias):.2f} standard "
            f"deviations on average; use num_draws={2 * max(1, batch.method.shown_draws)} or more, or compare "
            "mfm.Rejection() and mfm.Resampling()"
        )


# -- the pilot pool -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pool:
    problem: SteeringProblem  # on a meter of its own
    samples: Tensor
    rewards: Tensor  # float64


def _pool(batch: SteeredBatch) -> _Pool | None:
    """One-step samples under the condition that all samples share; None where they share none, or are too few."""
    size = min(POOL, int(SHARE * batch.problem.meter.evaluations))
    row_by_row = rows_of(batch.problem.given_reward, batch.samples[:1]) is not None
    if not _WITH_POOL.get() or size < SMALLEST_POOL or row_by_row or not _one_condition(batch.cond):
        return None
    problem = SteeringProblem(batch.problem.model, batch.problem.given_reward, Meter())
    problem.begin(torch.zeros(1, dtype=torch.int64), None)
    rows = torch.arange(size, device=problem.device)
    noise = RowNoise(rows, "check").normal(problem.event_shape, dtype=problem.dtype)
    cond = first_cond(batch.cond, size)
    try:
        propose = OneStep(problem)
    except InputError:  # a drift alone makes no one-step samples
        return None
    samples = propose.draw(noise, cond)
    return _Pool(problem, samples, problem.reward(samples, cond).double())


def _one_condition(cond: Cond) -> bool:
    return all(bool((value == value[:1]).all()) for value in (cond or {}).values())


def _against_pool(batch: SteeredBatch, pool: _Pool) -> Iterator[str]:
    pool_ess = float(effective(pool.rewards[None])[0])
    if not batch.method.targets_law or batch.process.renormalize != "none":
        return
    yield from _left_behind(batch, pool)
    if pool_ess < TELLING_ESS:
        best = float(pool.rewards.max())
        if float((batch.rewards.double() < best).double().mean()) > BEATEN and len(batch.rewards) > 1:
            yield (
                f"the best of {len(pool.rewards)} one-step samples has reward {best:.4g}, above {BEATEN:.0%} of the "
                "steered ones: the draws have missed where the reward is high; use more draws, mfm.Rejection() or "
                "mfm.BestOfN(source='map')"
            )
        elif not _vouched(batch):
            yield (
                f"nothing here confirms these samples: {pool_ess:.1f} of {len(pool.rewards)} one-step samples carry "
                "the weight of e^r, and the method weighs no draws; hold them against mfm.Anneal(), lower the strength"
            )
        return
    yield from _evidence(batch, pool, pool_ess)
    shift, errors, what = _largest_shift(batch, pool, pool_ess)
    if errors > STANDARD_ERRORS and shift > LARGEST_SHIFT:
        yield (
            f"{len(pool.rewards)} one-step samples weighed by e^r disagree with the steered ones: {what} differs by "
            f"{shift:.2f} standard deviations ({errors:.0f} standard errors); a mode was missed or the tilt overdone: "
            "use more draws or steps, or mfm.Rejection()"
        )


def _vouched(batch: SteeredBatch) -> bool:
    """Does the method know something of its own error: by draws, which the other checks look at, or by being exact?"""
    own_pool = batch.info.get("pool_ess")
    enough = own_pool is not None and float(own_pool.min()) >= TELLING_ESS
    return batch.method.exact or enough or any(name in batch.info for name in ("ess", "proposals", "taken"))


def _left_behind(batch: SteeredBatch, pool: _Pool) -> Iterator[str]:
    """Samples where the tilted law has a tenth of one in all; the pool's low rewards tell that mass well."""
    rewards = pool.rewards.sort().values
    below = torch.cat([rewards.new_zeros(1), rewards.softmax(0).cumsum(0)])
    own = batch.rewards.double()
    # what the pool may have missed counts as one more of it at that reward
    unseen = torch.exp(own - torch.logsumexp(rewards, 0))
    mass = below[torch.searchsorted(rewards, own, right=True)] + unseen
    count = int((mass * len(own) < RARE).sum())
    if count >= LEFT_BEHIND:
        yield (
            f"{count} of {len(own)} samples were left where the reward is so low that the tilted law has {RARE:g} of "
            "them: leave them out, use more draws or steps, or mfm.Rejection()"
        )


def _largest_shift(batch: SteeredBatch, pool: _Pool, pool_ess: float) -> tuple[float, float, str]:
    """Of the reward and of the pool's principal directions, the mean that differs most, in deviations and in errors."""
    weights = pool.rewards.softmax(0)
    x, y = pool.samples.flatten(1).double(), batch.samples.flatten(1).double()
    axes = _axes(x - x.mean(0))
    finite = pool.rewards.isfinite()
    of_pool = torch.cat([pool.rewards.masked_fill(~finite, float(pool.rewards[finite].min()))[:, None], x @ axes.T], 1)
    of_steered = torch.cat([batch.rewards.double()[:, None], y @ axes.T], 1)
    mean = weights @ of_pool
    spread = (weights @ (of_pool - mean).square()).sqrt()
    least = 1e-9 * of_pool.std(0).clamp_min(torch.finfo(torch.float64).tiny)
    gap = (of_steered.mean(0) - mean).abs()
    deviations = gap / spread.clamp_min(least)
    errors = deviations / math.sqrt(1 / pool_ess + 1 / len(y))
    worst = int(torch.where(deviations > LARGEST_SHIFT, errors, 0 * errors).argmax())
    return float(deviations[worst]), float(errors[worst]), "the mean reward" if worst == 0 else "their mean"


def _axes(x: Tensor) -> Tensor:
    """The principal directions of centred rows (P, d), by the smaller of their two product matrices: (≤ 8, d)."""
    if x.shape[1] <= len(x):
        vectors: Tensor = torch.linalg.eigh(x.T @ x).eigenvectors
        return vectors.T[-DIRECTIONS:]
    vectors = torch.linalg.eigh(x @ x.T).eigenvectors
    axes = vectors.T[-DIRECTIONS:] @ x
    return torch.nn.functional.normalize(axes, dim=1)


def _evidence(batch: SteeredBatch, pool: _Pool, pool_ess: float) -> Iterator[str]:
    """An estimate of log E[e^r] against the pool's, whose relative error is √(1/ESS − 1/P)."""
    known = batch.info.get("log_evidence")
    if known is None:
        return
    own = float(torch.logsumexp(known.double(), 0)) - math.log(len(known))
    pooled = float(torch.logsumexp(pool.rewards, 0)) - math.log(len(pool.rewards))
    error = math.sqrt(max(0.0, 1 / pool_ess - 1 / len(pool.rewards)))
    if abs(own - pooled) > 4 * error + 0.1:
        yield (
            f"the evidence e^{own:.2f} of the particles is not that of {len(pool.rewards)} one-step samples, "
            f"e^{pooled:.2f} ± {error:.0%}: use more particles, or temper"
        )


def _off_support(batch: SteeredBatch, pool: _Pool) -> Iterator[str]:
    some = batch.samples[: len(pool.samples)]
    allowed = CHANGED * float(_change(pool, pool.samples, batch.cond).quantile(0.99))
    share = float((_change(pool, some, batch.cond) > allowed).double().mean())
    if share > LARGEST_SHARE:
        yield (
            f"{share:.0%} of the samples are nothing that the model would make: noised and denoised they change over "
            f"{CHANGED:g} times as much as its own; lower the strength (or a rescaled length), or use mfm.MFMGF"
        )


def _change(pool: _Pool, x: Tensor, cond: Cond) -> Tensor:
    """‖x − D_t(α ξ + β x)‖² at a late time, in float64: (rows,)."""
    problem, t = pool.problem, RENOISED_AT
    noise = RowNoise(torch.arange(len(x), device=x.device), "renoise").normal(problem.event_shape, dtype=x.dtype)
    alpha, beta = float(problem.path.alpha(t)), float(problem.path.beta(t))
    noisy = alpha * noise + beta * x
    drift = problem.metered.drift(t, noisy, first_cond(cond, len(x)))
    return (x - problem.denoise(t, noisy, drift)).flatten(1).double().square().sum(1)
