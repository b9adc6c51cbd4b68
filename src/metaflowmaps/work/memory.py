"""What to do when memory runs out: the same everywhere, half as many rows at a time."""

from collections.abc import Callable
from typing import TypeVar

import torch

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
