"""The exact ∇V, where the model knows its value function: ``value(t, x, reward) -> (B,)``, as mfm.ExactModel does."""

from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import event_sum
from metaflowmaps.errors import InputError
from metaflowmaps.steering.problem import Info, Problem

FIRST = 1e-6  # D* − D = (α²/β) ∇V is 0/0 at t = 0; in float64 this close to it loses nothing


class ExactGuide:
    """D* − D = (α²/β) ∇V by autograd through the closed form."""

    def __init__(self, reward: Any) -> None:
        self.reward = reward

    def start(self, problem: Problem) -> None:
        if not hasattr(problem.model, "value"):
            raise InputError('method="exact" needs a model with value(t, x, reward), such as mfm.ExactModel(path, law)')

    def guide(self, problem: Problem, memory: Any, t: float, x: Tensor) -> tuple[Tensor, Tensor, Info]:
        drift, t = problem.drift(t, x), max(t, FIRST)
        if getattr(self.reward, "strength", None) == 0:  # V = 0: its gradient by autograd would be rounding
            return drift, torch.zeros_like(x), {}
        with torch.enable_grad():
            wide = x.detach().double().requires_grad_(True)
            value = problem.model.value(t, wide, self.reward)
            (gradient,) = torch.autograd.grad(value.sum(), wide)
        return (
            drift,
            (problem.shift_per_gradient(t) * gradient).to(x),
            {"value": value.detach().to(x), "gradient_norm": event_sum(gradient.square()).sqrt().to(x)},
        )
