"""A log-density as a reward: ``r(x) = λ log q(x)``."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from metaflowmaps._shapes import Cond, positive
from metaflowmaps.errors import InputError
from metaflowmaps.rewards.base import call_reward, describe, no_reward


class LogDensity:
    """r(x) = strength · log q(x), from an object with ``log_prob(x) -> (B,)`` or from that function itself.

    Args:
        log_prob: log q, (B, *event) -> (B,), or an object that has it.
        strength: λ, which the reward is multiplied by.

    Examples:
        >>> reward = mfm.rewards.LogDensity(mfm.GaussianMixture([[0.0, 0.0]], 1.0))
        >>> reward(torch.zeros(1, 2))
        tensor([-1.8379])
    """

    differentiable = True

    def __init__(self, log_prob: Any, strength: float = 1.0) -> None:
        method: Callable[..., Any] = getattr(log_prob, "log_prob", log_prob)
        if not callable(method):
            raise InputError(
                "LogDensity needs an object with log_prob(x), such as a GaussianMixture or a torch distribution, "
                f"or a function; got {describe(log_prob)}"
            )
        self.source, self.log_prob = log_prob, method
        self.strength = positive(strength, "strength", or_zero=True)

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        if self.strength == 0:  # 0 · (−inf) outside the support would be NaN
            return no_reward(x)
        out = call_reward(self.log_prob, x, cond)
        if not isinstance(out, Tensor) or out.shape != x.shape[:1]:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(
                f"log_prob must return one number a sample, shape ({len(x)},), got {got}; a torch distribution of "
                f"single coordinates becomes one of samples in torch.distributions.Independent(…, {x.ndim - 1})"
            )
        return self.strength * out.to(x.dtype)

    def __repr__(self) -> str:
        return f"LogDensity({describe(self.source)}, strength={self.strength:g})"
