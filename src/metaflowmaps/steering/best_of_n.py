"""Best-of-N: N samples of the base model, keep the one of highest reward."""

from dataclasses import dataclass

from torch import Tensor

from metaflowmaps.errors import check_one_of
from metaflowmaps.steering.from_draws import best_of_copies
from metaflowmaps.steering.method import Guided, Info, Process
from metaflowmaps.steering.one_step import OfCandidates, OneStep
from metaflowmaps.steering.problem import SteeringProblem
from metaflowmaps.steering.unsteered import Unsteered


@dataclass(frozen=True)
class BestOfN(OfCandidates, Unsteered):
    """The base sampler on n rows a sample.

    Args:
        source: ode (the process, with its steps) or map (one-step samples, one call each: the cheap rival).

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> reward, method = lambda x: 2 * x[:, 0], mfm.BestOfN(n=8)
        >>> result = mfm.steer(model, reward, 64, method, mfm.ODE(steps=10), seed=0)
        >>> bool(result.samples[:, 0].mean() > 1)
        True
    """

    name = "best-of-n"
    title = "best of N"
    in_words = "Makes N samples without steering and keeps the one of highest reward."
    look = ("#e3a410", "P")

    source: str = "ode"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("source", self.source, ("ode", "map"))

    @property
    def calls_per_step(self) -> float:
        """n drifts."""
        return self.n

    def times(self, problem: SteeringProblem, process: Process) -> list[float]:
        """One step from noise to data for one-step samples."""
        return [0.0, 1.0] if self.source == "map" else super().times(problem, process)

    def step(
        self, problem: SteeringProblem, process: Process, state: Guided, t: float, u: float
    ) -> tuple[Guided, Info]:
        """A step of the base sampler, or the one step of the map."""
        if self.source == "ode":
            return super().step(problem, process, state, t, u)
        return Guided(OneStep(problem).samples(state.x), None), {}

    def finish(self, problem: SteeringProblem, state: Guided) -> tuple[Tensor, Info]:
        """Of each sample's candidates the best."""
        return best_of_copies(state.x, problem.score_of(state.x), self.n), {}
