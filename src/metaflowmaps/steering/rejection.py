r"""Rejection: one-step samples of the base model, accepted with probability e^{r − bound}.

Exact where r ≤ bound: what is accepted has the law p_1 e^r, and a sample costs e^{bound}/E[e^r] calls on average. A
bound that is **given** is held to: a reward above it is an error that says so. One that is **learned** is the largest
reward of a pilot pool, which each sample raises by what it meets itself; where the pool has missed the largest rewards,
what is accepted is too uniform, which is the risk. With conditions the pool is made under those of the batch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count
from metaflowmaps.errors import InputError
from metaflowmaps.random import RowNoise
from metaflowmaps.steering.method import Info, Method, Process
from metaflowmaps.steering.one_step import OneStep
from metaflowmaps.steering.problem import SteeringProblem


class Accepted(NamedTuple):
    """Samples, or the noise of their first proposals, and what each of them is held to."""

    x: Tensor
    bound: Tensor  # (rows,)


@dataclass(frozen=True)
class Rejection(Method):
    """One-step samples accepted by e^{r − bound}: the cheapest rival, and exact where the bound holds.

    Args:
        bound: no reward is larger; None: learned from a pilot pool.
        pilot: one-step samples that the bound is learned from.
        max_proposals: a sample; more are refused, with the fix.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> reward = lambda x: -(x[:, 0] - 2).square()  # never above 0
        >>> result = mfm.steer(model, reward, 64, mfm.Rejection(bound=0.0), seed=0)
        >>> bool(result.samples[:, 0].mean() > 1)
        True
    """

    name = "rejection"
    title = "rejection"
    in_words = "Makes samples in one call each and accepts a share of them, more where the reward is high."
    look = ("#0022cc", "p")
    moved_by = "one step"
    own_moves = "makes its samples in one step"

    bound: float | None = None
    pilot: int = 1024
    max_proposals: int = 10_000

    def __post_init__(self) -> None:
        check_count(self.pilot, "pilot")
        check_count(self.max_proposals, "max_proposals")

    def times(self, problem: SteeringProblem, process: Process) -> list[float]:
        """One step from noise to data."""
        return [0.0, 1.0]

    def start(self, problem: SteeringProblem, x: Tensor) -> Accepted:
        """Noise of the first proposals, and the bound."""
        bound = self.bound if self.bound is not None else problem.once("pilot", lambda: self._pilot_bound(problem))
        return Accepted(x, torch.full((len(x),), bound, dtype=torch.float64, device=x.device))

    def step(
        self, problem: SteeringProblem, process: Process, state: Accepted, t: float, u: float
    ) -> tuple[Accepted, Info]:
        """Propose for the rows that have no sample yet, until all have one."""
        propose, bound = OneStep(problem), state.bound.clone()
        everyone = len(state.x)
        proposals = torch.zeros(everyone, dtype=torch.float64, device=state.x.device)
        samples, waiting = torch.zeros_like(state.x), torch.ones(everyone, dtype=torch.bool, device=state.x.device)
        noise = state.x
        for _ in range(self.max_proposals):
            # noise for all rows, though few may need it: a row's numbers do not depend on its neighbours
            coin = problem.stream("accept", rows=everyone).uniform(dtype=torch.float64)
            rows = waiting.nonzero()[:, 0]
            x = propose.samples_of(noise, rows)
            r = problem.reward(x, propose.cond_of(rows, everyone)).double()
            bound[rows] = self._raised(r, bound[rows])
            proposals[rows] += 1
            kept = coin[rows].log() < r - bound[rows]
            samples[rows[kept]] = x[kept].to(samples.dtype)
            waiting[rows[kept]] = False
            if not bool(waiting.any()):
                return Accepted(samples, bound), {"proposals": proposals, "bound": bound}
            noise = problem.noise("propose", everyone)
        raise InputError(
            f"rejection accepted {everyone - int(waiting.sum())} of {everyone} samples in {self.max_proposals} "
            "proposals each: raise max_proposals, lower the strength, or steer (mfm.MFMGF)"
        )

    def finish(self, problem: SteeringProblem, state: Accepted) -> tuple[Tensor, Info]:
        """What was accepted."""
        return state.x, {}

    def _raised(self, r: Tensor, bound: Tensor) -> Tensor:
        if self.bound is None:
            return torch.maximum(bound, r)
        largest = float(r.max())
        if largest > self.bound + 1e-6 * max(1.0, abs(self.bound)):  # rounding of the reward's dtype
            raise InputError(
                f"a reward of {largest:g} is above bound={self.bound:g}: give a larger bound, or none to learn it"
            )
        return bound

    def _pilot_bound(self, problem: SteeringProblem) -> float:
        """The largest reward of a pool that is the same for every batch; of its conditions where there are some."""
        seeds = torch.arange(self.pilot, device=problem.device)
        noise = RowNoise(seeds, "pilot").normal(problem.event_shape, dtype=problem.dtype)
        propose = OneStep(problem)
        rows = torch.arange(self.pilot, device=problem.device) % max(1, len(problem.seeds))
        cond = propose.cond_of(rows, len(problem.seeds))
        x = propose.draw(noise, cond)
        return float(problem.reward(x, cond).max())
