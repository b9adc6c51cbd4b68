r"""The training loop, written once.

It knows a model (a map or a classifier), an objective (``batch(model, step)`` and ``objective(model, batch) -> (B,)``)
and a place on disk.
A batch is a function of (seed, step) and, for objectives that learn on their way, of a state that they hand over as
``state_dict()``. A checkpoint holds everything, so a run that is stopped anywhere and started again by the same command
ends with the bytes of one that never stopped, on one kind of processor with as many threads.
Several ranks run the same loop on shares of the batch
(:mod:`metaflowmaps.training.distributed`); the first of them keeps the files. In a run's directory:

    run.json            the resolved configuration        checkpoints/step-…   see metaflowmaps.checkpoint
    metrics.jsonl       one record every log_every steps  timings.jsonl        seconds, the only file that may differ

An accelerator works through what it was told while the loop tells it more, until the loop asks for a number. So there
losses and gradient norms are read where they are logged, and before every checkpoint; on a processor at every step.
"""

import copy
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from metaflowmaps.checkpoint import Checkpoint, CheckpointStore
from metaflowmaps.training.distributed import check_division, clip, share, spread, sum_gradients
from metaflowmaps.training.run_log import Record, RunLog
from metaflowmaps.training.state import TrainState, learning_rate
from metaflowmaps.training.trackers import Tracker
from metaflowmaps.training.train_config import RunConfig
from metaflowmaps.work import ranks
from metaflowmaps.work.choices import choose

READ_AT_EVERY_STEP = ("cpu",)  # devices that nobody waits for


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became non-finite; the last checkpoint is untouched."""


class Rows(Protocol):
    """A batch whose rows can be taken apart."""

    def __len__(self) -> int: ...

    def rows(self, start: int, end: int) -> "Rows": ...

    def to(self, device: torch.device) -> "Rows": ...

    def about(self, rows: Tensor) -> str:
        """What these rows have in common, for a message."""
        ...


class TrainingObjective(Protocol):
    """What the loop asks of an objective."""

    def batch(self, model: Any, step: int) -> Any: ...

    def __call__(self, model: Any, batch: Any) -> Tensor: ...


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands at its end."""

    step: int
    loss: float
    seconds: float
    checkpoint: Path


@dataclass(frozen=True)
class Watch:
    """Who is told what while a run lasts."""

    report: Callable[[str, Record], None] = lambda stage, record: None
    # (averaged model, step), every sample_every steps: True ends the run, the path of a figure goes to the tracker
    on_sample: Callable[[Any, int], object] | None = None
    note: Callable[[str], None] = lambda line: None  # how the run is set up, in lines
    stage: str = "map"  # what is trained


def train(
    model: nn.Module,
    objective: TrainingObjective,
    config: RunConfig,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    start: Checkpoint | None = None,
    watch: Watch = Watch(),  # frozen
) -> TrainResult:
    """Run ``config.steps`` steps in ``out``.

    Args:
        model: what is trained, in place.
        objective: its batches and their losses.
        config: how.
        out: the run's directory.
        device: where.
        start: the checkpoint to go on from, of this run or of another; None begins.
        watch: who is told; True from ``on_sample`` ends the run there.
    """
    run = _TrainingRun(model, objective, config, out, torch.device(device), watch)
    run.resume(start)
    with _stop_signals() as stopped:
        while not run.ended:
            batch = objective.batch(model, run.state.step)
            losses = run.backward(batch)  # in pieces: neither its inputs nor its sum depend on how many
            norm = clip(run.parameters, config.optimizer.clip)
            run.readings.append(Reading(run.state.step, losses, norm, getattr(batch, "figures", {})))
            if run.looks:
                run.read(batch)
            run.move()
            run.record()
            run.save(ranks.largest(stopped[0] if stopped else 0))  # whichever rank was told, all stop here
    return run.result()


class Reading(NamedTuple):
    """A step's losses (of the pieces of this rank's rows) and gradient norm, on the device, and what is known of it."""

    step: int
    losses: Tensor
    norm: Tensor
    figures: dict[str, float]


