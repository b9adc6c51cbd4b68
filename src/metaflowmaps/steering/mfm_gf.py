"""MFM-GF: the shift from reward values alone, at draws of this step and, recycled, of the last few."""

from torch import Tensor

from metaflowmaps._shapes import check_count, event_sum
from metaflowmaps.errors import unknown
from metaflowmaps.steering.problem import Info, Problem
from metaflowmaps.steering.recycling import DrawPool
from metaflowmaps.value import (
    DrawOptions,
    ess,
    free_shift,
    free_shift_from,
    log_mean,
    tilted_weights,
    value_std_err,
)


class GradientFreeGuide:
    """D* − D = Σ (w_i − ω_i) x_1^i over the draws of the last ``recycle`` steps (1: of this step only).

    With ``fill`` the first step makes draws for a whole pool: N (recycle − 1) more calls, once. Early steps choose the
    mode, and with one or two draws a step the pool is nearly empty when they do.
    """

    def __init__(
        self,
        num_draws: int,
        recycle: int = 8,
        centre: str = "draws",
        correction: str = "none",
        noise: str = "independent",
        chunk: int = 64,
        fill: bool = False,
    ) -> None:
        check_count(num_draws, "num_draws")
        check_count(recycle, "recycle")
        if centre not in ("draws", "denoise"):
            raise unknown("centre", centre, ("draws", "denoise"))
        self.num_draws, self.recycle, self.centre, self.correction = num_draws, recycle, centre, correction
        self.fill = fill
        self.options = DrawOptions(noise, chunk)

    def start(self, problem: Problem) -> DrawPool:
        return DrawPool(problem.path, self.recycle)

    def guide(self, problem: Problem, memory: DrawPool, t: float, x: Tensor) -> tuple[Tensor, Tensor, Info]:
        drift = problem.drift(t, x)
        contexts = self.recycle if self.fill and not memory.draws else 1
        for _ in range(contexts):
            made = problem.draws(t, x, self.num_draws, self.options)
            log_base = memory.add(t, x, made)
        pool = memory.pooled()
        if self.centre == "draws":
            shift = free_shift(pool, log_base, self.correction)
        else:
            shift = free_shift_from(pool, log_base, problem.denoise(t, x, drift), self.correction)
        return drift, shift, draw_info(problem, t, shift, pool.rewards, log_base)


def draw_info(problem: Problem, t: float, shift: Tensor, rewards: Tensor, log_base: Tensor) -> Info:
    """What an estimate from draws reports."""
    base, tilted = log_base.exp(), tilted_weights(rewards, log_base)
    gain = float(problem.path.beta(t)) / float(problem.path.alpha(t)) ** 2
    return {
        "ess": ess(tilted),
        "base_ess": ess(base),
        "value": log_mean(rewards, log_base),
        "value_std_err": value_std_err(tilted, base),
        "gradient_norm": gain * event_sum(shift.square()).sqrt(),
    }
