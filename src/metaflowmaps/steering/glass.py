"""GLASS in place of the map: draws from the drift alone, ``glass_steps`` calls each, then MFM-GF or MFM-G."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from torch import Tensor

from metaflowmaps._shapes import check_count
from metaflowmaps.errors import InputError
from metaflowmaps.posterior import GlassPosterior
from metaflowmaps.steering.from_draws import FromDraws
from metaflowmaps.steering.method import Guidance, GuidedMethod, Method, Process
from metaflowmaps.steering.mfm_gf import MFMGF
from metaflowmaps.steering.problem import SteeringProblem
from metaflowmaps.work.choices import Pick


@dataclass(frozen=True)
class Glass(GuidedMethod):
    """The estimator of another method, on draws of the GLASS ODE.

    Args:
        num_draws: N, draws a step and state.
        glass_steps: of the inner ODE.
        glass_integrator: of the inner ODE: euler, midpoint, heun, rk4.
        data_std: spread of the data, which spaces the inner steps (:class:`metaflowmaps.GlassPosterior`); None: equal.
        estimator: the method whose estimate is used, with its options; its own num_draws does not count.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> reward, method = lambda x: 2 * x[:, 0], mfm.Glass(num_draws=2, glass_steps=4)
        >>> result = mfm.steer(model, reward, 64, method, mfm.ODE(steps=10), seed=0)
        >>> bool(result.samples[:, 0].mean() > 1)
        True
    """

    name = "glass"
    title = "GLASS"
    in_words = "MFM-GF or MFM-G with draws of the flow itself, tens of network calls each, in place of the map's."
    look = ("#d84a10", "h")
    draws = True

    num_draws: int = 4
    glass_steps: int = 30
    glass_integrator: str = "euler"
    data_std: float | None = 1.0
    estimator: Annotated[Method, Pick(Method)] = field(default_factory=MFMGF)

    def __post_init__(self) -> None:
        check_count(self.num_draws, "num_draws")
        if not (isinstance(self.estimator, GuidedMethod) and isinstance(self.estimator, FromDraws)):
            raise InputError("the estimator of GLASS is a guided method that draws, such as MFMGF() or MFMG()")

    @property
    def calls_per_step(self) -> float:
        """The drift; the inner steps and a reward a draw."""
        return 1 + self.num_draws * (1 + 2 * self.glass_steps)

    def check(self, process: Process) -> None:
        """What the estimator refuses."""
        super().check(process)
        self.estimator.check(process)

    def remember(self, problem: SteeringProblem) -> tuple[Any, Any]:
        """The estimator on GLASS draws, and its memory."""
        estimator: Any = replace(self.estimator, num_draws=self.num_draws, posterior=self._posterior)  # type: ignore[type-var]
        return estimator, estimator.remember(problem)

    def _posterior(self, model: Any) -> GlassPosterior:
        return GlassPosterior(model.path, model.drift, self.glass_steps, self.glass_integrator, self.data_std)

    def guide(self, problem: SteeringProblem, memory: tuple[Any, Any], t: float, x: Tensor) -> Guidance:
        """What the estimator says."""
        estimator, own = memory
        guidance: Guidance = estimator.guide(problem, own, t, x)
        return guidance
