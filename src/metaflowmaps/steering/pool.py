r"""Self-normalised resampling of a pool: one-step samples, n for each that is returned, chosen by weights ∝ e^r.

Where rejection needs a bound and waits until it accepts, this takes what a fixed number of calls brings: importance
sampling from p_1, with the bias of its normaliser, O(1/pool), and repeats where few proposals carry the weight
(``pool_ess`` tells how many). Samples of one batch share their pool, which is the strong form; ``particles=1`` gives
each sample a pool of its own, n proposals of which one is chosen.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metaflowmaps.errors import InputError, check_one_of
from metaflowmaps.steering.method import Guided, Info, Process
from metaflowmaps.steering.one_step import OfCandidates, OneStep
from metaflowmaps.steering.problem import SteeringProblem
from metaflowmaps.steering.resampling import (
    RESAMPLERS,
    by_system,
    check_particles,
    effective,
    resample,
    rows_of_systems,
)
from metaflowmaps.steering.twisted import check_one_condition


@dataclass(frozen=True)
class Resampling(OfCandidates):
    """One-step samples chosen by e^r: the cheap rival that needs neither a bound nor a gradient.

    Args:
        particles: samples that share a pool; None: all of a batch.
        resampler: systematic, stratified, multinomial or residual.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> reward, method = lambda x: 2 * x[:, 0], mfm.Resampling(n=16)
        >>> result = mfm.steer(model, reward, 64, method, mfm.ODE(steps=10), seed=0)
        >>> bool(result.samples[:, 0].mean() > 1)
        True
    """

    name = "resampling"
    title = "resampling"
    in_words = "Makes many samples in one call each and picks among them by reward."
    look = ("#88ccff", "<")
    moved_by = "one step"
    own_moves = "makes its samples in one step"
    of_systems = ("log_evidence", "pool_ess")

    particles: int | None = None
    resampler: str = "systematic"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_particles(self.particles)
        check_one_of("resampler", self.resampler, RESAMPLERS)

    @property
    def system(self) -> int | None:
        """The samples that share a pool."""
        return self.particles

    @property
    def row_by_row(self) -> bool:
        """Samples of one pool replace each other, unless each has its own."""
        return self.particles == 1

    @property
    def calls_per_step(self) -> float:
        """A call and a reward a proposal; there is one step."""
        return 2 * self.n

    def times(self, problem: SteeringProblem, process: Process) -> list[float]:
        """One step from noise to data."""
        return [0.0, 1.0]

    def start(self, problem: SteeringProblem, x: Tensor) -> Guided:
        """The proposals' noise."""
        size = self._pool_size(x)
        if len(x) % size:
            raise InputError(f"{len(x) // self.n} samples cannot be shared out to pools of {self.particles} samples")
        check_one_condition(problem, len(x), size)
        return Guided(x, None)

    def step(
        self, problem: SteeringProblem, process: Process, state: Guided, t: float, u: float
    ) -> tuple[Guided, Info]:
        """The one step of the map."""
        return Guided(OneStep(problem).samples(state.x), None), {}

    def finish(self, problem: SteeringProblem, state: Guided) -> tuple[Tensor, Info]:
        """Samples chosen by weight, and the log of the mean of e^r of each pool."""
        size = self._pool_size(state.x)
        log_weights = by_system(problem.score_of(state.x).double(), size)
        chosen = resample(self.resampler, log_weights, problem.stream("return"), size // self.n)
        log_evidence = torch.logsumexp(log_weights, 1) - math.log(size)
        return state.x[rows_of_systems(chosen)], {"log_evidence": log_evidence, "pool_ess": effective(log_weights)}

    def _pool_size(self, x: Tensor) -> int:
        """Proposals of one pool."""
        return self.n * self.particles if self.particles else len(x)
