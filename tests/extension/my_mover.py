"""A steering method that moves in its own way: ``start``, ``step`` and ``finish`` are all that there is to one."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metaflowmaps.draws import DrawOptions
from metaflowmaps.steering import Method


class Held(NamedTuple):
    """A state is any object that holds its rows as ``x``."""

    x: Tensor  # (B, *event)
    best: Tensor  # the best clean sample yet
    reward: Tensor  # (B,), of that


@dataclass(frozen=True)
class Hold(Method):
    """Each step draws clean samples, holds on to the best one yet, and noises it to the next time."""

    name = "hold"
    title = "hold the best"
    draws = True
    targets_law = False  # it aims at high rewards, not at p_reward
    own_moves = "noises its best draw"  # so a process gives it times, and nothing else

    num_draws: int = 1

    @property
    def calls_per_step(self):
        """What budgets are planned by: each draw is a call of the network and one of the reward."""
        return 2 * self.num_draws

    def start(self, problem, x):
        """The first state, from noise x."""
        problem.open_posterior(None)  # draw from the model itself
        return Held(x, x, x.new_full((len(x),), -torch.inf))

    def step(self, problem, process, state, t, u):
        """The state at u from the one at t, and what to report of it, (B,) each."""
        made = problem.draws(t, state.x, DrawOptions(self.num_draws))  # what goes through the problem is counted
        rewards, draws = torch.cat([state.reward[None], made.rewards]), torch.cat([state.best[None], made.x_1])
        reward, which = rewards.max(0)
        best = draws[which, torch.arange(len(which), device=which.device)]
        noise = problem.noise("hold", len(best))  # of each sample's own seed, whatever its batch
        return Held(problem.path.interpolate(noise, best, u), best, reward), {"best_reward": reward}

    def finish(self, problem, state):
        """The samples, and what to report of them."""
        return state.best, {}
