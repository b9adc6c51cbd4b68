"""Streams and folders that fail under a command: progress may be lost, work may not, and nothing is lost in silence."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import TINY_RUN, mfm_in_process
from metaflowmaps.training import loop
from metaflowmaps.training.run_log import RunLog

Command = Callable[..., tuple[int, str, str]]


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


class Ascii(io.TextIOWrapper):
    """A stream that has few letters."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii")


OTHERS = [pytest.param(None, marks=pytest.mark.attack), pytest.param(Ascii(), marks=pytest.mark.attack)]


@pytest.mark.parametrize("stream", [Full(), *OTHERS], ids=["full", "closed", "ascii"])
def test_progress_that_cannot_be_written_stops_no_work(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    assert mfm_in_process("train", "gmm", *TINY_RUN, "--out", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run/results.json").read_text())["cost"]["steps"] == 40
    assert sys.stderr is stream  # as it was


@pytest.mark.parametrize(("stream", "code"), [(None, 0), (Ascii(), 0), (Full(), 1)], ids=["closed", "ascii", "full"])
def test_help_to_any_stdout(stream, code, monkeypatch, capsys):
    """Its letters are not all in ASCII; results that cannot be written are an error."""
    monkeypatch.setattr(sys, "stdout", stream)
    assert mfm_in_process("steer", "--help") == code
    err = capsys.readouterr().err
    assert err.count("\n") == code
    assert "Traceback" not in err


@pytest.mark.attack
@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full >/dev/null", ">&-", "<&- >&- 2>&-"])
def test_redirected_by_a_shell(redirected, tmp_path):
    """A descriptor that is closed becomes the next file's: nothing that is written to a stream may land in it."""
    typed = f"{sys.executable} -m metaflowmaps.cli train gmm {' '.join(TINY_RUN)} --out run {redirected}"
    done = subprocess.run(["sh", "-c", typed], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run/results.json").read_text())["cost"]["steps"] == 40
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 8


# -- folders ---------------------------------------------------------------------------------------------------------


def emptied(out: Path) -> None:
    for held in out.iterdir():
        shutil.rmtree(held) if held.is_dir() else held.unlink()


TAKEN = {
    "log removed": lambda out: (out / "metrics.jsonl").unlink(),
    "log cut": lambda out: os.truncate(out / "metrics.jsonl", 3),
    "emptied": emptied,
    "renamed": lambda out: out.rename(out.with_name("elsewhere")),
    "removed": shutil.rmtree,
}


@pytest.mark.parametrize("take", TAKEN.values(), ids=TAKEN)
def test_a_run_whose_files_are_taken_away_says_so(take, tmp_path, monkeypatch, command: Command):
    move = loop._TrainingRun.move

    def taking(run):
        move(run)
        if run.state.step == 22:  # one checkpoint is there
            take(run.out)

    monkeypatch.setattr(loop._TrainingRun, "move", taking)
    code, out, err = command("train", "gmm", *TINY_RUN, "--out", tmp_path / "run", "--json")
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert "metrics.jsonl" in last
    kept = (tmp_path / "run/checkpoints").exists()
    assert ("the checkpoint of step 20" if kept else "its last checkpoint") in last
    assert not (tmp_path / "run/results.json").exists()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EROFS])
def test_a_log_that_cannot_be_written_is_one_line(number, tmp_path, monkeypatch, command: Command):
    def failing(log, record):
        raise OSError(number, os.strerror(number), str(log.metrics))

    monkeypatch.setattr(RunLog, "write", failing)
    code, _, err = command("train", "gmm", *TINY_RUN, "--out", tmp_path / "run")
    assert code == 1
    assert "Traceback" not in err
    assert "metrics.jsonl" in err.splitlines()[-1]
    assert os.strerror(number) in err.splitlines()[-1]


@pytest.mark.parametrize("out", ["", " ", "/", "//"])
def test_an_out_that_is_nobodys_own_is_refused(out, command: Command):
    code, _, err = command("sample", "digits", "--num", 1, "--out", out)
    assert (code, err.count("\n")) == (2, 1)
    assert "--out runs/one" in err


@pytest.mark.parametrize("begun", [(), ("checkpoints",)])
def test_a_run_that_is_not_finished_says_what_finishes_it(begun, run, tmp_path, command: Command):
    shutil.copyfile(run / "run.json", tmp_path / "run.json")
    for folder in begun:
        (tmp_path / folder).mkdir()
    code, _, err = command("sample", tmp_path, "--num", 1)
    assert (code, err.count("\n")) == (2, 1)
    assert "not finished" in err
    assert "`mfm train …`" in err


def test_two_default_runs_of_other_settings_lie_apart(tmp_path, monkeypatch, command: Command):
    monkeypatch.chdir(tmp_path)
    places = set()
    for more in ((), ("--reward", "slant", "--num-draws", 1)):
        code, out, _ = command("steer", "digits", "--num", 2, "--steps", 2, *more, "--json")
        assert code == 0
        places.add(json.loads(out)["out"])
    assert len(places) == 2


# -- litter ----------------------------------------------------------------------------------------------------------


def test_what_was_left_half_written_goes_with_the_next_run(run, tmp_path, command: Command):
    """Files of processes that were killed, and a checkpoint that a failing disk did not let go."""
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before = sorted(str(file.relative_to(out)) for file in out.rglob("*"))
    kept = out / "checkpoints/step-00000040"
    for name in ("step-00000001", ".tmp-step-00000020-0a0a0a0a", ".del-step-00000020-0a0a0a0a"):
        shutil.copytree(kept, kept.with_name(name))
    (out / ".results.json-0a0a0a0a.tmp").write_text("half")
    assert command("train", "gmm", *TINY_RUN, "--out", out)[0] == 0
    assert sorted(str(file.relative_to(out)) for file in out.rglob("*")) == before
