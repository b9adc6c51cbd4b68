"""Rewards without a gradient: numpy code, a program, a service, a person."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, positive
from metaflowmaps.errors import InputError
from metaflowmaps.rewards.base import call_reward, describe


class BlackBox:
    """r(x) = strength · function(x), where the function takes a tensor and returns B numbers: a tensor, array or list.

    It is given a copy of x on the CPU, where NumPy and the world outside are, that nothing is differentiated through;
    what it returns comes out in the dtype and on the device of x. Such rewards steer with gradient-free methods.

    Args:
        function: of x (B, *event) and maybe cond, to B numbers.
        strength: λ, which the reward is multiplied by.
        device: where the function is given x; None: where x is, for a network on an accelerator.

    Examples:
        >>> reward = mfm.rewards.BlackBox(lambda x: x.numpy().max(axis=1), strength=2.0)
        >>> reward(torch.tensor([[0.0, 1.0], [3.0, 2.0]]))
        tensor([2., 6.])
    """

    differentiable = False

    def __init__(
        self, function: Callable[..., Any], strength: float = 1.0, device: torch.device | str | None = "cpu"
    ) -> None:
        if not callable(function):
            raise InputError(f"BlackBox needs a function of x that returns one number a row, got {describe(function)}")
        self.function = function
        self.strength, self.device = positive(strength, "strength", or_zero=True), device

    @torch.no_grad()
    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        if self.strength == 0:  # 0 · (−inf) would be NaN
            return x.new_zeros(len(x))
        device = x.device if self.device is None else torch.device(self.device)
        given = None if cond is None else {name: value.to(device) for name, value in cond.items()}
        out = call_reward(self.function, x.to(device, copy=True), given)
        numbers = out if isinstance(out, Tensor) else _numbers(out)
        if numbers.shape != x.shape[:1]:
            raise InputError(
                f"a BlackBox function must return one number a row, {len(x)} of them in a flat list, array or tensor; "
                f"got shape {tuple(numbers.shape)}"
            )
        return self.strength * numbers.to(x)

    def __repr__(self) -> str:
        return f"BlackBox({describe(self.function)}, strength={self.strength:g})"


def _numbers(out: Any) -> Tensor:
    """An array, or a list of numbers or of one-number tensors, as a float64 tensor with memory of its own."""
    if isinstance(out, list | tuple):
        out = [v.tolist() if isinstance(v, Tensor) else v for v in out]
    try:
        return torch.from_numpy(np.array(out, dtype=np.float64))
    except (TypeError, ValueError):
        raise InputError(
            f"a BlackBox function must return one number a row in a flat list, array or tensor; got {describe(out)}"
        ) from None
