"""The one broadcasting rule, and the rows of conditions.

A state is (B, *event). A time is a float or a (B,) tensor, and becomes (B, 1, …, 1) (or a scalar) in the dtype and on
the device of the state it goes with. Nothing else is ever broadcast silently. A condition is None or a mapping of
tensors, one row a sample; copies of a batch are stacked block by block, as are the rows of its condition.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaflowmaps.errors import InputError

Time = float | Tensor
Cond = Mapping[str, Tensor] | None


def expand_time(t: Time, x: Tensor) -> Tensor:
    """t as a tensor that multiplies x: shape (B, 1, …, 1), or 0-d for a float."""
    if not isinstance(t, Tensor):
        return torch.tensor(t, dtype=x.dtype, device=x.device)
    t = t.to(dtype=x.dtype, device=x.device)
    if t.ndim == 0:
        return t
    if t.shape != x.shape[:1]:
        raise InputError(
            f"a time must be a float or a tensor of shape ({x.shape[0]},) for a state of shape "
            f"{tuple(x.shape)}; got shape {tuple(t.shape)}"
        )
    return t.reshape(-1, *([1] * (x.ndim - 1)))


def batch_time(t: Time, x: Tensor) -> Tensor:
    """t as a (B,) tensor in the dtype of x."""
    t = expand_time(t, x)
    return t.reshape(-1) if t.ndim else t.expand(x.shape[0])


def check_count(n: int, name: str) -> None:
    """Refuse a count that is no whole number >= 1."""
    if not isinstance(n, int) or n < 1:
        raise InputError(f"{name} must be at least 1 (a whole number), got {n!r}")


def positive(value: float, name: str, or_zero: bool = False) -> float:
    """value as a float, refused unless it is a finite number > 0 (>= 0 with or_zero)."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not (math.isfinite(number) and (number > 0 or (or_zero and number == 0))):
        kind = "a finite number >= 0" if or_zero else "a positive number"
        raise InputError(f"{name} must be {kind}, got {_short(value)}")
    return number


def as_numbers(values: Any, name: str) -> Tensor:
    """Numbers, nested lists of them or a tensor as float64: typed digits are kept."""
    if isinstance(values, Tensor):
        check_plain(values, name)
        if values.is_complex():
            raise InputError(f"{name} must be real numbers, got {values.dtype}")
    try:
        return torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f"{name} must be a number, a tensor or a list of numbers, got {_short(values)}") from None


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def check_time(t: Time, name: str = "t") -> None:
    """Refuse a time outside [0, 1] or not finite."""
    if not isinstance(t, Tensor | float | int):
        raise InputError(f"{name} must be a float or a floating-point tensor, got {_short(t)}")
    if isinstance(t, Tensor):
        if not t.is_floating_point():
            raise InputError(f"{name} must be a float or a floating-point tensor, got dtype {t.dtype}")
        check_plain(t, name)
        inside = bool(((t >= 0) & (t <= 1)).all())
    else:
        inside = math.isfinite(t) and 0 <= t <= 1
    if not inside:
        raise InputError(f"{name} must lie in [0, 1] (0 is noise, 1 is data), got {_brief(t)}")


def check_order(s: Time, u: Time) -> None:
    """Refuse inner times with s > u."""
    ordered = (torch.as_tensor(s) <= torch.as_tensor(u)).all()
    if not bool(ordered):
        raise InputError(f"inner times must satisfy s <= u, got s = {_brief(s)}, u = {_brief(u)}")


def check_plain(x: Tensor, name: str, shape_alone: bool = False) -> None:
    """Refuse a tensor that is sparse, nested or quantized, or without numbers (on the meta device) if they are needed.

    Args:
        x: any tensor.
        name: what it is called in a message.
        shape_alone: whether its shape will do.
    """
    kinds = {"meta": x.is_meta and not shape_alone, "nested": x.is_nested, "quantized": x.is_quantized}
    kinds["sparse"] = not x.is_nested and x.layout != torch.strided
    kind = next((name for name, holds in kinds.items() if holds), None)
    if kind is not None:
        raise InputError(
            f"{name} must be an ordinary, dense tensor, got a {kind} one: make it with .to_dense() or anew"
        )


def check_state(x: Tensor, name: str = "x", event_shape: tuple[int, ...] | None = None) -> None:
    """Refuse a state that is no floating-point (B, *event) tensor."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name} must be a floating-point tensor, got {given}; convert it with .float()")
    check_plain(x, name, shape_alone=True)
    if x.ndim < 2:
        raise InputError(f"{name} must have shape (B, *event), got {tuple(x.shape)}; add a batch dimension")
    if event_shape is not None and tuple(x.shape[1:]) != tuple(event_shape):
        raise InputError(f"{name} must have event shape {tuple(event_shape)}, got {tuple(x.shape[1:])}")


def check_finite(x: Tensor, name: str) -> None:
    """Refuse states that hold NaN or infinity: whatever is drawn from them would hold it too."""
    check_plain(x, name)
    bad = ~x.detach().flatten(1).isfinite().all(1)
    if bool(bad.any()):
        raise InputError(f"{name} is not finite in {int(bad.sum())} of {len(x)} rows: look where it comes from")


def check_same(x: Tensor, y: Tensor, names: str) -> None:
    """Refuse two states that differ in shape, dtype or device."""
    for what, a, b in (
        ("shape", tuple(x.shape), tuple(y.shape)),
        ("dtype", x.dtype, y.dtype),
        ("device", x.device, y.device),
    ):
        if a != b:
            raise InputError(f"{names} must have the same {what}, got {a} and {b}")


def event_sum(x: Tensor) -> Tensor:
    """Sum over the event dimensions: (B, *event) -> (B,)."""
    return x.flatten(1).sum(1)


def _brief(t: Time) -> str:
    if not isinstance(t, Tensor):
        return repr(t)
    if t.numel() == 1:
        return repr(float(t))
    return f"values in [{float(t.min()):g}, {float(t.max()):g}]"


def select_cond(cond: Cond, rows: slice | Tensor) -> Cond:
    """The condition of some rows of a batch."""
    return None if cond is None else {name: value[rows] for name, value in cond.items()}


def first_cond(cond: Cond, rows: int) -> Cond:
    """The first row's condition for ``rows`` rows."""
    return None if not cond else {name: value[:1].expand(rows, *value.shape[1:]) for name, value in cond.items()}


def repeat_cond(cond: Cond, copies: int) -> Cond:
    """The condition of ``copies`` copies of a batch, stacked block by block."""
    return None if cond is None else {name: value.repeat(copies, *_ones(value)) for name, value in cond.items()}


def mask_over(mask: Any, x: Tensor) -> Tensor:
    """The mask of padded samples, 1 where a sample is, shaped to multiply them.

    Args:
        mask: (B, *event) or its first dimensions, of zeros and ones.
        x: (B, *event).
    """
    leading = isinstance(mask, Tensor) and mask.ndim <= x.ndim and mask.shape == x.shape[: mask.ndim] and mask.ndim > 1
    if not leading:
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"condition 'mask' must be a tensor of shape {tuple(x.shape)} or its first dimensions, got {given}"
        )
    if not mask.is_meta and not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("condition 'mask' must hold 0 (padding) and 1 (a sample's own)")
    kept: Tensor = mask.to(x)
    return kept.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))


def repeat_rows(x: Tensor, copies: int) -> Tensor:
    """``copies`` copies of a batch, stacked block by block: (B, …) -> (copies · B, …)."""
    return x.repeat(copies, *_ones(x))


def _ones(x: Tensor) -> list[int]:
    return [1] * (x.ndim - 1)
