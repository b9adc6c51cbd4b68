"""Progress: a bar on a terminal or below a notebook's cell, and of long runs a few plain lines elsewhere."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Protocol

from metaflowmaps.work.notebook import CellProgress, in_notebook


class ForgivingStream:
    """A stream for progress, which may fail where work may not: what cannot be written is dropped.

    Args:
        stream: stderr, say, on a full disk, closed, or to a reader who left.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or not."""
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or not."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Bar:
    """A bar of counted work: ``with Bar(total, title) as bar: … bar.advance()``; a total of 0 shows nothing."""

    def __init__(self, total: int, title: str) -> None:
        self._progress: Any = None
        if total:
            self._progress = CellProgress() if in_notebook() else _progress()
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


class StepReport(Protocol):
    """Where a run stands: a step of so many, the seconds until it, what was measured."""

    step: int
    steps: int
    seconds: float
    metrics: Mapping[str, float]


Report = Callable[[str, Any], None]  # the name of a stage, and its StepReport


@contextmanager
def training_progress(say: Callable[[str], None]) -> Iterator[Report]:
    """A ``report(stage, step)`` that shows where a run stands: loss, speed and time left.

    Args:
        say: Takes a line, where there is no terminal: one for each tenth of the way.
    """
    if not sys.stderr.isatty():
        yield _plain(say)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:5s}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[rate]:.0f} steps/s  left"),
        TimeRemainingColumn(),
    )
    with _progress(*columns) as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, now: StepReport) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=now.steps, loss="–", rate=0.0)
            progress.update(tasks[stage], completed=now.step, loss=f"{now.metrics['loss']:.2e}", rate=_rate(now))

        yield report


def _plain(say: Callable[[str], None]) -> Report:
    shown: dict[str, int] = {}

    def report(stage: str, now: StepReport) -> None:
        tenth = 10 * now.step // now.steps
        if shown.get(stage) == tenth:
            return
        shown[stage] = tenth
        rate = _rate(now)
        left = (now.steps - now.step) / rate if rate else 0.0
        loss = now.metrics["loss"]
        say(f"{stage}: step {now.step}/{now.steps}  loss {loss:.3e}  {rate:.0f} steps/s  {left:.0f} s left")

    return report


def _rate(now: StepReport) -> float:
    return now.step / now.seconds if now.seconds else 0.0


def _progress(*columns: Any) -> Any:
    from rich.console import Console  # by those who show something
    from rich.progress import Progress

    return Progress(*columns, console=Console(file=ForgivingStream(sys.stderr)))  # type: ignore[arg-type]
