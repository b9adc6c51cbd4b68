"""mfm advise as a newcomer meets it."""

import json
import shlex

from conftest import mfm_command as mfm

ASKED = ["--reward", "gmm-inverse", "--pilot", "64", "--num", "16", "--seed", "3"]


def test_advice_names_a_command_that_runs(capsys, run, tmp_path):
    out = tmp_path / "advice"
    code, text, _ = mfm(capsys, "advise", run, *ASKED, "--budget", "60", "--strength", "0.1", "--out", out, "--json")
    assert code == 0
    results = json.loads(text)
    assert json.loads((out / "results.json").read_text())["metrics"]["command"] == results["metrics"]["command"]
    assert results["cost"]["evaluations"] == results["metrics"]["pilot"]["evaluations"]
    words = shlex.split(results["metrics"]["command"])
    assert words[:2] == ["mfm", "steer"]
    assert "--strength" in words
    code, text, err = mfm(capsys, *words[1:], "--out", tmp_path / "steered", "--json")
    assert code == 0, err
    assert json.loads(text)["metrics"]["num"] == 16
    # the same again is there already, in words
    code, text, _ = mfm(capsys, "advise", run, *ASKED, "--budget", "60", "--strength", "0.1", "--out", out)
    assert code == 0
    assert "Methods within the budget" in text
    assert results["metrics"]["summary"] in text


def test_advice_is_counted_before_it_is_made(capsys, run, tmp_path):
    code, text, _ = mfm(capsys, "advise", run, *ASKED, "--dry-run", "--json", "--out", tmp_path / "no")
    assert (code, list(tmp_path.iterdir())) == (0, [])
    plan = json.loads(text)["metrics"]
    assert plan["pilot_evaluations"] == 2 * 64 + 2 * 16 * 5 * 16 + 2 * 16
    assert plan["pilot_evaluations_where_the_reward_is_rare"] > plan["pilot_evaluations"]


def test_a_bad_budget_is_one_line(capsys, run, tmp_path):
    code, out, err = mfm(capsys, "advise", run, *ASKED, "--budget", "1", "--out", tmp_path / "no")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--budget must be at least 2" in err
