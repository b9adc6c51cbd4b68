"""The base model, unsteered."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaflowmaps.steering.method import Guidance, GuidedMethod
from metaflowmaps.steering.problem import SteeringProblem


@dataclass(frozen=True)
class Unsteered(GuidedMethod):
    """D* = D.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> result = mfm.steer(model, lambda x: x[:, 0], 64, mfm.Unsteered(), mfm.ODE(steps=10), seed=0)
        >>> result.cost["nfe"]  # the drift, once a step; the reward is not asked on the way
        10.0
    """

    name = "none"
    title = "unsteered"
    in_words = "The model's own samples; the reward is not asked."
    targets_law = False

    def guide(self, problem: SteeringProblem, memory: Any, t: float, x: Tensor) -> Guidance:
        """The drift alone."""
        return Guidance(problem.drift(t, x), torch.zeros_like(x), {})
