"""A processor that rounds otherwise, for ``pytest --rounding``: what holds on this machine alone is then red.

Matrix products and convolutions add in an order that depends on the processor, on its threads, on the shapes of
the batch and on where in it a row stands. Here each row of such a result is moved by a unit of rounding, up, down or
not at all, as a function of its shape and of the row. Equal calls stay equal to the bit; a row alone and that row
among others differ.
"""

import warnings

import torch
from torch import Tensor

aten = torch.ops.aten
_library = torch.library.Library("aten", "IMPL")  # what it replaces stays replaced for as long as this lives


def rounded_otherwise(out: Tensor) -> Tensor:
    """The rows of a result, moved by at most one unit of rounding each, in place."""
    if out.ndim and out.is_floating_point() and out.numel():
        rows = out.shape[:-1].numel() if out.ndim == 2 else len(out)
        turn = (torch.arange(rows) * 5 + out.numel()) % 3 - 1
        scale = 1 + turn.to(out.dtype) * torch.finfo(out.dtype).eps
        out.mul_(scale.reshape(-1, *[1] * (out.ndim - 1)))
    return out


def install() -> None:
    """Replace the processor's matrix products and convolutions, in this process."""

    def mm(a, b):
        return rounded_otherwise(aten.mm.out(a, b, out=a.new_empty(a.shape[0], b.shape[1])))

    def addmm(bias, a, b, *, beta=1, alpha=1):
        out = a.new_empty(a.shape[0], b.shape[1])
        return rounded_otherwise(aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=out))

    def bmm(a, b):
        return rounded_otherwise(aten.bmm.out(a, b, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2])))

    def baddbmm(bias, a, b, *, beta=1, alpha=1):
        out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
        return rounded_otherwise(aten.baddbmm.out(bias, a, b, beta=beta, alpha=alpha, out=out))

    def convolution(*arguments):
        return rounded_otherwise(aten._convolution(*arguments, False, False, True, True))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that a kernel is replaced
        for kernel in (mm, addmm, bmm, baddbmm, convolution):
            _library.impl(kernel.__name__, kernel, "CPU")
