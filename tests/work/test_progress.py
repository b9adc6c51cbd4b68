"""Progress in words: what is done and what time is left, and silence where it takes no time."""

import time

import pytest

from metaflowmaps.work.progress import Bar, counted, training_progress


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made)
    return made


def test_what_takes_long_says_what_is_left(clock: Clock):
    said: list[str] = []
    for weight in counted([1, 1, 2, 4], said.append, "methods", weight=float):
        clock.now += 6.0 * weight
    # after 6, 12 and 24 s of 48, each told within a factor of 1.5
    assert said == [
        "1 of 4 methods done, 28 to 63 seconds left",
        "2 of 4 methods done, 24 to 54 seconds left",
        "3 of 4 methods done, 16 to 36 seconds left",
    ]


def test_what_takes_no_time_is_silent(clock: Clock):
    said: list[str] = []
    for _ in counted(range(100), said.append, "shards"):
        clock.now += 0.04
    assert said == []


def test_a_bar_without_a_terminal_is_lines(clock: Clock, capsys):
    with Bar(4, "mfm-gf") as bar:
        for _ in range(2):
            clock.now += 4.0
            bar.advance()
        clock.now += 4.0
        bar.advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "mfm-gf: 2 of 4 steps done, 5 to 12 seconds left"
    assert len(lines) <= 2


def test_training_says_its_time_in_words():
    class Step:
        step, steps, seconds, metrics = 100, 2000, 10.0, {"loss": 0.123456}

    said: list[str] = []
    with training_progress(said.append) as report:
        report("map", Step())
    assert said == ["map: step 100 of 2,000, loss 0.123, 10 steps a second, 3 minutes left"]
