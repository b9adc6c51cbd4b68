"""Rewards made of rewards: ``λ Σ_i w_i r_i(x)`` and ``λ r(x)``. The parts may be plain functions of x."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, as_numbers, positive
from metaflowmaps.errors import InputError
from metaflowmaps.rewards.base import describe, is_differentiable, no_reward
from metaflowmaps.rewards.checked import checked_reward

PAIRS = "WeightedSum takes pairs (weight, reward), as in [(1.0, first), (0.5, second)]"


class WeightedSum:
    """r(x) = strength · Σ_i w_i r_i(x); weights may be negative, and a part of weight 0 is not called.

    Differentiable if every part with a weight other than 0 is. If one is not, the sum carries no gradient at all: that
    of the other parts would be the gradient of another reward.

    Args:
        parts: pairs (w_i, r_i).
        strength: λ, which the reward is multiplied by.

    Examples:
        >>> reward = mfm.rewards.WeightedSum([(1.0, mfm.rewards.Ink()), (0.5, lambda x: x[:, 0, 0, 0])])
        >>> reward(torch.ones(1, 1, 8, 8))
        tensor([1.5000])
    """

    def __init__(self, parts: Iterable[tuple[float, Callable[..., Any]]], strength: float = 1.0) -> None:
        try:
            pairs = [(weight, reward) for weight, reward in parts]
        except (TypeError, ValueError):
            raise InputError(f"{PAIRS}, got {describe(parts)}") from None
        if not pairs:
            raise InputError(f"{PAIRS}, and at least one of them")
        for weight, reward in pairs:
            if callable(weight) or not callable(reward):
                raise InputError(f"{PAIRS}, got the pair ({describe(weight)}, {describe(reward)})")
        self.weights = tuple(_finite(weight) for weight, _ in pairs)
        self.rewards = tuple(checked_reward(reward) for _, reward in pairs)
        self.strength = positive(strength, "strength", or_zero=True)
        self.differentiable = all(is_differentiable(r) for r, scale in self._scaled() if scale)

    def parts(self, x: Tensor, cond: Cond = None) -> list[Tensor]:
        """[r_1(x), r_2(x), …] in the order given, without weights or strength; those of weight 0 too."""
        return [self._part(i, x, cond) for i in range(len(self.rewards))]

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            # a part of weight 0 may be −inf, and 0 · (−inf) is NaN
            values = [scale * self._part(i, x, cond) for i, (_, scale) in enumerate(self._scaled()) if scale]
            return torch.stack(values).sum(0) if values else no_reward(x)

    def _scaled(self) -> list[tuple[Callable[..., Any], float]]:
        return [(r, self.strength * w) for r, w in zip(self.rewards, self.weights, strict=True)]

    def _part(self, i: int, x: Tensor, cond: Cond) -> Tensor:
        try:
            return self.rewards[i](x, cond)
        except InputError as error:
            raise InputError(f"part {i}, {describe(self.rewards[i].reward)}: {error}") from error

    def __repr__(self) -> str:
        parts = ", ".join(f"({w:g}, {describe(r.reward)})" for r, w in zip(self.rewards, self.weights, strict=True))
        return f"WeightedSum([{parts}], strength={self.strength:g})"


class Tempered:
    """r(x) = strength · reward(x); with strength 0 the reward is not called and the gradient is 0.

    Args:
        reward: ``(x, cond) -> (B,)``.
        strength: λ.

    Examples:
        >>> mfm.rewards.Tempered(mfm.rewards.Ink(), strength=5.0)(torch.ones(1, 1, 8, 8))
        tensor([5.])
    """

    def __init__(self, reward: Callable[..., Any], strength: float) -> None:
        self.reward = checked_reward(reward)
        self.strength = positive(strength, "strength", or_zero=True)
        self.differentiable = self.strength == 0 or is_differentiable(reward)

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        if self.strength == 0:  # 0 · (−inf) would be NaN
            return no_reward(x)
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return self.strength * self.reward(x, cond)

    def __repr__(self) -> str:
        return f"Tempered({describe(self.reward.reward)}, strength={self.strength:g})"


def _finite(weight: Any) -> float:
    number = as_numbers(weight, "a weight")
    if number.numel() != 1 or not bool(torch.isfinite(number).all()):
        raise InputError(f"a weight must be one finite number, got {number.tolist()}")
    return float(number)
