"""MFM-GF: the shift from reward values alone, at draws of this step and, recycled, of the last few."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from metaflowmaps._shapes import check_count
from metaflowmaps.errors import InputError, check_one_of
from metaflowmaps.steering.from_draws import FromDraws, draw_info, halved_shift
from metaflowmaps.steering.method import Guidance, GuidedMethod, Process
from metaflowmaps.steering.problem import SteeringProblem
from metaflowmaps.steering.recycling import DrawPool
from metaflowmaps.value import CORRECTIONS, free_shift, free_shift_from


@dataclass(frozen=True)
class MFMGF(FromDraws, GuidedMethod):
    """D* − D = Σ (w_i − ω_i) x_1^i over the draws of the last ``recycle`` steps (1: of this step only).

    With ``fill`` the first step makes draws for a whole pool: N (recycle − 1) more calls, once. Early steps choose the
    mode, and with one or two draws a step the pool is nearly empty when they do.

    Args:
        recycle: steps whose draws are used together.
        centre: D from the same draws, or (denoise) from the drift.
        correction: none, or jackknife for the 1/N term of the bias.
        fill: a full pool from the first step on.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> reward, method = lambda x: 2 * x[:, 0], mfm.MFMGF(num_draws=4)
        >>> result = mfm.steer(model, reward, 64, method, mfm.ODE(steps=10), seed=0)
        >>> bool(result.samples[:, 0].mean() > 1)
        True
    """

    name = "mfm-gf"
    title = "MFM-GF"
    in_words = (
        "Each step draws what the sample may become, one network call a draw, and leans to draws "
        "of high reward; needs no gradient."
    )
    look = ("#0fc3a0", "s")
    published: ClassVar[dict[str, Any]] = {"recycle": 1}
    weighs: ClassVar[bool] = True

    recycle: int = 8
    centre: str = "draws"
    correction: str = "none"
    fill: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.recycle, "recycle")
        check_one_of("centre", self.centre, ("draws", "denoise"))
        check_one_of("correction", self.correction, CORRECTIONS)

    @property
    def calls_per_step(self) -> float:
        """The drift; a call and a reward a draw."""
        return 1 + 2 * self.num_draws

    def check(self, process: Process) -> None:
        """A bound on σ² is for gradients: the mean of draws is bounded by itself."""
        super().check(process)
        if process.sigma_cap is not None:
            raise InputError(
                "sigma_cap bounds reward gradients (mfm.MFMG), as in the release; mfm.MFMGF cannot leave the hull of "
                "its draws: leave it out"
            )

    def remember(self, problem: SteeringProblem) -> DrawPool:
        """The draws of the last steps."""
        self.open_posterior(problem)
        return DrawPool(problem.path, self.recycle)

    def guide(self, problem: SteeringProblem, memory: DrawPool, t: float, x: Tensor) -> Guidance:
        """The drift, and the shift of the whole pool."""
        drift = problem.drift(t, x)
        contexts = self.recycle if self.fill and not memory.draws else 1
        for _ in range(contexts):
            log_base = memory.add(t, x, problem.draws(t, x, self.options()))
        pool = memory.pooled()
        if self.centre == "draws":
            shift = free_shift(pool, log_base, self.correction)
        else:
            shift = free_shift_from(pool, log_base, problem.denoise(t, x, drift), self.correction)
        info = draw_info(problem, t, shift, pool.rewards, log_base, self.noise)
        return Guidance(drift, shift, info, halved_shift(pool, log_base))
