"""This process among those that torchrun started, by the environment alone: nothing heavy is imported."""

import os
from typing import NamedTuple


class Launch(NamedTuple):
    """This process's place among those that torchrun started."""

    rank: int
    size: int
    local_rank: int


def launched() -> Launch:
    """What torchrun said; a process that it did not start is the only one."""
    told = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
    return Launch(*(int(number) for number in told[:3])) if all(told) else Launch(0, 1, 0)  # type: ignore[arg-type]


def reported_by_first_rank(error: BaseException) -> bool:
    """Whether the first rank reports this error, so that this one need not."""
    return launched().rank > 0 and getattr(error, "raised_by_all_ranks", False)
