"""What commands say when they end: what was chosen, what was written, what to try next; counters are for programs."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from metaflowmaps.work import durations
from metaflowmaps.work.durations import spoken, spoken_range

Command = Callable[..., tuple[int, str, str]]


def test_a_command_ends_with_what_was_chosen_written_and_comes_next(command: Command, run: Path, tmp_path: Path):
    out = tmp_path / "s"
    code, text, _ = command("steer", run, "--num", 8, "--method", "mfm-gf", "--set", "process.steps=3", "--out", out)
    assert code == 0
    chosen, written, following = text.splitlines()[-3:]
    assert chosen.split("  ")[0] == "chosen by default"
    assert "--reward gmm-inverse --strength 1 --num-draws 4" in chosen
    assert "--process" not in chosen  # one of its options was typed
    assert "--steps" not in chosen
    assert "--num " not in chosen
    assert str(out) in written
    assert "samples.png, trajectory.png, samples.safetensors" in written
    assert "run.json" not in written
    assert following.endswith(f"mfm report {out}")
    counters = ("forwards", "backwards", "reward calls", "decodes", "peak memory", "nfe")
    assert not [name for name in counters if name in text]
    assert json.loads((out / "results.json").read_text())["cost"]["forwards"] == 8 * 3 * 5


@pytest.mark.parametrize(
    ("words", "following"),
    [
        (["sample", "RUN", "--num", "4"], "mfm steer RUN"),
        (["posterior", "RUN", "--num-draws", "4"], "mfm eval posterior RUN"),
    ],
    ids=["sample", "posterior"],
)
def test_the_next_command_is_of_the_same_map(words, following, command: Command, run: Path, tmp_path: Path):
    code, text, _ = command(*(word.replace("RUN", str(run)) for word in words), "--out", tmp_path / "o")
    assert code == 0
    assert text.splitlines()[-1].endswith(following.replace("RUN", str(run)))


def test_what_is_printed_for_a_pipe_stands_alone_on_stdout(command: Command):
    code, out, err = command("recipes")
    assert (code, "next:" in out, "next: mfm train" in err) == (0, False, True)


def test_a_plan_says_how_long_it_will_take_and_that_the_machine_is_busy(command: Command, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (os.cpu_count() + 0.5, 0.0, 0.0))
    code, text, _ = command("train", "gmm", "--dry-run", "--set", "steps=10")
    assert code == 0
    assert "time that it will take" in text
    assert "the machine is busy" in text
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 9.0, 9.0))
    assert durations.busy() is None


@pytest.mark.parametrize(
    ("seconds", "words", "estimate"),
    [
        (0.3, "under a second", "a second or two"),
        (1.2, "1 second", "1 to 2 seconds"),
        (40, "40 seconds", "27 to 60 seconds"),
        (130, "2 minutes", "1 to 3 minutes"),
        (60 * 60, "60 minutes", "40 to 90 minutes"),
        (3 * 3600, "3 hours", "2 to 4.5 hours"),
        (4 * 86400, "4 days", "2.7 to 6 days"),
    ],
)
def test_times_are_whole_seconds_or_minutes_with_a_range(seconds: float, words: str, estimate: str):
    assert (spoken(seconds), spoken_range(seconds)) == (words, estimate)
