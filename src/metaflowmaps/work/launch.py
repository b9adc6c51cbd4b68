"""This process among those that torchrun started, by the environment alone: nothing heavy is imported."""

import os
from typing import NamedTuple

from metaflowmaps.errors import InputError


class Launch(NamedTuple):
    """This process's place among those that torchrun started."""

    rank: int
    size: int
    local_rank: int


def launched() -> Launch:
    """What torchrun said; a process that it did not start is the only one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    told = [os.environ.get(name) for name in names]
    if not all(told):
        return Launch(0, 1, 0)
    numbers = [int(text) if text is not None and text.isdecimal() else -1 for text in told[:3]]
    place = Launch(*numbers)
    if min(numbers) < 0 or place.rank >= place.size:
        said = " ".join(f"{name}={text}" for name, text in zip(names[:3], told, strict=False))
        raise InputError(f"{said}: ranks are 0 to WORLD_SIZE − 1, as torchrun sets them; unset RANK to run alone")
    return place


def reported_by_first_rank(error: BaseException) -> bool:
    """Whether the first rank reports this error, so that this one need not."""
    return launched().rank > 0 and getattr(error, "raised_by_all_ranks", False)
