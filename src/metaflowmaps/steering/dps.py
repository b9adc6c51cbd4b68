"""DPS: the reward's gradient at the posterior mean, ``∇_x r(D_t(x))``, in place of ∇V."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import event_sum
from metaflowmaps.errors import InputError
from metaflowmaps.steering.problem import FIRST, Info, Problem
from metaflowmaps.value import pull_back


class DpsGuide:
    """D* − D = (α²/β) ∇_x r(D_t(x)): exact for a linear reward and a Gaussian posterior, a point estimate otherwise."""

    def start(self, problem: Problem) -> None:
        if not problem.reward.differentiable:
            raise InputError('this reward declares itself not differentiable: use method="mfm-gf"')

    def guide(self, problem: Problem, memory: Any, t: float, x: Tensor) -> tuple[Tensor, Tensor, Info]:
        at = at_posterior_mean(problem, t, x)
        norm = event_sum(at.gradient.square()).sqrt()
        return at.drift, at.shift, {"value": at.reward, "gradient_norm": norm}


class AtMean(NamedTuple):
    """The point estimate of V and of its gradient, with the drift that came along."""

    drift: Tensor
    shift: Tensor
    gradient: Tensor
    reward: Tensor


def at_posterior_mean(problem: Problem, t: float, x: Tensor) -> AtMean:
    """r(D_t(x)) and its gradient: one differentiated call of the network and one of the reward."""
    looked_at = max(t, FIRST)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        drift = problem.drift(looked_at, leaf)
        point = problem.denoise(looked_at, leaf, drift)
        reward = problem.score_of(point)
        gradient = pull_back(reward, leaf, point)
    drift = drift.detach() if looked_at == t else problem.drift(t, x)
    return AtMean(drift, problem.shift_per_gradient(looked_at) * gradient, gradient, reward.detach())
