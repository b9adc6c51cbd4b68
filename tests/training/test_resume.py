"""A run stopped anywhere and started again ends with the bytes of one that never stopped."""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from metaflowmaps.checkpoint import CheckpointError, CheckpointStore
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.training.loop import Interrupted
from metaflowmaps.training.train_config import TrainConfig
from metaflowmaps.training.training_run import run_training

STEPS = 120


def small(**changes) -> TrainConfig:
    """A run of about a second, most of it spent writing checkpoints; odd intervals, so that nothing lines up."""
    data = gmm().model_dump()
    data["model"]["network"].update(width=16, depth=2)
    data.update(steps=STEPS, batch_size=16, checkpoint_every=7, log_every=5, keep_last=2, threads=1)
    data.update(changes)
    return TrainConfig.model_validate(data)


LEARNED = {"teacher": "learned", "drift_steps": 40, "drift_batch_size": 16, "steps": 60}


def worker(data: dict, out: str, started) -> None:
    torch.set_num_threads(1)
    started.set()
    try:
        run_training(TrainConfig.model_validate(data), Path(out))
    except Interrupted:
        os._exit(130)
    os._exit(0)


def fingerprint(out: Path) -> dict[str, str]:
    """The hash of every file that must not depend on interruptions."""
    files = [p for p in out.rglob("*") if p.is_file() and p.name != "timings.jsonl"]
    assert files
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def hidden(out: Path, pattern: str) -> bool:
    """Is there a checkpoint in the making? One that vanishes while one looks for it was."""
    try:
        return any(out.glob(f"**/checkpoints/{pattern}"))
    except FileNotFoundError:
        return True


def await_records(out: Path, count: int, process) -> None:
    """Until so many records more were written, or the process has ended."""
    seen, last = 0, recorded(out)
    deadline = time.monotonic() + 300
    while seen < count and process.is_alive():
        assert time.monotonic() < deadline
        now = recorded(out)
        seen, last = seen + (now != last), now


def recorded(out: Path) -> int:
    """When the last record was written."""
    files = [out / "metrics.jsonl", out / "drift" / "metrics.jsonl"]
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)


def run_with_kills(config: TrainConfig, out: Path, kills: int, seed: int) -> tuple[int, int]:
    """Start, stop at a random moment, start again, until it is done. Returns (kills, of which while writing)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["metaflowmaps.training.training_run", "metaflowmaps.recipes"])
    rng, killed, writing = random.Random(seed), 0, 0
    for _ in range(20 * kills):
        started = context.Event()
        process = context.Process(target=worker, args=(config.model_dump(), str(out), started))
        process.start()
        assert started.wait(300)
        if killed < kills:
            # every second kill waits for a checkpoint in the making, the others for a random number of records: by
            # the clock a fast machine would be done before it was killed often
            if killed % 2:
                deadline = time.monotonic() + 300
                while not hidden(out, ".tmp-*") and process.is_alive():
                    assert time.monotonic() < deadline
                time.sleep(rng.uniform(0, 0.004))
            else:
                await_records(out, rng.randint(0, 2), process)
                time.sleep(rng.uniform(0, 0.004))
            number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            if process.is_alive():
                os.kill(process.pid, number)
                killed += 1
        process.join(120)
        writing += hidden(out, ".*")
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    return killed, writing


# `make attack` kills often enough to be sure to hit the writing of checkpoints; the suite, enough to see a break
OFTEN = "MFM_ATTACK" in os.environ
KILLS = [({"steps": 5 * STEPS}, 24, 1), (LEARNED, 6, 2)] if OFTEN else [({"steps": 2 * STEPS}, 6, 1), (LEARNED, 3, 2)]


@pytest.mark.parametrize(("changes", "kills", "seed"), KILLS, ids=["exact", "learned"])
@pytest.mark.attack
def test_killed_at_random_moments(tmp_path, changes, kills, seed):
    config = small(**changes)
    torch.set_num_threads(1)
    run_training(config, tmp_path / "whole")
    killed, writing = run_with_kills(config, tmp_path / "killed", kills, seed)
    assert killed >= max(1, kills - 4), "the run must be long enough to be killed often"
    if kills > 20:
        assert killed >= 20
        assert writing >= 3, "some kills must fall into the writing of a checkpoint"
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")


def test_disk_full_at_every_write(tmp_path, monkeypatch):
    """The n-th fsync fails, for many n: the run ends with one line, and the same command then ends as if it had not."""
    torch.set_num_threads(1)
    config = small(steps=30)
    run_training(config, tmp_path / "whole")
    real, out = os.fsync, tmp_path / "full"
    failures, lines = 0, []
    for failing in (1, 2, 3, 5, 8, 13, 21):
        calls = 0

        def fsync(descriptor: int, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            run_training(config, out)
        except (CheckpointError, OSError) as error:
            failures += 1
            lines.append(str(error))
    monkeypatch.undo()
    assert failures >= 5
    assert not any("\n" in line for line in lines)
    run_training(config, out)
    assert fingerprint(out) == fingerprint(tmp_path / "whole")


def test_a_damaged_newest_checkpoint_is_skipped_and_said(tmp_path):
    torch.set_num_threads(1)
    config = small(steps=30)
    run_training(config, tmp_path / "whole")
    run_training(config, tmp_path / "damaged")
    newest = CheckpointStore(tmp_path / "damaged" / "checkpoints").path(30)
    weights = newest / "optimizer.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.warns(UserWarning, match="optimizer.safetensors"):
        run_training(config, tmp_path / "damaged")
    assert fingerprint(tmp_path / "damaged") == fingerprint(tmp_path / "whole")
