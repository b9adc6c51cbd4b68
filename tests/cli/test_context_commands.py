"""``mfm`` on general contexts: train on a file, draw given observations, judge forecasts; what is typed wrong."""

import json

import numpy as np
import pytest

from conftest import mfm_in_process

SMALL = ["--set", "model.network.width=16", "--set", "model.network.heads=2", "--set", "batch_size=16"]
SMALL += ["--set", "drift_batch_size=16", "--set", "threads=1", "--max-steps", "3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run on a file of random walks."""
    folder = tmp_path_factory.mktemp("sequences")
    np.save(folder / "paths.npy", np.random.default_rng(0).normal(size=(40, 8)).cumsum(1))
    arguments = ["--data", folder / "paths.npy", "--set", "data.contexts.place=before", "--out", folder / "run"]
    assert mfm_in_process("train", "sequences", *arguments, *SMALL) == 0
    return folder / "run"


def test_draws_given_observations_are_written_with_them(run, command, tmp_path):
    arguments = [
        "--observe",
        "1=0.5",
        "--observe",
        "3=-0.5",
        "--query",
        5,
        "--num-draws",
        32,
        "--out",
        tmp_path / "out",
    ]
    code, out, _ = command("posterior", run, *arguments, "--json")
    assert code == 0
    assert len(json.loads(out)["metrics"]["mean"]) == 1
    assert (tmp_path / "out" / "draws.safetensors").exists()
    assert (tmp_path / "out" / "fan.png").exists()


def test_observations_come_from_a_file_too(run, command, tmp_path):
    np.savez(tmp_path / "seen.npz", values=np.array([0.5, np.nan]), times=np.array([1.0, 2.0]))
    code, out, _ = command(
        "posterior", run, "--observe", tmp_path / "seen.npz", "--query", 1, "--num-draws", 4, "--json",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["metrics"]["mean"][0] == pytest.approx(0.5, abs=1e-6)  # what was asked for was seen


def test_forecasts_are_judged_beside_their_rivals(run, command, tmp_path):
    settings = ["--set", "forecasts=8", "--set", "ode_steps=[2]", "--set", "map_steps=[1,2]", "--samples", 6]
    code, out, _ = command("eval", "forecast", run, *settings, "--out", tmp_path / "out", "--json")
    assert code == 0
    found = json.loads(out)["metrics"]["forecasts"]
    assert [round(found[name]["calls"]) for name in ("map-1", "map-2", "ode-2", "gaussian")] == [1, 2, 2, 0]
    assert set(found) == {"map-1", "map-2", "ode-2", "gaussian", "climate", "last"}
    assert (tmp_path / "out" / "fan.png").exists()


REWARD = """
import torch
def crossed(x):
    return torch.nn.functional.logsigmoid(4 * (x[:, 0] - 2.0))
"""


@pytest.mark.parametrize("method", ["mfm-gf", "mfm-g", "rejection", "best-of-n", "mfm-smc", "dps"])
def test_forecasts_are_steered_towards_a_threshold(run, command, tmp_path, method):
    (tmp_path / "my.py").write_text(REWARD)
    given = ["--observe", "1=0.5", "--query", 5, "--num", 64, "--json", "--steps", 8, "--reward"]
    means = []
    for name in ("none", method):
        arguments = [*given, f"{tmp_path}/my.py:crossed", "--method", name, "--out", tmp_path / name]
        code, out, err = command("steer", run, *arguments)
        assert code == 0, err
        means.append(json.loads(out)["metrics"]["reward_mean"])
    assert means[1] > means[0] + 1  # unsteered X_5 is about .5 ± 2, and most below the threshold


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reward", "my.py:crossed"], "--query TIME"),
        (["--observe", "1=0.5", "--query", "5"], "no usual reward"),
        (["--observe", "5=0.5", "--query", "5", "--reward", "my.py:crossed"], "nothing to steer"),
        (["--query", "5", "--reward", "my.py:crossed", "--method", "exact"], "--method exact needs"),
    ],
)
def test_forecasts_that_cannot_be_steered_are_refused(run, command, tmp_path, monkeypatch, arguments, words):
    (tmp_path / "my.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    code, _, err = command("steer", run.resolve(), *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--observe", "1=0.5"], "--query TIME"),
        (["--observe", "one", "--query", "2"], "--observe takes TIME=VALUE"),
        (["--observe", "missing.npz", "--query", "2"], "cannot be read"),
    ],
)
def test_observations_that_cannot_be_read_are_refused_in_one_line(run, command, arguments, words):
    code, _, err = command("posterior", run, *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_a_map_of_noisy_states_takes_no_observations(command):
    code, _, err = command("posterior", "digits", "--query", 1)
    assert code == 2
    assert "reads no observations" in err
