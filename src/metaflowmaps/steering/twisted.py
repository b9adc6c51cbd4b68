r"""Twisted sequential Monte Carlo on the memoryless SDE; MFM-SMC is its instance with ψ = e^{γ V̂}.

Particles follow the bridge kernel ``p(x_u | x_t) = N(keep · x + data · D, std²)`` of the base model, proposed from
``q = N(keep · x + data · (D + shift), std²)``. With a positive twist ψ_t(x), a guess of E[e^r | x_t = x], the weights

    w ← w · (ψ_t / ψ_{t−}) ,   then   w ← w · p/q   for the move that follows

telescope: whatever the twists, the last one being e^r itself, weighted particles target ``p_base e^r`` and the product
of the mean weights is an unbiased estimate of E[e^r] under the base chain. A twist may be random and may look at the
particle's past, as long as a particle keeps its draws: e^{V̂} from any number of draws, recycled ones included, will
do.

The last move needs no density: MFM-SMC picks one of the last draws by its reward, which is a move of the base chain
(any one of the draws) reweighted by e^r, and a particle's weight for it is the mean of e^r.

**Why particles die.** e^{V̂} from few draws of a sharp reward is mostly noise early on: its log scatters by tens, the
best scored particle's children take over, and the mode they happen to be in wins (weights .99/.01/0 for .57/.37/.06 at
N = 4). Three things help, in this order: draws recycled from the last steps, which cost nothing; a twist tempered by
γ = min(1, t/temper); and resampling only when the ESS falls below ``threshold``.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import event_sum, positive
from metaflowmaps.errors import InputError, check_one_of
from metaflowmaps.steering.method import SDE, Info, Method, Process
from metaflowmaps.steering.problem import SteeringProblem
from metaflowmaps.steering.resampling import (
    RESAMPLERS,
    by_system,
    check_particles,
    effective,
    families,
    few_families,
    resample,
    rows_of_systems,
)
from metaflowmaps.steering.result import SteerResult


class Twisted(NamedTuple):
    """A twist at a batch of particles."""

    drift: Tensor
    log_twist: Tensor  # (B,)
    shift: Tensor  # of the proposal
    info: Info


class Particles(NamedTuple):
    """S systems of M particles."""

    x: Tensor
    log_weights: Tensor  # (S, M), since the last resampling
    log_twist: Tensor  # (B,)
    log_evidence: Tensor  # (S,)
    memory: Any
    founders: Tensor  # (B,) which of the first particles of its system a particle descends from


@dataclass(frozen=True)
class TwistedSMC(Method):
    """S systems of M particles side by side: row m·S + s is particle m of system s.

    Args:
        particles: M; None: all samples of a batch are one system.
        returns: all particles of a system, or one of each.
        threshold: resample where the ESS falls below this share of the particles.
        resampler: systematic, stratified, multinomial or residual.
        temper: the time at which γ reaches 1; 0 for full twists from the start.
    """

    usual = SDE
    moved_by = "sde"
    own_moves = "moves by the SDE"
    of_systems = ("log_evidence", "founders", "cloud")

    particles: int | None = None
    returns: str = "all"
    threshold: float = 0.5
    resampler: str = "systematic"
    temper: float = 0.0

    def __post_init__(self) -> None:
        check_particles(self.particles)
        check_one_of("returns", self.returns, ("all", "one"))
        check_one_of("resampler", self.resampler, RESAMPLERS)
        if positive(self.threshold, "threshold", or_zero=True) > 1:
            raise InputError(f"threshold is a fraction of the particles, in [0, 1], got {self.threshold}")
        if positive(self.temper, "temper", or_zero=True) > 1:
            raise InputError(
                f"temper is the time at which the twist reaches full strength, in [0, 1], got {self.temper}"
            )
        if self.returns == "one" and self.particles is None:
            raise InputError('returns="one" needs particles=, the size of the system that each sample comes from')

    @property
    def copies(self) -> int:
        """A whole system a sample, where one of it is returned."""
        return (self.particles or 1) if self.returns == "one" else 1

    @property
    def system(self) -> int | None:
        """The particles that are returned together."""
        return self.particles if self.returns == "all" else 1

    @property
    def row_by_row(self) -> bool:
        """Particles replace each other, unless each is alone."""
        return self.particles == 1

    # -- what distinguishes one twisted SMC from another --------------------------------------------------------------

    def remember(self, problem: SteeringProblem) -> Any:
        """A memory for one batch of particles, or None."""
        return None

    @abstractmethod
    def twist(self, problem: SteeringProblem, memory: Any, t: float, x: Tensor) -> Twisted:
        """The twist at (t, x) and the proposal's shift."""

    def select(self, memory: Any, rows: Tensor) -> None:
        """Particles were replaced by others."""

    @abstractmethod
    def last(
        self, problem: SteeringProblem, memory: Any, t: float, x: Tensor, twisted: Twisted
    ) -> tuple[Tensor, Tensor]:
        """x_1 and the log-weight e^r it stands for: (B, *event), (B,)."""

    # -- what they share ---------------------------------------------------------------------------------------------

    def start(self, problem: SteeringProblem, x: Tensor) -> Particles:
        """Particles of equal weight at noise."""
        size = self.particles or len(x)
        if len(x) % size:
            raise InputError(
                f"{len(x)} samples cannot be shared out to systems of {size} particles: ask for a multiple of it, "
                "or leave particles unset for one system of all"
            )
        check_one_condition(problem, len(x), size)
        zeros = x.new_zeros(len(x))
        grouped = by_system(zeros, size)
        founders = torch.arange(len(x), device=x.device) // grouped.shape[0]
        return Particles(x, grouped, zeros, grouped[:, 0], self.remember(problem), founders)

    def step(
        self, problem: SteeringProblem, process: Process, state: Particles, t: float, u: float
    ) -> tuple[Particles, Info]:
        """Weigh by the twist, resample where it is due, move by the guided bridge."""
        twisted = self.twist(problem, state.memory, t, state.x)
        gamma = 1.0 if self.temper == 0 else min(1.0, t / self.temper)
        log_twist = gamma * twisted.log_twist if gamma > 0 else torch.zeros_like(twisted.log_twist)
        # a twist must be positive: where the estimate is e^{−inf}, the draws have seen nothing and the last one stays
        log_twist = torch.where(log_twist == -torch.inf, state.log_twist, log_twist)
        size = state.log_weights.shape[1]
        log_weights = _dead_if_nan(state.log_weights + by_system(log_twist - state.log_twist, size))
        particle_ess = effective(log_weights)
        x, evidence, drift, shift, raw = state.x, state.log_evidence, twisted.drift, twisted.shift, twisted.log_twist
        founders = state.founders
        tired = particle_ess < self.threshold * size
        if bool(tired.any()):
            rows, log_weights, evidence = self._resample(problem, t, log_weights, evidence, tired)
            x, log_twist, drift, shift, raw = x[rows], log_twist[rows], drift[rows], shift[rows], raw[rows]
            founders = founders[rows]
            self.select(state.memory, rows)
        info = {
            **twisted.info,
            "particle_ess": particle_ess.repeat(size),
            "resampled": tired.to(x).repeat(size),
        }
        if float(problem.path.alpha(u)) == 0:
            x, more = self.last(problem, state.memory, t, x, Twisted(drift, raw, shift, {}))
            more = more - log_twist
            log_weights = _dead_if_nan(log_weights + by_system(more, size))
            return Particles(x, log_weights, log_twist, evidence, state.memory, founders), info
        bridge = problem.path.bridge(t, u)
        std, data = float(bridge.std), float(bridge.data)
        noise = problem.noise("sde", len(x))
        denoise = problem.denoise(t, x, drift)
        moved = data * shift
        x = bridge.keep.to(x) * x + bridge.data.to(x) * (denoise + shift) + std * noise
        # log p/q for x_u = m_p + moved + std ξ: −(moved/std)·ξ − ‖moved/std‖²/2
        ratio = -event_sum(moved * noise) / std - event_sum(moved.square()) / (2 * std**2)
        weighed = log_weights + by_system(ratio, size)
        return Particles(x, weighed, log_twist, evidence, state.memory, founders), info

    def finish(self, problem: SteeringProblem, state: Particles) -> tuple[Tensor, Info]:
        """Particles chosen by weight, and the log-evidence of each system."""
        size = state.log_weights.shape[1]
        log_evidence = state.log_evidence + torch.logsumexp(state.log_weights, 1) - math.log(size)
        generator = problem.stream("return")
        if self.returns == "one":
            chosen = resample("multinomial", state.log_weights, generator)[:, :1]
        else:
            chosen = resample(self.resampler, state.log_weights, generator)
        rows = rows_of_systems(chosen)
        count = families(state.founders[rows], chosen.shape[1])
        ending = {"log_evidence": log_evidence, "founders": count, "cloud": torch.full_like(count, chosen.shape[1])}
        return state.x[rows], ending

    def notes(self, info: Info) -> list[str]:
        """Whether enough families are left to decide the weights of modes."""
        return few_families(info["founders"], info["cloud"], "more draws, or mfm.Anneal()")

    def _resample(
        self, problem: SteeringProblem, t: float, log_weights: Tensor, evidence: Tensor, tired: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = log_weights.shape[1]
        ancestors = resample(self.resampler, log_weights, problem.stream("resample", t))
        itself = torch.arange(size, device=ancestors.device).expand_as(ancestors)
        ancestors = torch.where(tired[:, None], ancestors, itself)
        gained = torch.logsumexp(log_weights, 1) - math.log(size)
        # a system without any weight left goes on unweighted, for samples' sake; its evidence is zero and stays so
        evidence = torch.where(tired, evidence + gained, evidence)
        log_weights = torch.where(tired[:, None], torch.zeros_like(log_weights), log_weights)
        return rows_of_systems(ancestors), log_weights, evidence


def _dead_if_nan(log_weights: Tensor) -> Tensor:
    """A particle that is not a number any more, or never had a weight to gain from, has weight zero."""
    return torch.where(log_weights.isnan(), -torch.inf, log_weights)


def check_one_condition(problem: SteeringProblem, rows: int, size: int) -> None:
    """Particles replace each other, so a system has one condition."""
    for name, value in (problem.cond_for(rows) or {}).items():
        grouped = by_system(value, size)
        if bool((grouped != grouped[:, :1]).any()):
            raise InputError(
                f"particles of one system replace each other, so they must share cond[{name!r}]: "
                "steer one label at a time, or use returns='one'"
            )


def log_normaliser(result: SteerResult) -> float:
    """log of the mean evidence over the systems of an SMC run."""
    evidence = result.info["log_evidence"]
    return float(torch.logsumexp(evidence, 0)) - math.log(len(evidence))
