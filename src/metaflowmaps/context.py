r"""General contexts: several observations of a process, and the time that is asked for.

For any process X and observations ``C = {(t_i, x_i)}`` the auxiliary flow of C carries N(0, Id) to ``p(X_r | C)``: the
same coupling, the same losses, another posterior. To a map such a context is a condition: a few tensors with one row a
sample, beside a label or a guidance scale,

    values (B, M, *event)    times (B, M)    mask (B, M), False where there is no observation    query (B,), r

so whatever slices, repeats and hands on conditions does so with contexts. The noisy state (t, x_t) stays what it was:
one more observation, of X_r itself through noise, and at t = 0 none.

Observations are a set. They are read in the order of their times, whatever order they are given in; of two at the same
time the later in the list wins.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, check_count, repeat_cond
from metaflowmaps.errors import InputError

VALUES, TIMES, MASK, QUERY = OBSERVED = ("values", "times", "mask", "query")
FINITE = "finite"  # a mask: whatever is NaN is no observation


class Context:
    """Observations of a process at a batch of rows, and the time of each row that is asked for.

    Args:
        values: (B, M, *event), what was seen; M may be 0.
        times: (M,) or (B, M), when; in any order. Of equal times the later in the list wins.
        mask: (M,) or (B, M) bool, False where there is no observation; ``"finite"``: where values are not NaN. None:
            all are there, and NaN is refused.
        query: a number or (B,), the time r that is asked for.
        cond: further conditions of the rows, as a label.

    Examples:
        >>> context = mfm.Context(torch.tensor([[[0.4], [1.1]]]), torch.tensor([0.0, 1.0]), query=0.5)
        >>> len(context), context.values.shape
        (1, torch.Size([1, 2, 1]))
        >>> later = context.seen(torch.tensor([[0.9]]), 0.7).at(2.0)  # one more observation, another question
        >>> later.times
        tensor([[0.0000, 1.0000, 0.7000]])
    """

    def __init__(
        self,
        values: Tensor,
        times: Tensor,
        mask: Tensor | str | None = None,
        query: Tensor | float | None = None,
        cond: Cond = None,
    ) -> None:
        if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim < 3:
            given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(f"values must be a floating-point tensor (B, M, *event), got {given}")
        self.values, shape = values, tuple(values.shape[:2])
        self.times = _per_row(_numbers(times, values, "times"), shape, "times")
        self.mask = self._masked(mask, shape)
        self.query: Tensor | None = None
        if query is not None:
            self.query = _per_row(_numbers(query, values, "query"), shape[:1], "query")
            if not bool(self.query.isfinite().all()):
                raise InputError("query must be finite numbers: the times that are asked for")
        if not bool(self.times[self.mask].isfinite().all()):
            raise InputError("times must be finite numbers: leave what has no time out by mask=")
        if cond is not None and not isinstance(cond, Mapping):
            raise InputError(f'cond is a mapping such as {{"label": labels (B,)}}, got {type(cond).__name__}')
        self.cond = dict(cond or {})
        if taken := [name for name in OBSERVED if name in self.cond]:
            raise InputError(f"a condition cannot be called {taken[0]!r}: a context's own are {', '.join(OBSERVED)}")
        for name, part in self.cond.items():
            if not isinstance(part, Tensor) or part.shape[:1] != shape[:1]:
                given = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise InputError(f"condition {name!r} must be a tensor of {shape[0]} rows, as values have, got {given}")

    def _masked(self, mask: Tensor | str | None, shape: tuple[int, ...]) -> Tensor:
        """The mask (B, M); what it lets through is finite."""
        finite = self.values.detach().isfinite().flatten(2).all(2)
        if isinstance(mask, str):
            if mask != FINITE:
                raise InputError(f"mask must be a tensor of bools, None or {FINITE!r}, got {mask!r}")
            return finite
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool)
        kept = _per_row(torch.as_tensor(mask, device=self.values.device), shape, "mask")
        if kept.dtype != torch.bool:
            raise InputError(f"mask must hold bools, True where there is an observation, got {kept.dtype}")
        bad = int((kept & ~finite).sum())
        if bad:
            raise InputError(f'{bad} observations are not finite: leave them out by mask="finite", or by a mask')
        return kept

    def __len__(self) -> int:
        return self.values.shape[0]

    def at(self, query: Tensor | float) -> "Context":
        """The same observations, asked for another time."""
        return Context(self.values, self.times, self.mask, query, self.cond)

    def seen(self, value: Tensor, time: Tensor | float) -> "Context":
        """With one more observation (B, *event) at a time, a number or (B,); nothing is asked for yet."""
        shape = (len(self), *self.values.shape[2:])
        if not isinstance(value, Tensor) or value.shape != shape:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"an observation must be a tensor of shape {shape}, one a row, got {given}")
        time = _per_row(_numbers(time, self.times, "time"), shape[:1], "time")
        true = self.mask.new_ones(len(self), 1)
        return Context(
            torch.cat([self.values, value[:, None].to(self.values)], 1),
            torch.cat([self.times, time[:, None]], 1),
            torch.cat([self.mask, true], 1),
            None,
            self.cond,
        )

    def repeated(self, copies: int) -> "Context":
        """``copies`` copies of every row, stacked block by block."""
        check_count(copies, "copies")
        many = repeat_cond({VALUES: self.values, TIMES: self.times, MASK: self.mask}, copies) or {}
        query = None if self.query is None else self.query.repeat(copies)
        return Context(many[VALUES], many[TIMES], many[MASK], query, repeat_cond(self.cond, copies))

    def conditions(self) -> dict[str, Tensor]:
        """As a map takes it: ``cond=context.conditions()``."""
        if self.query is None:
            raise InputError("no time is asked for: give query=, or context.at(r)")
        return {VALUES: self.values, TIMES: self.times, MASK: self.mask, QUERY: self.query, **self.cond}


class Observations(NamedTuple):
    """Observations in the order of their times, those that are none at the end and 0."""

    values: Tensor  # (B, M, *event)
    times: Tensor  # (B, M)
    mask: Tensor  # (B, M)


def ordered(cond: Mapping[str, Tensor], length: int = 0) -> Observations:
    """The observations of conditions, sorted, at least ``length`` places a row; differentiable in the values.

    Whatever order they were given in, and whatever stood where there is none, the outcome is the same to the bit.
    """
    values, times, mask = cond[VALUES], cond[TIMES], cond[MASK]
    seen = Observations(values, times, mask)
    seen = _sorted(seen)
    same = seen.times[:, 1:] == seen.times[:, :-1]
    overtaken = torch.cat([seen.mask[:, 1:] & same, torch.zeros_like(seen.mask[:, :1])], 1)
    if bool(overtaken.any()):
        seen = _sorted(seen._replace(mask=seen.mask & ~overtaken))
    held = int(seen.mask.sum(1).max()) if len(mask) and mask.shape[1] else 0
    values, times, mask = (part[:, : max(held, length)] for part in seen)
    rest = max(0, length - mask.shape[1])
    if rest:
        values = torch.cat([values, values.new_zeros(len(values), rest, *values.shape[2:])], 1)
        times, mask = (torch.cat([part, part.new_zeros(len(part), rest)], 1) for part in (times, mask))
    return Observations(torch.where(beside(mask, values), values, torch.zeros_like(values)), times * mask, mask)


def _sorted(seen: Observations) -> Observations:
    order = torch.where(seen.mask, seen.times, torch.full_like(seen.times, torch.inf)).argsort(dim=1, stable=True)
    times = torch.where(seen.mask, seen.times, torch.zeros_like(seen.times))  # what is masked may be NaN
    wide = beside(order, seen.values).expand_as(seen.values)
    return Observations(seen.values.gather(1, wide), times.gather(1, order), seen.mask.gather(1, order))


def beside(part: Tensor, values: Tensor) -> Tensor:
    """A part (B, M) in the shape in which it goes with values (B, M, *event)."""
    return part.reshape(*part.shape, *([1] * (values.ndim - 2)))


def _numbers(given: Any, like: Tensor, name: str) -> Tensor:
    """Numbers as a tensor of the kind of another."""
    if isinstance(given, Tensor) and given.is_complex():
        raise InputError(f"{name} must be real numbers, got {given.dtype}")
    try:
        return torch.as_tensor(given, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be numbers, got {type(given).__name__} {given!r}") from None


def _per_row(part: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """A part of a context as ``shape``, given for all rows alike or for each."""
    if tuple(part.shape) not in (shape, shape[1:]):
        raise InputError(f"{name} must have shape {shape[1:]} or {shape}, as values have it, got {tuple(part.shape)}")
    return part.expand(shape)
