r"""Inverse problems: ``y = A(x) + σ n`` was observed, and samples should agree with it.

``r(x) = −λ ‖y − A(x)‖² / (2 σ²)``, the log-likelihood without normaliser; at λ = 1 the tilted law ``p_1 e^r`` is the
Bayesian posterior given y. A may be any function, see :mod:`metaflowmaps.rewards.operators`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, as_numbers, check_state, event_sum, positive, repeat_rows
from metaflowmaps.errors import InputError
from metaflowmaps.random import randn
from metaflowmaps.rewards.base import describe

Operator = Callable[[Tensor], Tensor]


class InverseProblem:
    """r(x) = −strength · ‖y − A(x)‖² / (2 noise_std²); y is one observation, or (B, …) with one a row.

    An x of k·B rows is k copies of the batch, as draws for a batch of states are.

    Args:
        operator: A, (B, *event) -> one row a sample.
        y: the observation, or one a row.
        noise_std: σ of its noise.
        strength: λ, which the reward is multiplied by.

    Examples:
        >>> half = mfm.rewards.Downsample(2)
        >>> truth = torch.ones(1, 1, 8, 8)
        >>> problem = mfm.rewards.InverseProblem.observe(half, truth, noise_std=0.1)
        >>> problem(torch.cat([truth, -truth])).shape
        torch.Size([2])
    """

    differentiable = True

    def __init__(self, operator: Operator, y: Any, noise_std: float, strength: float = 1.0) -> None:
        if not callable(operator):
            raise InputError(
                f"operator must be a function of x, such as mfm.rewards.Blur(2.0), got {describe(operator)}"
            )
        self.operator = operator
        self.y = as_numbers(y, "y")
        if self.y.numel() == 0 or not bool(torch.isfinite(self.y).all()):
            raise InputError(f"y must hold finite numbers, and at least one; got shape {tuple(self.y.shape)}")
        self.noise_std = positive(noise_std, "noise_std")
        self.strength = positive(strength, "strength", or_zero=True)

    @classmethod
    @torch.no_grad()
    def observe(
        cls,
        operator: Operator,
        x: Tensor,
        noise_std: float,
        generator: torch.Generator | None = None,
        strength: float = 1.0,
    ) -> "InverseProblem":
        """The problem with y = A(x) + noise_std · n; an x of one row makes one observation for any batch."""
        check_state(x)
        clean = _observations(operator, x)
        noise = randn(tuple(clean.shape), generator, clean.dtype, clean.device)
        y = clean + positive(noise_std, "noise_std") * noise
        return cls(operator, y[0] if len(x) == 1 else y, noise_std, strength)

    def rows_for(self, x: Tensor) -> int | None:
        """How many observations y holds, one a sample; None if it is one for all. Steering keeps such rows together."""
        with torch.no_grad():
            one = _observations(self.operator, x[:1]).shape[1:]
        return None if self.y.shape == one else len(self.y)

    @property
    def precision(self) -> float:
        """λ/σ², the precision of one coordinate of the observation."""
        return self.strength / self.noise_std**2

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        seen = _observations(self.operator, x)
        one, rows = tuple(seen.shape[1:]), tuple(seen.shape)
        y = self.y
        if y.ndim == seen.ndim and tuple(y.shape[1:]) == one and len(y) > 1 and len(x) % len(y) == 0:
            # several draws a state come as several copies of the batch, one after the other
            y = repeat_rows(y, len(x) // len(y))
        elif tuple(y.shape) not in (one, rows):
            hint = "; y[0] is one observation for the whole batch" if tuple(self.y.shape) == (1, *one) else ""
            raise InputError(
                f"y must have shape {one} (one observation) or {rows} (one a row), as the operator returns for this x; "
                f"got {tuple(self.y.shape)}{hint}"
            )
        residual = y.to(seen) - seen
        return (-0.5 * self.precision * event_sum(residual[..., None].square())).to(x.dtype)

    def __repr__(self) -> str:
        return (
            f"InverseProblem({describe(self.operator)}, y of shape {tuple(self.y.shape)}, "
            f"noise_std={self.noise_std:g}, strength={self.strength:g})"
        )


def _observations(operator: Operator, x: Tensor) -> Tensor:
    """A(x), refused unless it has one row a sample."""
    seen = operator(x)
    if not isinstance(seen, Tensor) or not seen.is_floating_point() or seen.shape[:1] != x.shape[:1]:
        got = f"{seen.dtype} {tuple(seen.shape)}" if isinstance(seen, Tensor) else type(seen).__name__
        raise InputError(
            f"the operator must return a floating-point tensor with one row a sample, shape ({len(x)}, …), got {got}"
        )
    return seen
