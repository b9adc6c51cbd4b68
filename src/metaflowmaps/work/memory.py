"""Memory: what to do when it runs out, the same everywhere (half as many rows at a time), and how not to use it up."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")
_SIGNS = ("out of memory", "can't allocate memory")  # of an accelerator; of the processor


def is_out_of_memory(error: BaseException) -> bool:
    """Does an error, or what caused it, say that memory ran out?"""
    text = str(error).lower()
    if any(sign in text for sign in _SIGNS):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)


def halving(make: Callable[[int, int], T], begin: int, end: int, unit: int = 1) -> list[T]:
    """``make(begin, end)``, in two halves where memory runs out, and so on down to ``unit`` rows.

    Args:
        make: what is made of the rows begin to end − 1.
        begin: the first row.
        end: one after the last row.
        unit: rows that stay together.

    Returns:
        What was made, in order; one piece where memory sufficed.
    """
    rows = end - begin
    try:
        return [make(begin, end)]
    except (RuntimeError, ValueError) as error:  # a reward's own failure comes as a ValueError of ours
        if rows <= unit or not is_out_of_memory(error):
            raise
    # outside of the handler: there the traceback still holds on to the tensors of the attempt
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = begin + max(unit, rows // 2 // unit * unit)
    return halving(make, begin, middle, unit) + halving(make, middle, end, unit)


@contextmanager
def frozen(*things: Any) -> Iterator[None]:
    """No weight of these requires a gradient inside: a gradient in the state keeps half of what it would keep.

    Args:
        things: modules, or objects that hold modules; of other things nothing is asked.
    """
    weights = {id(w): w for thing in things for module in _modules(thing) for w in module.parameters()}
    thawed = [w for w in weights.values() if w.requires_grad]
    try:
        for weight in thawed:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in thawed:
            weight.requires_grad_(True)


def _modules(thing: Any) -> list[nn.Module]:
    if isinstance(thing, nn.Module):
        return [thing]
    held = list(getattr(thing, "__dict__", {}).values())
    held += [part for parts in held if isinstance(parts, list | tuple) for part in parts]
    return [module for part in held if part is not thing for module in _modules_of_part(part)]


def _modules_of_part(part: Any) -> list[nn.Module]:
    """One level down: a composition of rewards holds rewards that hold modules."""
    if isinstance(part, nn.Module):
        return [part]
    return [inner for inner in getattr(part, "__dict__", {}).values() if isinstance(inner, nn.Module)]
