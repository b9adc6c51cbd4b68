"""Code outside the package that a file names: it is run where its user has chosen it, and nowhere else.

A checkpoint keeps where the class of its network or of its data is (``file.py:Name``, ``package.module:Name``), and
whoever wrote the checkpoint wrote that name. What a file names is therefore imported only where this process has it
already, where this user typed it in an earlier command, or where ``MFM_CODE`` lists it. What was typed is remembered
by its content, in a folder of the user's: an edited file, or another one at its place, has to be typed anew.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path

from metaflowmaps.errors import InputError

ALLOWED = "MFM_CODE"  # files and modules that may be imported, apart as in PATH
_by_a_file: ContextVar[bool] = ContextVar("named_by_a_file", default=False)


@contextmanager
def named_by_a_file() -> Iterator[None]:
    """The names that are resolved meanwhile come from a file, not from the user."""
    before = _by_a_file.set(True)
    try:
        yield
    finally:
        _by_a_file.reset(before)


def admit(place: str, content: bytes) -> None:
    """Refuse code that a file names and its user never chose; remember what the user chose.

    Args:
        place: the resolved path of a file, or the name of a module.
        content: what the file holds; of a module its name.
    """
    mark = remembered() / sha256(content).hexdigest()
    if mark.exists():
        return
    if _by_a_file.get() and place not in _allowed():
        raise InputError(
            f"names {place}, code that you have not run as it is now: read it, and where you trust it put "
            f"{ALLOWED}={place} before the command"
        )
    from metaflowmaps._files import write_whole  # brings torch, which help does without

    with suppress(OSError):  # where nothing can be remembered, it is typed each time
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_whole(mark, f"{place}\n".encode(), durable=False)


def remembered() -> Path:
    """The folder of what was typed: a file for each, called by the hash of the content."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state) / "metaflowmaps" / "code"


def _allowed() -> set[str]:
    listed = [part for part in os.environ.get(ALLOWED, "").split(os.pathsep) if part]
    return {str(Path(part).expanduser().resolve()) if part.endswith(".py") else part for part in listed}