class _TrainingRun:
    """A run while it lasts: its state, its files and who watches."""

    def __init__(
        self,
        model: nn.Module,
        objective: TrainingObjective,
        config: RunConfig,
        out: Path,
        device: torch.device,
        watch: Watch,
    ) -> None:
        check_division(config, ranks.size())
        ranks.first(lambda: out.mkdir(parents=True, exist_ok=True))
        self.model, self.objective, self.config = model, objective, config
        self.out, self.device, self.watch = out, device, watch
        # before it is sharded; on CPU until it is looked at
        several = watch.on_sample is not None and config.sample_every and ranks.size() > 1
        self.shown = copy.deepcopy(model).cpu().eval() if several and ranks.rank() == 0 else None
        model.to(device).train()
        self.ranks_a_copy = spread(model, config, device)
        self.state = TrainState(model, config.optimizer, objective)
        self.store = CheckpointStore(out / "checkpoints", config.keep_last, config.keep_best)
        tracker = choose(Tracker, config.track if ranks.rank() == 0 else "none")()
        ranks.together(
            tracker.module if tracker.package else lambda: None
        )  # missing, it is missed before the first step
        self.tracker = tracker
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.readings: list[Reading] = []
        self.enough = False

    def resume(self, start: Checkpoint | None) -> None:
        """Take a checkpoint's state, and open the logs where it left them."""
        if start is not None:
            self.state.load(start)
            if start.path.resolve().parent != self.store.root.resolve():
                self.state.metrics_bytes = 0  # another run's checkpoint: its log stayed there
        self.log = ranks.together(lambda: RunLog(self.out, self.state))
        self.began = time.perf_counter() - self.log.seconds_before
        self.tracked = ranks.together(
            lambda: self.tracker.begin(self.out, self.config.model_dump(mode="json"), self.state.step)
        )

    @property
    def ended(self) -> bool:
        """Whether the last step is done, or ``on_sample`` has seen enough."""
        return self.enough or self.state.step >= self.config.steps

    @property
    def rate(self) -> float:
        """The learning rate of the update that the optimizer makes next, or has made last."""
        return float(self.state.optimizer.param_groups[0]["lr"])

    @property
    def looks(self) -> bool:
        """Whether the step that is being made is read before it moves the weights."""
        after, config = self.state.step + 1, self.config
        due = after % config.log_every == 0 or after % config.checkpoint_every == 0 or after >= config.steps
        return due or self.device.type in READ_AT_EVERY_STEP

    def backward(self, batch: Rows) -> Tensor:
        """The gradient of a whole batch, summed over its pieces and over the ranks; the pieces' losses."""
        rate = learning_rate(self.config.optimizer, self.state.step, self.config.steps)
        for group in self.state.optimizer.param_groups:
            group["lr"] = rate
        self.state.optimizer.zero_grad()
        found = []
        for losses in losses_of(self.model, self.objective, share(batch), self.config, self.device):
            loss = losses.float().sum() / len(batch)
            loss.backward()
            found.append(loss.detach())
        if self.ranks_a_copy == 1 and ranks.size() > 1:
            sum_gradients(self.parameters)
        return torch.stack(found)

    def read(self, batch: Rows | None = None) -> None:
        """Wait for the device, count what it has found since it was last asked, and stop where that is not finite.

        Args:
            batch: of the last step, if it has not moved the weights yet.
        """
        if not self.readings:
            return
        sizes = [len(r.losses) + 1 for r in self.readings]
        numbers = torch.cat([torch.cat([r.losses, r.norm[None]]) for r in self.readings]).cpu()  # one answer for all
        parts = [part.tolist() for part in numbers.split(sizes)]
        losses = ranks.total(*(sum(part[:-1]) for part in parts))
        for reading, loss, norm in zip(self.readings, losses, (part[-1] for part in parts), strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self.stop(reading, loss, norm, batch)
            self.state.add({"loss": loss, "grad_norm": norm, **reading.figures})
        self.readings = []

    def stop(self, reading: Reading, loss: float, norm: float, batch: Rows | None) -> None:
        """Raise at a non-finite loss or gradient, saying where in time it arose if the weights have not moved since."""
        where = "rows that --set log_every=1 names"
        if batch is not None and reading is self.readings[-1]:
            where = self.bad_rows(batch)
        steps = self.store.steps()
        kept = f"the checkpoint of step {steps[-1]} is untouched" if steps else "no checkpoint was written yet"
        raise NonFiniteLoss(
            f"non-finite loss at step {reading.step} (loss {loss:g}, gradient norm {norm:g}) in {where}; {kept}. "
            "Lower optimizer.lr or optimizer.clip, or keep times.last further from 1"
        )

    def bad_rows(self, batch: Rows) -> str:
        """The rows of a batch whose loss is not finite, in words."""
        with torch.no_grad():  # in pieces, as in the step: in one it might not fit
            each = losses_of(self.model, self.objective, share(batch), self.config, self.device)
            mine = torch.cat([~losses.isfinite().cpu() for losses in each])
        bad, size = torch.zeros(len(batch), dtype=torch.bool), ranks.size()
        for number, part in enumerate(ranks.collected(lambda: mine)):
            bad[number::size] = part
        if not bad.any():
            return "the gradient alone"
        return f"{int(bad.sum())} of {len(batch)} rows, with {batch.about(bad)}"

    def move(self) -> None:
        """Move the weights and their average; a step is done then."""
        self.state.optimizer.step()
        self.state.average()
        self.state.step += 1
        if self.watch.on_sample is not None and self.config.sample_every:
            self.enough = self.state.step % self.config.sample_every == 0 and self.look(self.watch.on_sample)

    def look(self, see: Callable[[Any, int], object]) -> bool:
        """Whether ``on_sample`` says that this is enough; the first rank shows it a whole model for all."""
        if ranks.size() == 1:
            with self.state.averaged():
                return self.told(see(self.model, self.state.step))
        weights = ranks.whole(self.state.ema)

        def show() -> bool:
            assert self.shown is not None
            self.shown.load_state_dict(weights)
            try:
                return self.told(see(self.shown.to(self.device), self.state.step))
            finally:
                self.shown.cpu()

        return ranks.first(show)

    def told(self, seen: object) -> bool:
        """Whether what ``on_sample`` returned ends the run; a figure is handed to the tracker."""
        if isinstance(seen, Path):
            self.tracked.picture(self.state.step, f"{self.watch.stage} samples", seen)
            return False
        return bool(seen)

    def record(self) -> None:
        """Log and report, every ``log_every`` steps and at the end."""
        state, config = self.state, self.config
        if state.step % config.log_every and not self.ended:
            return
        self.read()
        record = Record(state.step, config.steps, {**state.flush(), "lr": self.rate}, time.perf_counter() - self.began)

        def publish() -> None:
            self.log.write(record)
            if ranks.rank() == 0:
                self.tracked.scalars(record.step, record.metrics)
                self.watch.report(self.watch.stage, record)

        ranks.together(publish)

    def save(self, stop: int) -> None:
        """A checkpoint every ``checkpoint_every`` steps, at the end, and where signal ``stop`` ends the run."""
        state, config = self.state, self.config
        scheduled = state.step % config.checkpoint_every == 0 or self.ended
        if scheduled or stop:
            self.read()
            ranks.together(self.log.sync)
            state.save(self.store, config, scheduled)
        if stop:  # at the last step too: another stage may follow
            raise Interrupted(
                f"stopped by {signal.Signals(stop).name} at step {state.step} of {config.steps}; state saved in "
                f"{self.out}: the same command goes on from there"
            )

    def result(self) -> TrainResult:
        """Where it stands at its end."""
        seconds = time.perf_counter() - self.began
        self.tracked.close()
        return TrainResult(self.state.step, self.state.last_loss, seconds, self.store.path(self.state.step))


def losses_of(
    model: nn.Module, objective: TrainingObjective, batch: Rows, config: RunConfig, device: torch.device
) -> Iterator[Tensor]:
    """The losses of a batch's rows, one micro-batch at a time, in the precision of the run.

    Args:
        model: what is trained.
        objective: gives each row its loss.
        batch: rows on any device; they are cut into ``config.micro_batches`` pieces, as far as they go.
        config: of the run.
        device: where the model is.

    Yields:
        (b,) losses of each piece; a piece's graph may be freed before the next is asked for.
    """
    width = -(-len(batch) // config.micro_batches)
    for first in range(0, len(batch), width):
        piece = batch.rows(first, first + width).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses = objective(model, piece)
        yield losses


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM fill the list, once; a second one acts at once. Elsewhere than in the main thread: nothing."""
    stopped: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handler(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)

    try:
        for number in before:
            signal.signal(number, handler)
        yield stopped
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)
