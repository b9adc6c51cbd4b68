"""The benchmark of advice: what it counts, what it calls the best, and its table."""

import json
import math

import pytest
from benchmarks.table_rows import advised

from benchmarks import advise, defaults, frontier
from metaflowmaps.steering.pilot import Estimate


class Told:
    """What a pilot says."""

    evaluations = 4640

    def __init__(self, value, low, high):
        self.log_evidence = Estimate(value, low, high)


def test_counts_the_intervals_that_hold_and_those_that_are_open_below():
    told = [Told(-3, -4, -2), Told(-5, -6, -4), Told(-9, -math.inf, -2.5)]
    got = advise.intervals(told, -3.0)
    assert (got["pilots"], got["held"], got["below"], got["width"], got["error"]) == (3, 2, 1, 2, 2)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Result files of the other benchmarks."""
    monkeypatch.setattr(advise, "RESULTS", tmp_path)
    cells = {"mfm-gf": {"450": {"nfe": 450, "sw2": 4.0}}, "mfm-anneal": {"450": {"nfe": 455, "sw2": 1.6},
             "1000": {"nfe": 990, "sw2": 1.2}}}  # fmt: skip
    (tmp_path / "frontier.json").write_text(json.dumps({"problems": {"16-D, −10": {"methods": cells}}}))
    runs = {"`exact`": {"nfe": 60, "ratio": 0.9}, "`rejection`": {"nfe": 37, "ratio": 1.0}}
    (tmp_path / "defaults.json").write_text(json.dumps({"problems": {"judged: 2-D sharp": {"runs": runs}}}))
    return tmp_path


def test_the_best_is_what_was_measured_within_the_budget(results):
    assert advise.best_measured("16-D, −10", 450) == {"method": "mfm-anneal", "nfe": 455, "sw2": 1.6}
    assert advise.best_measured("16-D, −10", 2000)["nfe"] == 990
    assert advise.best_measured("2-D sharp", 450)["method"] == "`rejection`"
    assert advise.best_measured("16-D, −20", 450) is None
    (results / "frontier.json").unlink()
    assert advise.best_measured("16-D, −10", 450) is None


def test_a_problem_is_measured_and_shown(results, monkeypatch):
    monkeypatch.setattr(frontier.Judge, "REFERENCE", 2**10)
    found = advise.measured(*advise.problem("2-D quadratic"), 64, pilots=2, seeds=1)
    assert found["pilots"]["held"] == 2
    assert found["advised"]["450"]["method"] == "rejection"
    assert found["advised"]["450"]["line"].startswith("mfm.steer(model, reward, 64, ")
    assert (advise.samples_of("2-D quadratic"), advise.samples_of("16-D, −10")) == (1024, 512)  # as their floors are of
    for cell in found["advised"].values():
        cell["best"] = advise.best_measured("2-D sharp", 450)
    head, row = advised({"problems": {"2-D quadratic": found}})
    assert len(head) == len(row) == 12
    assert row[2] == "2 of 2"
    assert row[7] == "rejection, 37: 1.00"


def test_problems_are_those_of_the_other_benchmarks():
    law, reward = advise.problem("16-D, −5")
    assert float(law.log_evidence(reward)) == pytest.approx(-5, abs=1e-6)
    assert advise.problem("8-D sharp")[0].dim == 8
    assert set(defaults.KINDS) == {2, 3, 8, 16}
