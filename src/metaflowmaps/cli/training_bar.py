"""Progress of a training run: a bar with loss, speed and time left on a terminal, a few plain lines elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from metaflowmaps.training.config import RunConfig
from metaflowmaps.training.loop import Record

Report = Callable[[str, Record], None]


@contextmanager
def training_progress(config: RunConfig, say: Callable[[str], None]) -> Iterator[Report]:
    """A ``report(stage, record)`` that shows where the run stands."""
    if not sys.stderr.isatty():
        yield _plain(say)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:5s}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[rate]:.0f} steps/s  left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks = {}

        def report(stage: str, record: Record) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=record.steps, loss="–", rate=0.0)
            rate = record.step / record.seconds if record.seconds else 0.0
            bar.update(tasks[stage], completed=record.step, loss=f"{record.metrics['loss']:.2e}", rate=rate)

        yield report


def _plain(say: Callable[[str], None]) -> Report:
    """A line each tenth of the way."""
    shown: dict[str, int] = {}

    def report(stage: str, record: Record) -> None:
        tenth = 10 * record.step // record.steps
        if shown.get(stage) == tenth:
            return
        shown[stage] = tenth
        rate = record.step / record.seconds if record.seconds else 0.0
        left = (record.steps - record.step) / rate if rate else 0.0
        say(
            f"{stage}: step {record.step}/{record.steps}  loss {record.metrics['loss']:.3e}  {rate:.0f} steps/s  "
            f"{left:.0f} s left"
        )

    return report
