r"""MFM-Anneal: a cloud of samples of p_1 carried to p_1 e^r through p_1 e^{λr}, moved by draws of the posterior.

Noise a sample to time t and draw anew from p(x_1 | x_t): that leaves p_1 as it is, at one call of the map, because it
is Gibbs sampling of the pair (x_1, x_t). Draw N times and choose among the draws and the old sample by e^{λr}, and it
leaves **p_1 e^{λr}** as it is, for any N and any t: given x_t, all of them are draws of p(x_1 | x_t). No density, no
gradient and no small steps are needed.

Each round raises λ as far as the weights e^{Δλ r} allow, resamples, and moves every particle once. λ is paced by what
is left: Λ = ∫ √Var_λ(r) dλ is the number of standard deviations to go, read off the cloud as √Var λ log(1/λ), exact for
a quadratic reward, and the next stretch ℓ is Λ divided by seven tenths of the rounds left: λ rises until the weights'
ESS is e^{−ℓ²} of the particles, and never below ``share`` of them. How far a move looks back is learned: t rises where
too few particles take a draw.

The mean weights multiply to an unbiased estimate of E[e^r] for a given schedule; consistent as the cloud grows.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count, expand_time, positive
from metaflowmaps.draws import Draws, tilted_weights
from metaflowmaps.errors import InputError, check_one_of
from metaflowmaps.steering.from_draws import FromDraws
from metaflowmaps.steering.method import Info, Process
from metaflowmaps.steering.one_step import OneStep
from metaflowmaps.steering.problem import SteeringProblem
from metaflowmaps.steering.resampling import (
    RESAMPLERS,
    by_system,
    effective,
    families,
    few_families,
    resample,
    rows_of_systems,
)
from metaflowmaps.steering.twisted import check_one_condition

PACED = 0.7  # of the rounds raise λ; the others move at λ = 1
SMALLEST_LOSS = 0.02  # of a reweighting: less is not worth a resampling
TAKEN, GAIN = 0.5, 2.0  # the share of particles that should take a draw, and how fast t follows
FIRST_TIME, SPREAD = -0.5, 1.0  # logits of t: of the first moves, and around the learned one
LATEST = 0.999


class Cloud(NamedTuple):
    """S systems of M particles: row m·S + s is particle m of system s."""

    x: Tensor
    rewards: Tensor  # (M·S,)
    strength: Tensor  # (S,) λ
    look: Tensor  # (S,) logit of the time that moves look from
    log_evidence: Tensor  # (S,)
    founders: Tensor  # (M·S,) which of the first samples of its system a particle descends from


@dataclass(frozen=True)
class Anneal(FromDraws):
    """A cloud carried from p_1 to p_1 e^r, moved by one-step draws of the posterior; a step is a round.

    Args:
        num_draws: N, draws a move.
        n: particles for each sample that is returned.
        pool: one-step samples a particle to begin with.
        particles: samples that share a cloud; None: all of a batch.
        share: of the particles' weight that a reweighting must leave, as an ESS.
        resampler: systematic, stratified, multinomial or residual.
    """

    name = "mfm-anneal"
    title = "MFM-Anneal"
    look = ("#5a0f4b", ">")
    moved_by = "draws"
    own_moves: ClassVar[str] = "moves by draws of the posterior"

    num_draws: int = 1
    n: int = 2
    pool: int = 4
    particles: int | None = None
    share: float = 0.5
    resampler: str = "systematic"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n", "pool"):
            check_count(getattr(self, name), name)
        if self.particles is not None:
            check_count(self.particles, "particles")
        if not positive(self.share, "share") < 1:
            raise InputError(f"share is a fraction of the particles, between 0 and 1, got {self.share}")
        check_one_of("resampler", self.resampler, RESAMPLERS)

    @property
    def copies(self) -> int:
        """n particles a sample."""
        return self.n

    @property
    def system(self) -> int | None:
        """The samples that share a cloud."""
        return self.particles

    @property
    def row_by_row(self) -> bool:
        """Particles replace each other."""
        return False

    @property
    def calls_per_step(self) -> float:
        """A call and a reward a draw and particle."""
        return 2 * self.num_draws * self.n

    def times(self, problem: SteeringProblem, process: Process) -> list[float]:
        """Rounds that are done, as a share."""
        return [k / process.steps for k in range(process.steps + 1)]

    def start(self, problem: SteeringProblem, x: Tensor) -> Cloud:
        """The best of a pool of one-step samples, by weights whose ESS is ``share`` of the cloud."""
        size = self._particles_of(x)
        check_one_condition(problem, len(x), size)
        self.open_posterior(problem)
        noise = torch.cat([x, *(problem.noise("pool", len(x)) for _ in range(self.pool - 1))])
        pool = OneStep(problem).samples(noise)
        rewards = problem.score_of(pool).double()
        of_systems = by_system(rewards, self.pool * size)
        zero = torch.zeros_like(of_systems[:, 0])
        strength = next_strength(of_systems, zero, self.share / self.pool)
        founders = torch.arange(len(pool), device=pool.device) // len(zero)
        cloud = Cloud(pool, rewards, zero, zero + FIRST_TIME, zero, founders)
        return self._reweighted(problem, cloud, strength, size)

    def step(self, problem: SteeringProblem, process: Process, state: Cloud, t: float, u: float) -> tuple[Cloud, Info]:
        """Raise λ where it is below 1, then move every particle once."""
        size, left = self._particles_of(state.x), round((1 - t) * process.steps)
        if bool((state.strength < 1).any()):
            of_systems = by_system(state.rewards, size)
            kept = torch.exp(-(stretch(of_systems, state.strength) / max(1.0, PACED * left)).square())
            strength = next_strength(of_systems, state.strength, kept.clamp(self.share, 1 - SMALLEST_LOSS))
            state = self._reweighted(problem, state, strength, size)
        state, taken = self._moved(problem, state, size)
        times = torch.sigmoid(state.look)
        return state, {"strength": state.strength, "taken": taken, "look": times}

    def finish(self, problem: SteeringProblem, state: Cloud) -> tuple[Tensor, Info]:
        """Particles for the samples, reweighted by what λ lacks, and the log-evidence of each system."""
        size, missing = self._particles_of(state.x), 1 - state.strength
        log_weights = torch.where(missing[:, None] > 0, missing[:, None] * by_system(state.rewards, size), 0.0)
        chosen = resample(self.resampler, log_weights, problem.stream("return"), size // self.n)
        log_evidence = state.log_evidence + torch.logsumexp(log_weights, 1) - math.log(size)
        ending = {"log_evidence": log_evidence, "reached": state.strength, "founders": families(state.founders, size)}
        ending["cloud"] = torch.full_like(state.strength, size // self.n)
        return state.x[rows_of_systems(chosen)], ending

    def notes(self, info: Info) -> list[str]:
        """Whether λ has come to 1, and how many families are left to decide the weights of modes."""
        reached, found = float(info["reached"].min()), []
        if reached < 1:
            found.append(f"annealing came to λ = {reached:.2g} of 1 only: use more steps, more draws or particles (n)")
        return found + few_families(info["founders"], info["cloud"], "a larger n or pool")

    def _particles_of(self, x: Tensor) -> int:
        """Particles of one system, of which a batch of rows x is made."""
        return self.n * self.particles if self.particles else len(x)

    def _reweighted(self, problem: SteeringProblem, state: Cloud, strength: Tensor, size: int) -> Cloud:
        """At a larger λ: particles resampled to ``size`` a system, and what their weights say of the evidence."""
        rewards = by_system(state.rewards, len(state.rewards) // len(strength))
        log_weights = (strength - state.strength)[:, None] * rewards
        gained = torch.logsumexp(log_weights, 1) - math.log(rewards.shape[1])
        rows = rows_of_systems(resample(self.resampler, log_weights, problem.stream("resample"), size))
        return Cloud(
            state.x[rows], state.rewards[rows], strength, state.look, state.log_evidence + gained, state.founders[rows]
        )

    def _moved(self, problem: SteeringProblem, state: Cloud, size: int) -> tuple[Cloud, Tensor]:
        """One move of every particle, and the share of each system that has taken a draw."""
        rows = len(state.x)
        offset = SPREAD * (2 * problem.stream("look", rows=rows).uniform(dtype=torch.float64) - 1)
        times = torch.sigmoid(state.look.repeat(size) + offset).clamp_max(LATEST).to(state.x.dtype)
        path, noise = problem.path, problem.noise("renoise", rows)
        alpha, beta = (expand_time(f(times), state.x) for f in (path.alpha, path.beta))
        made = problem.draws(times, alpha * noise + beta * state.x, self.options())
        uniform = problem.stream("pick", rows=rows).uniform(dtype=torch.float64)
        x, rewards, taken = chosen_among(state, made, state.strength.repeat(size), uniform)
        share = by_system(taken.double(), size).mean(1)
        return state._replace(x=x, rewards=rewards, look=state.look + GAIN * (TAKEN - share)), share


def chosen_among(state: Cloud, made: Draws, strength: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each particle and its draws one, with probability ∝ e^{λr}: samples, rewards, and whether it is a draw."""
    rewards = torch.cat([state.rewards[None], made.rewards.double()])
    everything = torch.cat([state.x[None], made.x_1])
    weights = tilted_weights(strength * rewards, torch.zeros_like(rewards).log_softmax(0))
    index = (weights.cumsum(0)[:-1] <= uniform).sum(0)
    rows = torch.arange(len(uniform), device=uniform.device)
    return everything[index, rows], rewards[index, rows], index > 0


def stretch(rewards: Tensor, strength: Tensor) -> Tensor:
    """Λ from λ to 1, by the variance of the rewards (S, M) at λ: (S,)."""
    kept = rewards.isfinite()
    count = kept.sum(1).clamp_min(1)
    finite = rewards.masked_fill(~kept, 0.0)
    mean = finite.sum(1) / count
    variance = (finite - mean[:, None]).square().masked_fill(~kept, 0.0).sum(1) / count
    return -variance.sqrt() * strength * strength.log()


def next_strength(rewards: Tensor, strength: Tensor, share: Tensor | float) -> Tensor:
    """The largest λ ≤ 1 at which weights e^{(λ − now) r} leave this share of the particles that may live: (S,)."""
    least = share * (rewards > -torch.inf).sum(1)
    low, high = strength.clone(), torch.ones_like(strength)

    def leaves(at: Tensor) -> Tensor:
        return effective((at - strength)[:, None].clamp_min(1e-300) * rewards) >= least

    done = leaves(high)
    for _ in range(60):  # halvings: to a double's precision
        middle = (low + high) / 2
        enough = leaves(middle)
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(done, torch.ones_like(low), low)
