"""GLASS in place of the map: draws from the drift alone, ``glass_steps`` calls each, then MFM-GF or MFM-G."""

from typing import Any

from torch import Tensor

from metaflowmaps.errors import unknown
from metaflowmaps.posterior import GlassPosterior
from metaflowmaps.steering.mfm_g import GradientGuide
from metaflowmaps.steering.mfm_gf import GradientFreeGuide
from metaflowmaps.steering.problem import Info, Problem
from metaflowmaps.steering.recycling import DrawPool

ESTIMATORS = ("mfm-gf", "mfm-g")


class GlassGuide:
    """The estimator of another method, on draws of the GLASS ODE."""

    def __init__(
        self,
        num_draws: int,
        glass_steps: int = 30,
        glass_integrator: str = "euler",
        data_std: float | None = None,
        estimator: str = "mfm-gf",
        **options: Any,
    ) -> None:
        if estimator not in ESTIMATORS:
            raise unknown("estimator", estimator, ESTIMATORS)
        self.glass = (glass_steps, glass_integrator, data_std)
        self.estimator = (GradientFreeGuide if estimator == "mfm-gf" else GradientGuide)(num_draws, **options)

    def start(self, problem: Problem) -> DrawPool:
        problem.posterior = GlassPosterior(problem.path, _Drift(problem), *self.glass)  # type: ignore[assignment]
        return self.estimator.start(problem)

    def guide(self, problem: Problem, memory: DrawPool, t: float, x: Tensor) -> tuple[Tensor, Tensor, Info]:
        return self.estimator.guide(problem, memory, t, x)


class _Drift:
    """The problem's drift in the form GLASS calls it."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __call__(self, t: Any, x: Tensor, cond: Any = None) -> Tensor:
        return self.problem.drift_under(t, x, cond)
