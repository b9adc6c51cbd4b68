"""DPS: the reward's gradient at the posterior mean, ``∇_x r(D_t(x))``, in place of ∇V."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import event_sum, positive
from metaflowmaps.draws import reward_gradient
from metaflowmaps.rewards.base import check_differentiable
from metaflowmaps.steering.method import Guidance, GuidedMethod
from metaflowmaps.steering.problem import FIRST, SteeringProblem


@dataclass(frozen=True)
class DPS(GuidedMethod):
    """D* − D = scale (α²/β) ∇_x r(D_t(x)): exact for a linear reward and a Gaussian posterior, else a point estimate.

    Args:
        scale: what practitioners tune: a sharp reward's gradient at a point is far larger than ∇V.

    Examples:
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> reward, method = lambda x: 2 * x[:, 0], mfm.DPS(scale=0.5)
        >>> result = mfm.steer(model, reward, 64, method, mfm.ODE(steps=10), seed=0)
        >>> bool(result.samples[:, 0].mean() > 1)
        True
    """

    name = "dps"
    title = "DPS"
    in_words = (
        "Follows the reward's gradient at the mean of what the sample may become, one blurred guess; needs no map."
    )
    look = ("#8c4480", "X")
    gradients = True

    scale: float = 1.0

    def __post_init__(self) -> None:
        positive(self.scale, "scale", or_zero=True)

    @property
    def calls_per_step(self) -> float:
        """A call of the network and one of the reward, both differentiated."""
        return 4

    def guide(self, problem: SteeringProblem, memory: Any, t: float, x: Tensor) -> Guidance:
        """The drift and the shift of the point estimate."""
        at = at_posterior_mean(problem, t, x)
        norm = event_sum(at.gradient.square()).sqrt()
        return Guidance(at.drift, self.scale * at.shift, {"value": at.reward, "gradient_norm": norm})


class AtMean(NamedTuple):
    """The point estimate of V and of its gradient, with the drift that came along."""

    drift: Tensor
    shift: Tensor
    gradient: Tensor
    reward: Tensor


def at_posterior_mean(problem: SteeringProblem, t: float, x: Tensor) -> AtMean:
    """r(D_t(x)) and its gradient: one differentiated call of the network and one of the reward."""
    check_differentiable(problem.reward)
    looked_at = max(t, FIRST)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        drift = problem.drift(looked_at, leaf)
        point = problem.denoise(looked_at, leaf, drift)
        reward = problem.score_of(point)
        gradient = reward_gradient(reward, leaf, point)
    drift = drift.detach() if looked_at == t else problem.drift(t, x)
    return AtMean(drift, problem.shift_per_gradient(looked_at) * gradient, gradient, reward.detach())
