r"""MFM-Search (Alg. 4): draw, keep the best, noise it again to the next time; no drift, no gradients.

M particles a sample, N draws each. Selection "particle": each particle goes on from its own best draw; "global": all
go on from the best of the M N. Transition "stochastic": x_u = α_u ξ + β_u x_1* with fresh ξ; "deterministic": with the
noise that x implies, ξ = (x − β_t x_1*)/α_t. A search maximises the reward: it does not target p_reward.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import check_count
from metaflowmaps.errors import unknown
from metaflowmaps.steering.problem import Info, Problem
from metaflowmaps.value import DrawOptions

SELECTIONS = ("particle", "global")
TRANSITIONS = ("stochastic", "deterministic")


class _State(NamedTuple):
    x: Tensor
    best: Tensor  # reward of the draw each particle came from


class Search:
    """The best draw, again and again."""

    default_grid = "power"

    def __init__(
        self,
        num_draws: int,
        particles: int = 8,
        selection: str = "global",
        transition: str = "stochastic",
        noise: str = "independent",
        chunk: int = 64,
    ) -> None:
        check_count(num_draws, "num_draws")
        check_count(particles, "particles")
        if selection not in SELECTIONS:
            raise unknown("selection", selection, SELECTIONS)
        if transition not in TRANSITIONS:
            raise unknown("transition", transition, TRANSITIONS)
        self.num_draws, self.copies, self.selection, self.transition = num_draws, particles, selection, transition
        self.options = DrawOptions(noise, chunk)

    def init(self, problem: Problem, x: Tensor) -> _State:
        return _State(x, x.new_full((len(x),), -torch.inf))

    def step(self, problem: Problem, state: _State, t: float, u: float) -> tuple[_State, Info]:
        x, rows = state.x, torch.arange(len(state.x), device=state.x.device)
        made = problem.draws(t, x, self.num_draws, self.options)
        reward, index = made.rewards.max(0)
        chosen = made.x_1[index, rows]
        if self.selection == "global":
            # rows of one sample lie ``samples`` apart: particle m of sample i is row m · samples + i
            samples = len(x) // self.copies
            best = reward.reshape(self.copies, samples).argmax(0) * samples + torch.arange(samples, device=x.device)
            chosen, reward = chosen[best].repeat(self.copies, *([1] * (x.ndim - 1))), reward[best].repeat(self.copies)
        alpha_u, beta_u = float(problem.path.alpha(u)), float(problem.path.beta(u))
        if self.transition == "stochastic":
            noise = problem.noise("sde", len(x))
        else:
            noise = (x - float(problem.path.beta(t)) * chosen) / float(problem.path.alpha(t))
        return _State(alpha_u * noise + beta_u * chosen, reward), {"best_reward": reward}

    def finish(self, problem: Problem, state: _State) -> tuple[Tensor, Info]:
        samples = len(state.x) // self.copies
        best = state.best.reshape(self.copies, samples).argmax(0)
        return state.x[best * samples + torch.arange(samples, device=state.x.device)], {}
