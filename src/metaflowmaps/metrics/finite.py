"""What is not finite is never a good score: samples are checked where they come in, and roots keep NaN."""

import math

import torch
from torch import Tensor

from metaflowmaps._shapes import check_plain
from metaflowmaps.errors import InputError


def check_finite(x: Tensor, what: str) -> Tensor:
    """x as it is; refused where it holds a value that is not finite.

    Args:
        x: any tensor.
        what: it is called in a message.

    Returns:
        x.
    """
    if not x.isfinite().all():
        raise InputError(f"{what} of shape {tuple(x.shape)} hold NaN or infinite values: remove those rows")
    return x


def finite_rows(x: Tensor, what: str, least: int = 2) -> Tensor:
    """x (n, …) in float64 on the CPU, refused when it has too few rows, no columns or a value that is not finite.

    Args:
        x: (n, …).
        what: they are called in a message.
        least: rows that are needed.

    Returns:
        x in float64 on the CPU.
    """
    check_plain(x, what)
    if x.ndim < 2 or len(x) < least or x[0].numel() == 0:
        raise InputError(f"{what} of at least {least} rows (n, …) are needed, got shape {tuple(x.shape)}")
    return check_finite(x.detach().to("cpu", torch.float64), what)


def root(squared: float) -> float:
    """√ of an estimated square, which chance may put below 0, as 0 then; of NaN, NaN.

    Args:
        squared: the estimate.

    Returns:
        Its root.
    """
    return 0.0 if squared < 0 else math.sqrt(squared)
