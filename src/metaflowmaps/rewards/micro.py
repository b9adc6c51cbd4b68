r"""Rewards a few rows at a time: the memory of one part, the values and gradients of the whole.

A row's reward depends on that row alone, so r and ∂r_i/∂x_i of a batch are those of its parts. Each part is
differentiated as soon as it is evaluated and only ∂r_i/∂x_i is kept, which is as large as x; the backward pass
multiplies it by what comes from above. That is one forward and one backward as without parts, no graph waits for its
turn, and where memory runs out is where it can be caught: the part is halved and tried again.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from metaflowmaps._shapes import Cond, check_count
from metaflowmaps.rewards.base import describe, rows_of
from metaflowmaps.rewards.checked import checked_reward
from metaflowmaps.work.memory import halving

PerRow = Mapping[str, Tensor]  # what goes with the rows, (B, …) each
Score = Callable[[Tensor, PerRow], Tensor]


class Part(NamedTuple):
    """r (b,) of some rows and ∂r_i/∂x_i (b, *event), None where it was not asked for or no gradient goes through."""

    value: Tensor
    gradient: Tensor | None = None


class Parts:
    """How many rows go together: ``rows``, or all of them, and fewer from then on where memory ran out."""

    def __init__(self, rows: int | None = None) -> None:
        if rows is not None:
            check_count(rows, "micro_batch")
        self.rows = rows

    def __call__(self, score: Score, x: Tensor, per_row: PerRow, together: int = 1) -> Tensor:
        """score(x, per_row), (B,), part by part; rows are parted in multiples of ``together``."""
        if len(x) == 0:
            return score(x, per_row)
        differentiate = x.requires_grad and torch.is_grad_enabled()

        def evaluated(values: Tensor) -> list[Part]:
            def part(begin: int, end: int) -> Part:
                rows = {name: value[begin:end] for name, value in per_row.items()}
                return _part(score, values[begin:end], rows, differentiate)

            return self._in_parts(part, len(values), together)

        if not differentiate:
            return torch.cat([part.value for part in evaluated(x)])
        value: Tensor = _Differentiated.apply(x, evaluated)
        return value

    def judged(self, reward: Callable[[Tensor, Cond], Tensor], x: Tensor, cond: Cond, together: int | None) -> Tensor:
        """reward(x, cond), (B,), part by part, what ``cond`` has a row each of parted with the rows."""
        given = dict(cond or {})
        per_row = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.shape[:1] == x.shape[:1]}
        return self(lambda part, rows: reward(part, {**given, **rows}), x, per_row, together or 1)

    def _in_parts(self, part: Callable[[int, int], Part], rows: int, together: int) -> list[Part]:
        made: list[Part] = []
        begin = 0
        while begin < rows:
            size = max(together, (self.rows or rows) // together * together)
            pieces = halving(part, begin, min(begin + size, rows), together)
            if len(pieces) > 1:
                self.rows = max(len(piece.value) for piece in pieces)
                warnings.warn(f"memory ran out: going on with micro_batch={self.rows}", UserWarning, stacklevel=2)
            made += pieces
            begin += sum(len(piece.value) for piece in pieces)
        return made


class MicroBatched:
    """The same reward, at most ``rows`` rows at a time; its gradient goes to x alone (not to parameters), once.

    Where each row has an observation of its own (``rows_for``), such rows stay together.

    Args:
        reward: ``(x, cond) -> (B,)``.
        rows: at most; None: all, and fewer where memory runs out.

    Examples:
        >>> reward = mfm.rewards.MicroBatched(mfm.rewards.Ink(), rows=2)  # two pictures at a time
        >>> reward(torch.ones(3, 1, 8, 8))
        tensor([1., 1., 1.])
    """

    def __init__(self, reward: Callable[..., Any], rows: int | None = None) -> None:
        self.reward = checked_reward(reward)
        self.differentiable = self.reward.differentiable
        self.strength: float = getattr(reward, "strength", 1.0)
        self.parts = Parts(rows)

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return self.parts.judged(self.reward, x, cond, rows_of(self.reward, x))

    def __repr__(self) -> str:
        return f"MicroBatched({describe(self.reward.reward)}, rows={self.parts.rows}, strength={self.strength:g})"


class _Differentiated(torch.autograd.Function):
    """r with ∂r_i/∂x_i found on the way; the backward pass is a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, evaluate: Callable[[Tensor], list[Part]]) -> Tensor:  # type: ignore[override]
        parts = evaluate(x)
        value = torch.cat([part.value for part in parts])
        if all(part.gradient is None for part in parts):
            ctx.mark_non_differentiable(value)
        else:
            zero = torch.zeros_like(x[:1])
            gradients = [zero.expand(len(r), *x.shape[1:]) if g is None else g for r, g in parts]
            ctx.save_for_backward(torch.cat(gradients))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, above: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return above.to(gradient).reshape(-1, *([1] * (gradient.ndim - 1))) * gradient, None


def _part(score: Score, x: Tensor, rows: PerRow, differentiate: bool) -> Part:
    if not differentiate:
        return Part(score(x, rows))
    with torch.enable_grad():
        part = x.detach().requires_grad_(True)
        r = score(part, rows)
        if not r.requires_grad:
            return Part(r)
        (gradient,) = torch.autograd.grad(r.sum(), part, materialize_grads=True)
    return Part(r.detach(), gradient)
