"""Progress in a Jupyter notebook: one line below the cell, written anew in place, without widgets."""

import sys
import time
from collections.abc import Callable
from typing import Any

PERIOD_SECONDS = 0.2  # between two lines


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this, which shows what ``display`` is given; IPython on a terminal has none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class CellProgress:
    """What a :class:`~metaflowmaps.work.progress.Bar` needs of rich's ``Progress``, for one task."""

    def __init__(self) -> None:
        self._title, self._total, self._done, self._began, self._written = "", 0, 0, 0.0, 0.0
        self._handle: Any = None

    def add_task(self, title: str, total: int) -> int:
        """Name what is counted."""
        self._title, self._total = title, total
        return 0

    def start(self) -> None:
        """Show the line."""
        from IPython.display import display  # the kernel's

        self._began = time.monotonic()
        self._handle = display(self._line(), raw=True, display_id=True)

    def advance(self, task: int, by: int) -> None:
        """So much more is done."""
        self.reach(self._done + by)

    def reach(self, done: int) -> None:
        """So much is done in all."""
        self._done = done
        if done >= self._total or time.monotonic() - self._written >= PERIOD_SECONDS:
            self._write()

    def stop(self) -> None:
        """Leave the last line."""
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        self._handle.update(self._line(), raw=True)

    def _line(self) -> dict[str, str]:
        text = f"{self._title}: {self._done} of {self._total}"
        if 0 < self._done < self._total:
            left = (time.monotonic() - self._began) / self._done * (self._total - self._done)
            text += f", {left:.0f} s left"
        bar = f'<progress value="{self._done}" max="{self._total}"></progress> {text}'
        return {"text/plain": text, "text/html": bar}


def notebook_report() -> Callable[[str, Any], None]:
    """A ``report(stage, step)`` of a training, which shows a line a stage in a notebook and nothing elsewhere."""
    stages: dict[str, CellProgress] = {}

    def report(stage: str, now: Any) -> None:
        if not in_notebook():
            return
        if stage not in stages:
            stages[stage] = CellProgress()
            stages[stage].add_task(stage, total=now.steps)
            stages[stage].start()
        stages[stage].reach(now.step)

    return report
