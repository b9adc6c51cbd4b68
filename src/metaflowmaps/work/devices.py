"""The device of ``--device``."""

import torch

from metaflowmaps.errors import InputError
from metaflowmaps.work.launch import launched


def pick_device(name: str) -> torch.device:
    """The device of ``--device``: auto, cpu, cuda, cuda:1, mps; of several ranks, each its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if launched().size > 1 and name.startswith("cuda"):
        return _own_gpu(name)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown --device {name!r}: use auto, cpu or cuda") from None
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise InputError(f"--device {name}: this machine has no such GPU; use --device cpu")
    if device.type not in ("cpu", "cuda", "mps") or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"--device {name} is not available here: use auto, cpu or cuda")
    return device


def _own_gpu(name: str) -> torch.device:
    """Each rank on a node has a GPU of its own."""
    number, there = launched().local_rank, torch.cuda.device_count()
    if name != "cuda":
        raise InputError(f"--device {name} is one GPU, and each rank needs its own: use --device cuda")
    if number >= there:
        raise InputError(
            f"a GPU for each rank, and this machine has {there}: torchrun --nproc-per-node {max(there, 1)}"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
