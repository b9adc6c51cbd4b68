"""Every write to disk, whole or not at all; bounded reads of regular files alone; every lock between processes."""

import errno
import json
import math
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from metaflowmaps.errors import InputError

MAX_DOCUMENT_BYTES = 2**28  # of a JSON file that is read whole; the largest that is written has a few megabytes
STALE_SECONDS = 3600.0  # after which a file that is half written belongs to nobody: writing one takes a few


def read_regular(path: Path, most: int = MAX_DOCUMENT_BYTES) -> bytes:
    """The bytes of a file that is one: a pipe would never end, nor would a link to ``/dev/zero``.

    Args:
        path: The file.
        most: Bytes that are read at most; a larger file is refused.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path} is no regular file: give a file that lies on a disk")
        if found.st_size > most:
            raise InputError(f"{path} has {found.st_size:,} bytes, and at most {most:,} are read: give a smaller file")
        return file.read(most)


def check_regular(path: Path) -> None:
    """Refuse what is there and no regular file, before somebody opens it who would wait for a pipe."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no regular file: give a file that lies on a disk")


def write_new(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file that is not there yet, and wait until the disk has it; ``durable=False``: do not wait."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())


def write_whole(path: Path, data: bytes, *, replace: bool = True, durable: bool = True) -> None:
    """Write a file whole or not at all: under a name of this process's own first, then renamed.

    Args:
        path: The file.
        data: What it is to hold.
        replace: Whether a file that is there gives way; without it, of two processes that come at once one wins.
        durable: Whether to wait until the disk has it, so that it survives a power cut.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
    try:
        write_new(temporary, data, durable=durable)
        if not replace:
            try:
                os.link(temporary, path)
                return
            except FileExistsError:
                return
            except OSError:  # no links on this file system
                pass
        temporary.replace(path)
        if durable:
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The value with null for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any, *, replace: bool = True) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode(), replace=replace)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    # to bytes first: writing them here gives an OSError, which callers know how to report
    write_whole(path, save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can: Windows and some network file systems cannot."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sweep(folder: Path, seconds: float = STALE_SECONDS) -> None:
    """Remove what processes that were killed have left half written in a folder, ``seconds`` ago or more."""
    for file in folder.glob(".*.tmp"):
        with suppress(OSError):  # another process may be at the same
            if time.time() - file.stat().st_mtime >= seconds:
                file.unlink()


def lock(path: Path, *, wait: bool = True, shared: bool = False) -> int | None:
    """An advisory lock, held until the number returned is closed; None where another process is in the way.

    Args:
        path: The lock's own file, made if need be.
        wait: Whether to wait for the other process.
        shared: Whether others may hold it too, if they share it.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(file)
        return None
    except (ImportError, OSError):  # neither here: the work may be done twice, to the same end
        pass
    except BaseException:
        os.close(file)
        raise
    return file


def share_lock(file: int) -> None:
    """Let others in who share a lock that was held alone."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(file, fcntl.LOCK_SH)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock; False where another process has it."""
    file = lock(path, wait=wait)
    try:
        yield file is not None
    finally:
        if file is not None:
            os.close(file)
