"""mfm eval on a user's own network, wrapped by file.py:make: here the mixture's exact drift."""

import json

import pytest

from conftest import mfm_command as mfm

MADE = """
import metaflowmaps as mfm
from metaflowmaps.recipes.gmm import LAW

LAW_OF_DATA = LAW.law()


def make():
    return mfm.wrap(lambda x, t: LAW_OF_DATA.drift(mfm.LinearPath(), t, x).to(x), "velocity", event_shape=(2,))


def plain():
    return mfm.MetaFlowMap(mfm.networks.MLPConfig(width=8, depth=1).network((2,)), mfm.LinearPath())
"""
AT = ["--set", "times=[0.4]"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MADE)
    return f"{tmp_path / 'mine.py'}:make"


def test_posterior_draws_of_a_wrapped_network_are_held_to_the_law(capsys, own, monkeypatch):
    monkeypatch.setattr("metaflowmaps.lab.figures.result_figures.PANEL_TIMES", (0.4,))  # one panel, to be quick
    sizes = [
        "--set",
        "glass_steps=[2,16]",
        "--samples",
        "256",
        "--set",
        "contexts=4",
        "--set",
        "sets=2",
        "--set",
        "other_contexts=4",
    ]
    code, text, err = mfm(capsys, "eval", "posterior", own, *AT, *sizes, "--json")
    assert code == 0, err
    metrics = json.loads(text)["metrics"]
    errors = {name: by_time["0.4"] for name, by_time in metrics["by_sampler"].items()}
    assert set(errors) == {"glass-2", "glass-16"}
    assert metrics["relative_sw2"]["0.4"] == errors["glass-16"]  # what leads where there is no map
    assert metrics["glass_calls_to_match_one_map_step"] == {"0.4": None}
    assert metrics["network_calls_per_draw"] == {"glass-2": 2, "glass-16": 16}
    # exact but for Euler's 16 steps; 2 of them draw near the mean
    assert metrics["ratio"]["0.4"] < 3 < errors["glass-2"] / metrics["floor"]["0.4"]


def test_values_of_a_wrapped_network_are_held_to_the_exact_value(capsys, own):
    sizes = ["--set", "glass_steps=[2,32]", "--set", "states=32", "--set", "num_draws=64"]
    code, text, err = mfm(capsys, "eval", "value", own, *AT, *sizes, "--json")
    assert code == 0, err
    by_sampler = json.loads(text)["metrics"]["by_sampler"]
    assert set(by_sampler) == {"glass-2", "glass-32", "exact"}
    # exact draws miss by their number alone; Euler's 32 steps may add as much again
    assert by_sampler["glass-32"]["0.4"]["rmse"] < 2 * by_sampler["exact"]["0.4"]["rmse"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generation"], "mfm distill"),
        (["steering"], "mfm distill"),
        (["forecast"], "mfm distill"),
        (["value", "--set", "glass_steps=[]"], "give glass_steps"),
        (["value", "--set", "glass_spacing=angle"], "set glass_spacing=uniform"),
    ],
)
def test_what_makes_no_sense_of_a_wrapped_network_is_refused_in_a_line(capsys, own, tmp_path, arguments, says):
    what, *options = arguments
    code, out, err = mfm(capsys, "eval", what, own, *options, "--out", tmp_path / "x")
    assert (code, out) == (2, ""), err
    assert says in err.splitlines()[-1]
    assert "Traceback" not in err


def test_what_is_made_must_be_a_wrapped_network(capsys, own):
    code, _, err = mfm(capsys, "eval", "value", own.replace(":make", ":plain"))
    assert (code, err.count("\n")) == (2, 1), err
    assert "return mfm.wrap" in err


def test_results_of_a_network_are_its_code_s_own(capsys, own, tmp_path):
    from metaflowmaps.lab.opened import OpenedNetwork

    before = OpenedNetwork.open(own, "cpu").digest
    (tmp_path / "mine.py").write_text(MADE + "\n# changed\n")
    assert OpenedNetwork.open(own, "cpu").digest != before
