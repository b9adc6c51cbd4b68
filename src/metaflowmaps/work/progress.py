"""Progress: a bar on a terminal or below a notebook's cell, and of long runs a few plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar

from metaflowmaps.work.durations import spoken, spoken_range
from metaflowmaps.work.notebook import CellProgress, in_notebook

T = TypeVar("T")
SILENT_SECONDS = 5.0  # between two lines: what takes less says nothing


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


def counted(
    items: Iterable[T], say: Callable[[str], None], what: str, weight: Callable[[T], float] = lambda item: 1.0
) -> Iterator[T]:
    """The items; while they are worked through, a line every few seconds says how many are done and what time is left.

    Args:
        items: what is worked through.
        say: takes a line.
        what: the items are called in it.
        weight: how much work an item is, in any unit.
    """
    everything = list(items)
    total, done = sum(map(weight, everything)), 0.0
    began = said = time.monotonic()
    for number, item in enumerate(everything):
        now = time.monotonic()
        if done and now - said >= SILENT_SECONDS:
            left = (now - began) / done * (total - done)
            say(f"{number} of {len(everything)} {what} done, {spoken_range(left)} left")
            said = now
        yield item
        done += weight(item)


class Bar:
    """A bar of counted work: ``with Bar(total, title) as bar: … bar.advance()``; a total of 0 shows nothing.

    Where nobody sees a bar it is a line every few seconds.
    """

    def __init__(self, total: int, title: str) -> None:
        self._progress: Any = None
        self._lines: Iterator[int] | None = None
        if total and not _is_watched():
            self._lines = counted(range(total), partial(_plain_line, title), "steps")
            next(self._lines)
        elif total:
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
        for _ in range(by if self._lines is not None else 0):
            next(self._lines, None)  # type: ignore[arg-type]


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
        left = "" if now.step == now.steps or not rate else f", {spoken((now.steps - now.step) / rate)} left"
        speed = f"loss {now.metrics['loss']:.3g}, {rate:.0f} steps a second"
        say(f"{stage}: step {now.step:,} of {now.steps:,}, {speed}{left}")

    return report


def _plain_line(title: str, line: str) -> None:
    print(f"{title}: {line}", file=ForgivingStream(sys.stderr), flush=True)


def _is_watched() -> bool:
    """Whether bars are seen: on a terminal, or in a notebook."""
    return bool(sys.stderr.isatty()) or in_notebook()


def _rate(now: StepReport) -> float:
    return now.step / now.seconds if now.seconds else 0.0


def _progress(*columns: Any) -> Any:
    from rich.console import Console  # by those who show something
    from rich.progress import Progress

    return Progress(*columns, console=Console(file=ForgivingStream(sys.stderr)))  # type: ignore[arg-type]
