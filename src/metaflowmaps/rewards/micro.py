r"""Rewards a few rows at a time: the memory of one part, the values and gradients of the whole.

A row's reward depends on that row alone, so r and ∂r_i/∂x_i of a batch are those of its parts. Each part is
differentiated as soon as it is evaluated and only ∂r_i/∂x_i is kept, which is as large as x; the backward pass
multiplies it by what comes from above. That is one forward and one backward as without parts, no graph waits for its
turn, and where memory runs out is where it can be caught: the part is halved and tried again.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from metaflowmaps._shapes import Cond, check_count
from metaflowmaps.errors import InputError
from metaflowmaps.rewards.base import call_reward, describe, is_differentiable, rows_of

PerRow = Mapping[str, Tensor]  # what goes with the rows, (B, …) each
Score = Callable[[Tensor, PerRow], Tensor]
EXHAUSTED = ("out of memory", "can't allocate memory")  # of an accelerator; of the processor


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
        if not (x.requires_grad and torch.is_grad_enabled()):
            return self._evaluate(score, x, per_row, together, differentiate=False)[0]

        def differentiated(values: Tensor) -> tuple[Tensor, Tensor | None]:
            return self._evaluate(score, values, per_row, together, differentiate=True)

        value: Tensor = _Differentiated.apply(x, differentiated)
        return value

    def _evaluate(
        self, score: Score, x: Tensor, per_row: PerRow, together: int, differentiate: bool
    ) -> tuple[Tensor, Tensor | None]:
        """r (B,) and ∂r_i/∂x_i (B, *event); None for a reward that no gradient goes through."""
        values: list[Tensor] = []
        gradients: list[Tensor] = []
        begin, graph = 0, False
        while begin < len(x):
            n = min(self._size(len(x), together), len(x) - begin)
            part = slice(begin, begin + n)
            rows = {name: value[part] for name, value in per_row.items()}
            try:
                r, gradient = _differentiate(score, x[part], rows) if differentiate else (score(x[part], rows), None)
                _check(r, n)
            except RuntimeError as error:
                if not any(sign in str(error).lower() for sign in EXHAUSTED):
                    raise
                shortage = " ".join(str(error).split())[:120]
            else:
                values.append(r)
                graph = graph or gradient is not None
                gradients.append(torch.zeros_like(x[part]) if gradient is None else gradient)
                begin += n
                continue
            # outside of the handler: there the traceback still holds on to the tensors of the attempt
            self._halve(n, together, shortage)
        return torch.cat(values), torch.cat(gradients) if graph else None

    def _size(self, batch: int, together: int) -> int:
        return max(together, (self.rows or batch) // together * together)

    def _halve(self, n: int, together: int, shortage: str) -> None:
        if n <= together:
            raise InputError(
                f"memory runs out for {n} row(s) of the reward ({shortage}): give it dtype=torch.bfloat16, smaller "
                "pictures or another device"
            )
        self.rows = max(together, n // 2)
        warnings.warn(
            f"memory ran out for {n} rows of the reward: going on with micro_batch={self.rows}",
            UserWarning,
            stacklevel=2,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class MicroBatched:
    """The same reward, at most ``rows`` rows at a time; its gradient goes to x alone (not to parameters), once.

    Where each row has an observation of its own (``rows_for``), such rows stay together.

    Args:
        reward: ``(x, cond) -> (B,)``.
        rows: at most; None: all, and fewer where memory runs out.
    """

    def __init__(self, reward: Callable[..., Any], rows: int | None = None) -> None:
        if not callable(reward):
            raise InputError(f"a reward is a function of x (and optionally cond), got {type(reward).__name__}")
        self.reward = reward
        self.differentiable = is_differentiable(reward)
        self.strength: float = getattr(reward, "strength", 1.0)
        self.parts = Parts(rows)

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        """r(x): (B,)."""
        given = {} if cond is None else dict(cond)
        per_row = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.shape[:1] == x.shape[:1]}
        shared = {k: v for k, v in given.items() if k not in per_row}

        def score(part: Tensor, rows: PerRow) -> Tensor:
            value: Tensor = call_reward(self.reward, part, None if cond is None else {**shared, **rows})
            return value

        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return self.parts(score, x, per_row, rows_of(self.reward, x) or 1)

    def __repr__(self) -> str:
        return f"MicroBatched({describe(self.reward)}, rows={self.parts.rows}, strength={self.strength:g})"


class _Differentiated(torch.autograd.Function):
    """r with ∂r_i/∂x_i found on the way; the backward pass is a product."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, evaluate: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    ) -> Tensor:
        r, gradient = evaluate(x)
        if gradient is None:
            ctx.mark_non_differentiable(r)
        else:
            ctx.save_for_backward(gradient)
        return r

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, above: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return above.to(gradient).reshape(-1, *([1] * (gradient.ndim - 1))) * gradient, None


def _differentiate(score: Score, x: Tensor, rows: PerRow) -> tuple[Tensor, Tensor | None]:
    with torch.enable_grad():
        part = x.detach().requires_grad_(True)
        r = score(part, rows)
        if not isinstance(r, Tensor) or not r.requires_grad:
            return r, None
        (gradient,) = torch.autograd.grad(r.sum(), part, allow_unused=True)
    return r.detach(), gradient


def _check(r: Any, n: int) -> None:
    if not isinstance(r, Tensor) or tuple(r.shape) != (n,):
        got = tuple(r.shape) if isinstance(r, Tensor) else type(r).__name__
        raise InputError(f"the reward must return one number a sample, shape ({n},), got {got}")
