"""An accelerator without the hardware: within :func:`other_device`, ``device="lazy"`` is one, computed with here.

As on a GPU, an operation on tensors of two devices is an error, but for single numbers and indices of the processor; so
is a generator of another device, and NumPy takes nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("lazy")  # a name that torch knows and that starts no driver
aten = torch.ops.aten
ACROSS = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Held(Tensor):
    """A tensor that says it is elsewhere."""

    @staticmethod
    def __new__(cls, here: Tensor):
        at = {"strides": here.stride(), "storage_offset": here.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, here.shape, dtype=here.dtype, device=DEVICE, **at)

    def __init__(self, here: Tensor):
        self.here = here

    def tolist(self):
        return self.here.tolist()

    def numpy(self, *_):
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    """What is made for the device, or from what is there, is held there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """Tensors of Python's numbers are made past all dispatch: here, and then moved."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.new_tensor:
            like, *args = args
            func, kwargs = torch.tensor, {"dtype": None, "device": like.device, **kwargs}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and not isinstance(args[0], Tensor):
            return func(*args, **{**kwargs, "device": "cpu"}).to(device)
        return func(*args, **kwargs)


@contextmanager
def other_device() -> Iterator[torch.device]:
    """The device, for as long as this lasts."""
    with _Numbers(), _Operations():
        yield DEVICE


def compute(func, args, kwargs):
    """An operation where its tensors are."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = any(isinstance(x, Held) for x in tensors)
    if there and func not in ACROSS and any(x.ndim and not isinstance(x, Held) for x in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, found cpu and {DEVICE} in {func}")
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu") if there else kwargs["device"]}
    if there and kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a {DEVICE} generator, found {kwargs['generator'].device} in {func}")
    inside = tree_map_only(Held, lambda x: x.here, (args, kwargs))
    out = func(*inside[0], **inside[1])
    if func._schema.is_mutable:
        written = {id(x.here): x for x in tensors if isinstance(x, Held)}
        return tree_map_only(Tensor, lambda x: written.get(id(x), x), out)
    if not there:
        return out
    return tree_map_only(Tensor, lambda x: x if isinstance(x, Held) else Held(x), out)
