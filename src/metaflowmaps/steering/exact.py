"""The exact ∇V, where the model knows its value function: ``value(t, x, reward) -> (B,)``, as mfm.ExactModel does."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import event_sum
from metaflowmaps.errors import InputError
from metaflowmaps.steering.method import Guidance, GuidedMethod
from metaflowmaps.steering.problem import SteeringProblem

FIRST = 1e-6  # D* − D = (α²/β) ∇V is 0/0 at t = 0; in float64 this close to it loses nothing


@dataclass(frozen=True)
class Exact(GuidedMethod):
    """D* − D = (α²/β) ∇V by autograd through the closed form.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> reward = mfm.rewards.LinearGaussian(torch.tensor([1.0, 0.0]), 2.0, 1.0)
        >>> result = mfm.steer(model, reward, 64, mfm.Exact(), mfm.ODE(steps=20), seed=0)
        >>> bool(result.samples[:, 0].mean() > 1)  # the model's own mean is 0
        True
    """

    name = "exact"
    title = "exact ∇V"
    in_words = "Follows the exact gradient of the value, which is known of mixtures alone."
    look = ("#16181c", "*")
    exact = True

    def remember(self, problem: SteeringProblem) -> None:
        """Refuse a model without a value function."""
        if not hasattr(problem.model, "value"):
            raise InputError(
                "mfm.Exact() (--method exact) needs a model with value(t, x, reward), such as mfm.ExactModel(path, law)"
            )

    def guide(self, problem: SteeringProblem, memory: Any, t: float, x: Tensor) -> Guidance:
        """The drift and (α²/β) ∇V."""
        drift, t = problem.drift(t, x), max(t, FIRST)
        if getattr(problem.given_reward, "strength", None) == 0:  # V = 0: its gradient by autograd would be rounding
            return Guidance(drift, torch.zeros_like(x), {})
        with torch.enable_grad():
            wide = x.detach().double().requires_grad_(True)
            value = problem.model.value(t, wide, problem.given_reward)
            (gradient,) = torch.autograd.grad(value.sum(), wide)
        info = {"value": value.detach().to(x), "gradient_norm": event_sum(gradient.square()).sqrt().to(x)}
        return Guidance(drift, (problem.shift_per_gradient(t) * gradient).to(x), info)
