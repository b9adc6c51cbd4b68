"""Every write to disk, whole or not at all, and every lock between processes."""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, data: bytes, replace: bool = True) -> None:
    """Write a file whole or not at all, under a name of this process's own until it is on the disk.

    Without ``replace`` one that is there stays: of two that come at once, one wins.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not replace:
            try:
                os.link(temporary, path)
                return
            except FileExistsError:
                return
            except OSError:  # no links on this file system
                pass
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(directory: Path) -> None:
    """Make the names in a directory durable; some network file systems cannot, and say EINVAL."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def lock(path: Path, wait: bool = True) -> int | None:
    """An advisory lock, held until the number returned is closed; None where another process has it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(file)
        return None
    except (ImportError, OSError):  # neither here: the work may be done twice, to the same end
        pass
    except BaseException:
        os.close(file)
        raise
    return file


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock; False where another process has it."""
    file = lock(path, wait)
    try:
        yield file is not None
    finally:
        if file is not None:
            os.close(file)
