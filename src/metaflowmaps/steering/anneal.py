r"""MFM-Anneal: a cloud of samples of p_1 carried to p_1 e^r through p_1 e^{λr}, moved by draws of the posterior.

Noise a sample to time t and draw anew from p(x_1 | x_t): that leaves p_1 as it is, at one call of the map, because it
is Gibbs sampling of the pair (x_1, x_t). Draw N times and weigh the draws and the old sample by e^{λr}, and it leaves
**p_1 e^{λr}** as it is, for any N and any t: given x_t, all of them are draws of p(x_1 | x_t). No density, no gradient
and no small steps are needed.

**Leaning.** Far out in p_1 such draws fall back towards its middle. But e^{g·x_1} tilts a posterior by moving its
context, p(x_1 | x_t) e^{g·x_1} ∝ p(x_1 | x_t + (α²/β) g), so draws are made where λr leans to, g being λ times the
slope of r along the cloud's last moves, and weighed by e^{λr − g·x_1}, the old sample too. Any g that does not look at
the particle itself will do; that of a cloud does by one part in its size.

Each round raises λ as far as the weights e^{Δλ r} allow, resamples from all that the last moves brought, and moves
every particle once. λ is paced by what is left: Λ = ∫ √Var_λ(r) dλ is the number of standard deviations to go, read
off the cloud as √Var λ log(1/λ), exact for a quadratic reward, and the next stretch ℓ is Λ divided by nine tenths of
the rounds left: λ rises until the weights' ESS is e^{−ℓ²} of the particles, and never below ``share`` of them. How far
a move looks back is learned: t rises where too few particles take a draw.

The mean weights multiply to an unbiased estimate of E[e^r] for a given schedule; consistent as the cloud grows.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count, expand_time, positive
from metaflowmaps.draws import tilted_weights
from metaflowmaps.errors import InputError
from metaflowmaps.steering.from_draws import FromDraws
from metaflowmaps.steering.method import Info, Process
from metaflowmaps.steering.one_step import OneStep
from metaflowmaps.steering.problem import SteeringProblem
from metaflowmaps.steering.resampling import (
    by_system,
    check_particles,
    families,
    few_families,
    resample,
    rows_of_systems,
)
from metaflowmaps.steering.twisted import check_one_condition
from metaflowmaps.tempering import SMALLEST_LOSS, next_strength, stretch

PACED = 0.9  # of the rounds raise λ; the others move at λ = 1
TAKEN, GAIN = 0.5, 2.0  # the share of particles that should take a draw, and how fast t follows
FIRST_LOOK, EARLIEST_LOOK, SPREAD = -0.5, -2.0, 1.0  # logits of t: of the first moves, at least, and around it
LATEST = 0.999
LONGEST_LEAN = 1.0  # of the noise in a context, whose norm is α √d


class Cloud(NamedTuple):
    """S systems of M weighted samples: row m·S + s is sample m of system s."""

    x: Tensor
    rewards: Tensor  # (M·S,)
    log_weights: Tensor  # (S, M), of p_1 e^{λr}; their sum is 1
    strength: Tensor  # (S,) λ
    look: Tensor  # (S,) logit of the time that moves look from
    slope: Tensor  # (S, *event) of r along the last moves
    log_evidence: Tensor  # (S,)
    founders: Tensor  # (M·S,) which of the first samples of its system a sample descends from
    size: int  # particles a system, which M samples are resampled to


@dataclass(frozen=True)
class Anneal(FromDraws):
    """A cloud carried from p_1 to p_1 e^r, moved by one-step draws of the posterior; a step is a round.

    Args:
        num_draws: N, draws a move.
        n: particles for each sample that is returned.
        pool: one-step samples a particle to begin with.
        particles: samples that share a cloud; None: all of a batch.
        share: of the particles' weight that a reweighting must leave, as an ESS.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> reward, method = lambda x: 2 * x[:, 0], mfm.Anneal(num_draws=1)
        >>> result = mfm.steer(model, reward, 64, method, mfm.ODE(steps=10), seed=0)
        >>> bool(result.samples[:, 0].mean() > 1)
        True
    """

    name = "mfm-anneal"
    title = "MFM-Anneal"
    in_words = (
        "A cloud of samples, each noised and drawn anew, round by round, while the reward comes to count in full."
    )
    look = ("#5a0f4b", ">")
    moved_by = "draws"
    own_moves: ClassVar[str] = "moves by draws of the posterior"
    of_systems: ClassVar[tuple[str, ...]] = ("log_evidence", "reached", "founders", "cloud")

    num_draws: int = 1
    n: int = 2
    pool: int = 4
    particles: int | None = None
    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n", "pool"):
            check_count(getattr(self, name), name)
        check_particles(self.particles)
        if not positive(self.share, "share") < 1:
            raise InputError(f"share is a fraction of the particles, between 0 and 1, got {self.share}")

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
        size = self.n * self.particles if self.particles else len(x)
        check_one_condition(problem, len(x), size)
        self.open_posterior(problem)
        noise = torch.cat([x, *(problem.noise("pool", len(x)) for _ in range(self.pool - 1))])
        pool = OneStep(problem).samples(noise)
        rewards = problem.score_of(pool).double()
        systems = len(x) // size
        equal = rewards.new_full((systems, self.pool * size), -math.log(self.pool * size))
        zero, slope = equal.new_zeros(systems), x.new_zeros(systems, *x.shape[1:])
        founders = torch.arange(len(pool), device=pool.device) // systems
        cloud = Cloud(pool, rewards, equal, zero, zero + FIRST_LOOK, slope, zero, founders, size)
        strength = next_strength(by_system(rewards, self.pool * size), equal, zero, self.share / self.pool)
        return self._resampled(problem, cloud, strength, size)

    def step(self, problem: SteeringProblem, process: Process, state: Cloud, t: float, u: float) -> tuple[Cloud, Info]:
        """Raise λ where it is below 1, resample, then move every particle once."""
        size, left = state.size, round((1 - t) * process.steps)
        strength = state.strength
        if bool((strength < 1).any()):
            rewards = by_system(state.rewards, state.log_weights.shape[1])
            to_go = stretch(rewards, state.log_weights, strength)
            kept = torch.exp(-(to_go / max(1.0, PACED * left)).square()).clamp(self.share, 1 - SMALLEST_LOSS)
            strength = next_strength(rewards, state.log_weights, strength, kept)
        state, taken = self._moved(problem, self._resampled(problem, state, strength, size))
        return state, {"strength": state.strength, "taken": taken, "look": torch.sigmoid(state.look)}

    def finish(self, problem: SteeringProblem, state: Cloud) -> tuple[Tensor, Info]:
        """Particles for the samples, reweighted by what λ lacks, and the log-evidence of each system."""
        reached, count = state.strength, state.size // self.n
        state = self._resampled(problem, state, torch.ones_like(reached), count)
        ending = {"log_evidence": state.log_evidence, "reached": reached, "founders": families(state.founders, count)}
        return state.x, {**ending, "cloud": torch.full_like(reached, count)}

    def notes(self, info: Info) -> list[str]:
        """Whether λ has come to 1, and how many families are left to decide the weights of modes."""
        reached, found = float(info["reached"].min()), []
        if reached < 1:
            found.append(f"annealing came to λ = {reached:.2g} of 1 only: use more steps, more draws or particles (n)")
        return found + few_families(info["founders"], info["cloud"], "a larger n or pool")

    def _resampled(self, problem: SteeringProblem, state: Cloud, strength: Tensor, size: int) -> Cloud:
        """``size`` samples of equal weight a system, at a larger λ, and what the weights say of the evidence."""
        missing = (strength - state.strength)[:, None]
        raised = torch.where(missing > 0, missing * by_system(state.rewards, state.log_weights.shape[1]), 0.0)
        log_weights = state.log_weights + raised
        rows = rows_of_systems(resample("stratified", log_weights, problem.stream("resample"), size))
        return state._replace(
            x=state.x[rows],
            rewards=state.rewards[rows],
            log_weights=log_weights.new_full((len(strength), size), -math.log(size)),
            strength=strength,
            log_evidence=state.log_evidence + torch.logsumexp(log_weights, 1),
            founders=state.founders[rows],
        )

    def _moved(self, problem: SteeringProblem, state: Cloud) -> tuple[Cloud, Tensor]:
        """One move of every particle: it and its draws, weighed; and the share of weight that the draws have."""
        rows, systems, size = len(state.x), len(state.strength), state.size
        offset = SPREAD * (2 * problem.stream("look", rows=rows).uniform(dtype=torch.float64) - 1)
        times = torch.sigmoid(state.look.repeat(size) + offset).clamp_max(LATEST).to(state.x.dtype)
        path, noise = problem.path, problem.noise("renoise", rows)
        alpha, beta = (expand_time(f(times), state.x) for f in (path.alpha, path.beta))
        slope = lean(alpha, beta, expand_time(state.strength.to(state.slope), state.slope) * state.slope, size)
        made = problem.draws(times, alpha * noise + beta * state.x + alpha.square() / beta * slope, self.options())
        x, rewards = torch.cat([state.x[None], made.x_1]), torch.cat([state.rewards[None], made.rewards.double()])
        shares = shares_of(x, rewards, state.strength.repeat(size), slope)
        taken = by_system(1 - shares[0], size).mean(1)
        weights = by_system(beside(shares, systems), len(x) * size)
        moved = state._replace(
            x=beside(x, systems),
            rewards=beside(rewards, systems),
            log_weights=(weights / size).log(),
            look=(state.look + GAIN * (TAKEN - taken)).clamp_min(EARLIEST_LOOK),
            slope=slope_of(x, rewards, shares, systems),
            founders=beside(state.founders.expand(len(x), -1), systems),
        )
        return moved, taken


def lean(alpha: Tensor, beta: Tensor, slope: Tensor, size: int) -> Tensor:
    """λ times the slopes (S, *event) for ``size`` particles each, where they move a context too far shortened."""
    slopes = slope.repeat(size, *[1] * (slope.ndim - 1))
    longest = LONGEST_LEAN * math.sqrt(slope[0].numel()) * beta / alpha
    norm = expand_time(slopes.flatten(1).norm(dim=1), slopes)
    return slopes * (longest / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)


def shares_of(x: Tensor, rewards: Tensor, strength: Tensor, slope: Tensor) -> Tensor:
    """Weights ∝ e^{λr − g·x} of a particle and its draws, (N + 1, M·S, *event): (N + 1, M·S)."""
    leaned = (x * slope).flatten(2).sum(2).double()
    return tilted_weights(strength * rewards - leaned, torch.zeros_like(rewards).log_softmax(0))


def slope_of(x: Tensor, rewards: Tensor, shares: Tensor, systems: int) -> Tensor:
    """Of r along moves: the regression of its differences on the direction that x and r vary in together.

    Args:
        x: a particle and its draws, (N + 1, M·S, *event).
        rewards: (N + 1, M·S).
        shares: their weights, (N + 1, M·S); differences are taken to the weighted mean of a particle and its draws.
        systems: S.
    """
    weights, flat = shares.double(), x.flatten(2).double()
    values = rewards.masked_fill(weights == 0, 0.0)
    of_x = (flat - (weights[..., None] * flat).sum(0)).reshape(-1, systems, flat.shape[2])
    of_r = (values - (weights * values).sum(0)).reshape(-1, systems)
    weights = weights.reshape(-1, systems)
    together = torch.einsum("ms,ms,msd->sd", weights, of_r, of_x)
    along = torch.einsum("msd,sd->ms", of_x, together)
    spread = (weights * along.square()).sum(0)
    rate = torch.where(spread > 0, (weights * along * of_r).sum(0) / spread.clamp_min(1e-300), 0.0)
    return (rate[:, None] * together).reshape(systems, *x.shape[2:]).to(x.dtype)


def beside(values: Tensor, systems: int) -> Tensor:
    """A particle's and its draws' beside each other: (N + 1, M·S, …), rows m·S + s, -> rows (m (N + 1) + i)·S + s.

    Stratified resampling then takes from each particle's, in proportion to their weight and one apart from the other;
    systematic would take the same place of everyone's.
    """
    copies, rows, *event = values.shape
    return values.reshape(copies, rows // systems, systems, *event).transpose(0, 1).flatten(0, 2)
