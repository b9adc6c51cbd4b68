"""A bar on stderr for work that is counted."""

from types import TracebackType
from typing import Any


class Bar:
    """``with Bar(total, title) as bar: … bar.advance()``; a total of 0 shows nothing."""

    def __init__(self, total: int, title: str) -> None:
        self._progress: Any = None
        if total:
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(stderr=True))
            self._task = self._progress.add_task(title, total=total)

    def __enter__(self) -> "Bar":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, by: int = 1) -> None:
        """So much more is done."""
        if self._progress is not None:
            self._progress.advance(self._task, by)
