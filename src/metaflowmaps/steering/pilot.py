r"""What a pilot says of a reward before anybody pays for steering: how rare it is, what draws see of it, its gradient.

- **A pool** of P one-step samples with weights e^r. Where its effective size is 32 or more, log E[e^r] is the log of
  their mean ŵ, with the relative error s = √(1/ESS − 1/P). The interval is ŵ e^{−3s} to ŵ e^{3s} + 4.6/P e^{bound}:
  what P samples have not met may still have log(100)/P of the law, and no more in 99 of 100 pools.
- **A cloud**, where the pool has no such size: a short run of :class:`Anneal`. Particles descend from F of its first
  samples in effect, and log Ẑ has a standard error of about 1/√F. It also lags behind λ, which makes Ẑ too small. As
  log E[e^{λr}] is convex, a stretch of λ gains between Δλ E_λ[r] and Δλ E_{λ+Δλ}[r], both read off the cloud: the room
  between is added, twice above. A cloud of fewer than four families knows no error of its own: all that is certain then
  is the pool's upper end, and the interval says "below".
- **Draws along the path**: at states noised from samples of the tilted law, where steering will be, the effective
  number of N draws of the posterior. A state's own sample is a draw of its tilted posterior, so Σ e^{r_i − r} over N
  draws is about N where they see what it has seen, and next to nothing where they miss it: the smaller of both counts.

Acceptance is E[e^{r − bound}] with the largest reward of pool and cloud as the bound.
"""

import math
import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, select_cond
from metaflowmaps.cost import Meter
from metaflowmaps.draws import DrawOptions
from metaflowmaps.errors import InputError
from metaflowmaps.random import fresh_seeds, stream
from metaflowmaps.rewards.base import rows_of
from metaflowmaps.steering.anneal import Anneal
from metaflowmaps.steering.diagnostics import without_pilot_pool
from metaflowmaps.steering.one_step import OneStep
from metaflowmaps.steering.problem import SteeringProblem, device_of
from metaflowmaps.steering.process import ODE
from metaflowmaps.steering.resampling import effective, resample
from metaflowmaps.steering.steer import Step, steer

TELLING_ESS = 32.0  # of the pool: below it a cloud is asked
ERRORS = 3.0  # standard errors of an interval: skewed weights included, 99 of 100 pools are inside
UNMET = math.log(100)  # of P samples: a set of that share of the law is missed by one pool in 100
FAMILIES = 4.0  # of a cloud: below it, its spread is unknown
BELOW, ABOVE, LAGS = 4.0, 5.0, 2.0  # of a cloud's interval: 1/√F down and up, and the convex room above
PARTICLES_SHARE, MOVES, ROUNDS = 4, 2, 24  # the cloud has a quarter of the pool as particles
TIMES, MIDDLE, STATES, DRAWS = (0.1, 0.3, 0.5, 0.7, 0.9), 0.5, 16, (4, 16)
SAME = 1e-6  # spread of a reward, relative to its size, that is none


@dataclass(frozen=True)
class Estimate:
    """A logarithm with the interval that holds it in at least 95 of 100 pilots; low = −inf: it is only known below."""

    value: float
    low: float
    high: float

    def plus(self, shift: float) -> "Estimate":
        """The same of a product."""
        return Estimate(self.value + shift, self.low + shift, self.high + shift)


@dataclass(frozen=True)
class Pilot:
    """What was measured.

    Args:
        samples: one-step samples of the pool.
        particles: of the annealed cloud; 0: the pool was enough.
        bound: the largest reward that was met.
        log_evidence: log E[e^r].
        pool_ess: effective size of the pool's weights e^r.
        constant: whether all rewards of the pool are the same.
        draws_ess: by time, by N, the effective number of N posterior draws at states of the tilted law.
        gradient: usable, or why it is not.
        pathwise: whether draws of the model can be differentiated.
        one_law: whether all samples share their condition and the reward treats them alike.
        evaluations: of network and reward, in total.
        seconds: that it took.
        seconds_each: of one evaluation.
    """

    samples: int
    particles: int
    bound: float
    log_evidence: Estimate
    pool_ess: float
    constant: bool
    draws_ess: dict[float, dict[int, float]]
    gradient: str
    pathwise: bool
    one_law: bool
    evaluations: int
    seconds: float
    seconds_each: float

    @property
    def acceptance(self) -> Estimate:
        """log E[e^{r − bound}]."""
        return self.log_evidence.plus(-self.bound)

    @property
    def share(self) -> float:
        """ESS of one-step samples, a sample: the pool's, or where it tells nothing the acceptance, which is less."""
        if not self.particles:
            return self.pool_ess / self.samples
        known = math.isfinite(self.acceptance.low)
        return math.exp(min(self.acceptance.value, 0.0 if known else -math.log(self.samples)))

    def seen(self, num_draws: int) -> float:
        """Effective draws in the middle of the path, where modes are chosen."""
        return self.draws_ess[MIDDLE][num_draws]


