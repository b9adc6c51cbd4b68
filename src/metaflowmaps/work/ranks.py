"""Several processes as one run: what the first rank does for all, and what all of them do together.

``torchrun`` starts a process a rank and tells it its place in the environment. Within :func:`session` these processes
know each other; outside of it a process is alone, of size 1, and everything here costs nothing.

Files belong to the first rank. What can fail goes through :func:`first` or :func:`together`: an error of one rank is
then raised by all of them, instead of leaving the others to wait for one that is gone.
"""

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from metaflowmaps.errors import InputError
from metaflowmaps.work.launch import launched
from metaflowmaps.work.progress import ForgivingStream

PATIENCE = "MFM_RANK_SECONDS"  # for the slowest thing that one rank does alone: drawing, writing, hashing
PATIENCE_SECONDS = 600
SILENT_SECONDS = 5.0  # after which a rank that waits for others says so
LOST = ("connection closed by peer", "connection reset", "gloo/transport", "timed out waiting")  # what backends say
Result = TypeVar("Result")


def alone(command: str) -> None:
    """Refuse to run in several processes."""
    if launched().size > 1:
        raise shared(InputError(f"{command} runs in one process: start it without torchrun"))


@contextmanager
def session() -> Iterator[None]:
    """Join the other ranks while it lasts."""
    if launched().size == 1 or dist.is_initialized():
        yield
        return
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    with _waiting(where):
        _join(where)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in LOST):
            raise RankLost(
                f"another rank is gone ({next(iter(str(error).splitlines()), '')[:120]}): run the same command again, "
                "it goes on from the last checkpoint"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


class RankLost(RuntimeError):
    """A rank died, or did not answer in time."""


def patience() -> timedelta:
    """How long ranks wait for one that does not answer."""
    given = os.environ.get(PATIENCE) or str(PATIENCE_SECONDS)
    if not given.isdecimal() or not 1 <= int(given) <= 10**6:
        raise InputError(
            f"{PATIENCE}={given}: give whole seconds from 1 to 1000000, or leave it out for {PATIENCE_SECONDS}"
        )
    return timedelta(seconds=int(given))


def _join(where: str) -> None:
    both = torch.cuda.is_available() and dist.is_nccl_available()
    timeout = patience()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if both else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        line = next((part for part in str(error).splitlines() if part), type(error).__name__)
        raise InputError(
            f"rank {launched().rank} cannot join the others at {where} ({line[:160]}): give torchrun another "
            "--master-port, or an address that every rank reaches"
        ) from None


@contextmanager
def _waiting(where: str) -> Iterator[None]:
    """Say what this rank waits for, where it does."""
    place = launched()
    line = f"rank {place.rank} waits for the other {place.size - 1} at {where}: are all of them started?\n"
    timer = threading.Timer(SILENT_SECONDS, lambda: ForgivingStream(sys.stderr).write(line))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def rank() -> int:
    """This process's number; 0 outside of a session."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """How many processes there are; 1 outside of a session."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# -- together ----------------------------------------------------------------------------------------------------------


def first(do: Callable[[], Result]) -> Result:
    """What the first rank makes of it, on every rank; an error of it too."""
    if size() == 1:
        return do()
    said: list[Any] = [None, None]
    failed: Exception | None = None
    if rank() == 0:
        try:
            said[0] = do()
        except Exception as error:
            failed, said[1] = error, _packed(error)
    dist.broadcast_object_list(said, src=0)
    if said[1] is not None:
        raise shared(failed or _unpacked(said[1]))
    result: Result = said[0]
    return result


def together(do: Callable[[], Result]) -> Result:
    """Each rank's own result, if all of them have one; otherwise the error of the lowest rank that failed."""
    return _gathered(do, lambda mine: None)[0]


def collected(do: Callable[[], Result]) -> list[Result]:
    """The results of all ranks, in their order; errors as in :func:`together`."""
    return _gathered(do, lambda mine: mine)[1]


def _gathered(do: Callable[[], Result], sent: Callable[[Result], Any]) -> tuple[Result, list[Any]]:
    if size() == 1:
        mine = do()
        return mine, [mine]
    failed: Exception | None = None
    share: tuple[Any, Any] = (None, None)
    try:
        mine = do()
        share = (sent(mine), None)
    except Exception as error:
        failed, share = error, (None, _packed(error))
    shares: list[Any] = [None] * size()
    dist.all_gather_object(shares, share)
    for number, (_, packed) in enumerate(shares):
        if packed is not None:
            raise shared(failed if failed is not None and number == rank() else _unpacked(packed))
    return mine, [part for part, _ in shares]


def total(*values: float) -> list[float]:
    """The sums over the ranks, in float64, the same bits on each."""
    return _reduced(values, dist.ReduceOp.SUM) if size() > 1 else list(values)


def largest(value: int) -> int:
    """The largest of the ranks' values."""
    return int(_reduced((value,), dist.ReduceOp.MAX)[0]) if size() > 1 else value


def _reduced(values: tuple[float, ...], operation: Any) -> list[float]:
    numbers = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(numbers, operation)
    reduced: list[float] = numbers.tolist()
    return reduced


def whole(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors put together, on the first rank's CPU; elsewhere nothing. All ranks must enter."""
    kept = {}
    for name, value in named.items():
        full = value.full_tensor() if hasattr(value, "full_tensor") else value
        if rank() == 0:
            kept[name] = full.detach().cpu()
    return kept


def local(value: Tensor) -> Tensor:
    """The part of a tensor that this rank holds: all of it, where it is not sharded."""
    value = value.detach()
    part: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return part


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, which every rank has, into a tensor or into this rank's part of a sharded one."""
    if hasattr(target, "placements"):
        from torch.distributed.tensor import DTensor, distribute_tensor  # takes long to import

        assert isinstance(target, DTensor)
        placed = source.to(target.device)
        source = distribute_tensor(placed, target.device_mesh, target.placements, src_data_rank=None)  # sends nothing
    target.copy_(source)


# -- errors ------------------------------------------------------------------------------------------------------------


def shared(error: Exception) -> Exception:
    """The error, marked as one that every rank raises."""
    error.raised_by_all_ranks = True  # type: ignore[attr-defined]
    return error


def _packed(error: Exception) -> tuple[Exception, BaseException | None]:
    """An error and its cause, which decides the exit code, in a form that can travel."""
    import pickle

    try:
        pickle.loads(pickle.dumps((error, error.__cause__)))
    except Exception:  # an exception may hold anything
        return RuntimeError(f"rank {rank()}: {type(error).__name__}: {error}"), None
    return error, error.__cause__


def _unpacked(packed: tuple[Exception, BaseException | None]) -> Exception:
    error, cause = packed
    error.__cause__ = cause
    return error