def pilot_evaluations(samples: int) -> tuple[int, int]:
    """What a pilot costs, network and reward: without a cloud, and that of a cloud."""
    own = 2 * samples + 2 * STATES * len(TIMES) * max(DRAWS) + 2 * STATES
    return own, _particles(samples) * 2 * (Anneal().pool + MOVES * ROUNDS)


def _particles(samples: int) -> int:
    return max(STATES, samples // PARTICLES_SHARE)


def run_pilot(model: Any, reward: Any, samples: int, cond: Cond, seed: int) -> Pilot:
    """Measure a reward on a model; where one-step samples cannot be had that is one line."""
    if not hasattr(model, "draw"):
        raise InputError(
            "advice is made from one-step samples and the model has no draw(t, x_t, num_draws, ...): with the drift "
            "alone steer by mfm.Glass(), or distil a map of it (mfm train)"
        )
    return _Pilot(model, reward, samples, cond, seed).run()


class _Pilot:
    """One pilot, on a meter of its own."""

    def __init__(self, model: Any, reward: Any, samples: int, cond: Cond, seed: int) -> None:
        self.model, self.reward, self.seed = model, reward, seed
        self.problem = SteeringProblem(model, reward, Meter(device=device_of(model)))
        like = torch.zeros(1, *self.problem.event_shape, dtype=self.problem.dtype, device=self.problem.device)
        observed = rows_of(reward, like)
        self.size = samples if observed is None else -(-samples // observed) * observed
        self.states = STATES if observed is None else observed
        given = cond or {}
        self.one_law = observed is None and all(bool((v == v[:1]).all()) for v in given.values())
        self.cond = {name: value[torch.arange(self.size) % len(value)] for name, value in given.items()} or None

    def run(self) -> Pilot:
        """The pool, a cloud where it is needed, draws along the path and the gradient."""
        meter = self.problem.meter
        with meter, torch.no_grad():
            x, rewards = self.pool()
            met = float(rewards.max())
        each = meter.seconds / meter.evaluations
        pool_ess = float(effective(rewards[None])[0])
        cloud = self.cloud() if pool_ess < TELLING_ESS and self.one_law else None
        bound = met if cloud is None else max(met, float(cloud.rewards.max()))
        of_pool = from_pool(rewards, pool_ess, bound)
        with meter:
            ess = self.along(*self.tilted(x, rewards) if cloud is None else (cloud.x, cloud.rewards))
            gradient = self.gradient(x[: self.states], rewards[: self.states])
        spent = (meter.evaluations, meter.seconds) if cloud is None else (
            meter.evaluations + cloud.evaluations, meter.seconds + cloud.seconds
        )  # fmt: skip
        finite = rewards[rewards.isfinite()]
        return Pilot(
            samples=self.size,
            particles=0 if cloud is None else len(cloud.x),
            bound=bound,
            log_evidence=of_pool if cloud is None else cloud.estimate(of_pool.high),
            pool_ess=pool_ess,
            constant=len(finite) == len(rewards) and float(finite.std()) <= SAME * max(1.0, float(finite.abs().max())),
            draws_ess=ess,
            gradient=gradient,
            pathwise=self.problem.metered.pathwise,
            one_law=self.one_law,
            evaluations=spent[0],
            seconds=spent[1],
            seconds_each=each,
        )

    def begin(self, rows: int, purpose: str) -> None:
        """Noise and conditions of so many rows."""
        self.problem.begin(fresh_seeds(rows, stream(self.seed, "pilot", purpose)), select_cond(self.cond, slice(rows)))

    def pool(self) -> tuple[Tensor, Tensor]:
        """One-step samples and their rewards, (P,) float64."""
        self.begin(self.size, "pool")
        x = OneStep(self.problem).samples(self.problem.noise("start", self.size))
        rewards = self.problem.score_of(x).double()
        if bool((rewards == -torch.inf).all()):
            raise InputError(
                f"the reward is −inf for all {self.size} one-step samples: nothing tells where it is not; give one "
                "that falls off gradually"
            )
        return x, rewards

    def cloud(self) -> "Cloud":
        """A short annealed run."""
        particles, cloud = _particles(self.size), Cloud()
        with without_pilot_pool(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = steer(
                self.model, self.reward, particles, Anneal(num_draws=MOVES, n=1), ODE(steps=ROUNDS),
                cond=select_cond(self.cond, slice(particles)), seed=self.seed, batch_size=4 * particles,
                callback=cloud.see,
            )  # fmt: skip
        if result.interrupted:
            raise KeyboardInterrupt
        cloud.x, cloud.rewards, info = result.samples, result.rewards.double(), result.info
        cloud.log_evidence, cloud.families = float(info["log_evidence"][0]), float(info["founders"][0])
        cloud.seconds = result.cost["seconds"]
        cloud.evaluations = round(result.cost["nfe"] * particles)
        return cloud

    def tilted(self, x: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Of the pool, samples by weight; each as it is where conditions or observations are their own."""
        if not self.one_law:
            return x, rewards
        chosen = resample("systematic", rewards[None], stream(self.seed, "pilot", "tilted"), self.states)[0]
        return x[chosen.to(x.device)], rewards[chosen]

    @torch.no_grad()
    def along(self, x: Tensor, rewards: Tensor) -> dict[float, dict[int, float]]:
        """The effective number of draws at noised samples of the tilted law."""
        self.begin(self.states, "states")
        self.problem.open_posterior(None)
        x, rewards = x[: self.states].to(self.problem.dtype), rewards[: self.states]
        found = {}
        for t in TIMES:
            noise = self.problem.noise("renoise", len(x))
            x_t = self.problem.path.interpolate(noise, x, t)
            made = self.problem.draws(t, x_t, DrawOptions(max(DRAWS)))
            found[t] = {n: draws_ess(made.rewards[:n].double(), rewards) for n in DRAWS}
        return found

    def gradient(self, x: Tensor, rewards: Tensor) -> str:
        """Whether ∇r is finite and not zero where r is finite."""
        if not self.problem.reward.differentiable:
            return "declared not differentiable"
        self.begin(len(x), "states")
        x = x.detach().clone().requires_grad_(True)
        with torch.enable_grad():
            try:
                r = self.problem.score_of(x)
            except InputError:  # a function that leaves torch
                return "not written in torch"
            if not r.requires_grad:
                return "not written in torch"
            (slope,) = torch.autograd.grad(r[r.isfinite()].sum(), x, allow_unused=True)
        if slope is None:
            return "none"
        slope = slope[rewards.isfinite()].flatten(1)
        if not bool(slope.isfinite().all()):
            return "not finite at some samples"
        return "usable" if bool((slope != 0).any()) else "zero at all samples"


class Cloud:
    """An annealed run, with what was seen of it: λ, E_λ[r] and log Ẑ after each round."""

    x: Tensor
    rewards: Tensor
    log_evidence: float
    families: float
    evaluations: int
    seconds: float

    def __init__(self) -> None:
        self.course: list[tuple[float, float, float]] = []

    def see(self, step: Step) -> None:
        """A callback of ``steer``."""
        state = step.state
        weights = state.log_weights[0].exp()
        mean = weights @ state.rewards.masked_fill(weights == 0, 0.0)  # the forbidden have no weight and no mean
        self.course.append((float(state.strength[0]), float(mean), float(state.log_evidence[0])))

    def estimate(self, highest: float) -> Estimate:
        """log Ẑ and its interval, of which the upper end is at most what the pool allows."""
        value = min(self.log_evidence, highest)
        if self.families < FAMILIES or self.course[-1][0] < 1:
            return Estimate(value, -math.inf, highest)
        less, more = convex_room(self.course)
        error = 1 / math.sqrt(self.families)
        return Estimate(value, value - BELOW * error - less, min(highest, value + ABOVE * error + LAGS * more))


def convex_room(course: list[tuple[float, float, float]]) -> tuple[float, float]:
    """How far Σ Δλ E_λ[r] is below what was gained from the first round on, and Σ Δλ E_{λ+Δλ}[r] above it."""
    steps = list(pairwise(course))
    gained = course[-1][2] - course[0][2]
    left = sum((after[0] - before[0]) * before[1] for before, after in steps)
    right = sum((after[0] - before[0]) * after[1] for before, after in steps)
    return max(0.0, gained - left), max(0.0, right - gained)


def from_pool(rewards: Tensor, pool_ess: float, bound: float) -> Estimate:
    """log of the mean of e^r over a pool, with its interval."""
    size = len(rewards)
    value = float(torch.logsumexp(rewards, 0)) - math.log(size)
    error = math.sqrt(max(0.0, 1 / pool_ess - 1 / size))
    unmet = bound + math.log(UNMET / size) if size > UNMET else bound
    high = min(bound, float(torch.logaddexp(torch.tensor(value + ERRORS * error), torch.tensor(unmet))))
    low = value - ERRORS * error if pool_ess >= TELLING_ESS else -math.inf
    return Estimate(value, low, max(high, value))


def draws_ess(of_draws: Tensor, of_states: Tensor) -> float:
    """Effective number of draws (N, S) of states whose own samples have rewards (S,): the mean over states."""
    own = effective(of_draws.T)
    own = torch.where(of_draws.amax(0) == -torch.inf, torch.zeros_like(own), own)
    seen = torch.exp(torch.logsumexp(of_draws, 0) - of_states.to(of_draws))
    return float(torch.minimum(own, seen).mean())
