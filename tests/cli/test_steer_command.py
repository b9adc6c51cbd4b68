"""mfm steer, mfm eval steering and mfm eval value as a newcomer meets them."""

import json
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

import metaflowmaps
from conftest import mfm_command as mfm

QUICK = ["--num", "64", "--steps", "4", "--seed", "3"]

BAD = {
    "unknown method": (["--method", "mfm-gg"], "did you mean 'mfm-g"),
    "unknown option": (["--method", "mfm-gf", "--set", "method.recyle=4"], "did you mean 'recycle'"),
    "option of another method": (["--method", "none", "--set", "method.recycle=4"], "unknown option of none"),
    "option out of range": (["--method", "mfm-gf", "--set", "method.recycle=0"], "recycle must be at least 1"),
    "unknown process": (["--process", "pde"], "ode, sde"),
    "unknown renormalisation": (["--set", "process.renormalize=clap"], "did you mean 'clip'"),
    "unknown integrator": (["--set", "process.integrator=heum"], "did you mean 'heun'"),
    "unknown task": (["--reward", "gmm-inverze"], "did you mean 'gmm-inverse"),
    "reward of another space": (["--reward", "mixture-16d", "--dry-run"], "samples (16,) and this map makes (2,)"),
    "no such file": (["--reward", "nowhere.py:f"], "no file nowhere.py"),
    "no function named": (["--reward", "nowhere.py"], "name the function too"),
    "no draws": (["--num-draws", "0"], "--num-draws"),
    "no samples": (["--num", "0"], "--num"),
    "negative strength": (["--strength", "-1"], "strength"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD)
def test_bad_usage_is_one_line_and_nothing_is_begun(capsys, run, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = mfm(capsys, "steer", run, *arguments, "--out", tmp_path / "s")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert says in err
    assert list(tmp_path.iterdir()) == []


def test_steer_keeps_samples_rewards_costs_and_pictures(capsys, run, tmp_path):
    out = tmp_path / "s"
    code, text, _ = mfm(capsys, "steer", run, *QUICK, "--method", "mfm-gf", "--out", out, "--json")
    assert code == 0
    results = json.loads(text)
    kept = load_file(out / "samples.safetensors")
    assert kept["samples"].shape == (64, 2)
    reward = metaflowmaps.rewards.LinearGaussian([1.2, -0.8], -1.0, 0.2)
    assert abs(float(reward(kept["samples"]).mean()) - results["metrics"]["reward_mean"]) < 1e-3  # float32 sums
    # 4 steps of 1 + 4 network calls and 4 reward calls
    assert results["cost"]["forwards"] == 64 * 4 * 5
    assert results["cost"]["reward_calls"] == 64 * 4 * 4
    assert results["cost"]["nfe"] == 36
    assert {p.name for p in out.iterdir()} >= {"samples.png", "trajectory.png", "results.json", "samples.safetensors"}
    # the same again is complete, another number of steps is another run; people are told what is theirs to know
    code, text, _ = mfm(capsys, "steer", run, *QUICK, "--method", "mfm-gf", "--out", out)
    assert (code, "forwards" in text, "evaluations a sample    36" in text) == (0, False, True)
    code, _, err = mfm(capsys, "steer", run, "--num", "64", "--steps", "5", "--method", "mfm-gf", "--out", out)
    assert (code, "another run" in err) == (2, True)


def test_strength_multiplies_and_zero_is_no_steering(capsys, run, tmp_path):
    for name, arguments in {
        "zero": ["--method", "mfm-gf", "--strength", "0"],
        "none": ["--method", "none"],
        "one": ["--method", "mfm-gf"],
    }.items():
        assert mfm(capsys, "steer", run, *QUICK, *arguments, "--out", tmp_path / name)[0] == 0
    zero, none, one = (load_file(tmp_path / n / "samples.safetensors")["samples"] for n in ("zero", "none", "one"))
    assert bool((zero == none).all())
    assert bool((one != none).any())


@pytest.mark.filterwarnings("ignore:.* samples were left")  # by so few steps
def test_a_reward_of_your_own(capsys, run, tmp_path):
    (tmp_path / "mine.py").write_text("def right(x):\n    return 3 * x[:, 0]\n\ndef broken(x):\n    return x\n")
    code, text, err = mfm(
        capsys, "steer", run, *QUICK, "--reward", f"{tmp_path}/mine.py:right", "--out", tmp_path / "r", "--json"
    )
    assert code == 0, err
    assert json.loads(text)["metrics"]["reward_mean"] > 0
    code, _, err = mfm(capsys, "steer", run, *QUICK, "--reward", f"{tmp_path}/mine.py:broken", "--out", tmp_path / "b")
    assert (code, "one number a sample" in err, err.count("\n")) == (2, True, 1)
    code, _, err = mfm(capsys, "steer", run, *QUICK, "--reward", f"{tmp_path}/mine.py:left", "--out", tmp_path / "l")
    assert (code, "unknown name in" in err) == (2, True)
    (tmp_path / "worse.py").write_text("import nothing_of_that_name\n")
    code, _, err = mfm(capsys, "steer", run, *QUICK, "--reward", f"{tmp_path}/worse.py:f", "--out", tmp_path / "w")
    assert (code, "ModuleNotFoundError" in err, err.count("\n")) == (2, True, 1)


def test_a_reward_that_fails_late_keeps_the_finished_samples(capsys, run, tmp_path):
    (tmp_path / "late.py").write_text(
        "calls = [0]\ndef f(x):\n    calls[0] += 1\n    return x[:, 0] * (float('nan') if calls[0] > 5 else 1)\n"
    )
    code, _, err = mfm(
        capsys, "steer", run, *QUICK, "--method", "mfm-gf", "--set", "batch_size=32",
        "--reward", f"{tmp_path}/late.py:f", "--out", tmp_path / "f",
    )  # fmt: skip
    assert (code, err.count("\n")) == (2, 1), err
    assert "32 finished samples are kept" in err
    assert load_file(tmp_path / "f" / "samples.safetensors")["samples"].shape == (32, 2)


@pytest.mark.attack
def test_ctrl_c_keeps_finished_samples(run, tmp_path):
    out = tmp_path / "long"
    process = subprocess.Popen(
        [sys.executable, "-m", "metaflowmaps.cli", "steer", str(run), "--num", "100000", "--steps", "3",
         "--method", "none", "--set", "batch_size=16", "--out", str(out)],
        stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (out / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)  # some chunks of 16 samples, of the thousands it would take
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    samples = load_file(out / "samples.safetensors")["samples"]
    assert 0 < len(samples) < 100_000
    assert len(samples) % 16 == 0
    assert not (out / "results.json").exists()  # it is not complete: the same command begins again


def test_eval_steering_has_the_agreed_keys(capsys, run, tmp_path):
    settings = ["steps=3", "seeds=2", "num_draws=[2]", 'methods=["none","mfm-gf","mfm-smc","tds","mfm-search","exact"]']
    arguments = [part for s in settings for part in ("--set", s)]
    code, text, err = mfm(
        capsys, "eval", "steering", run, "--task", "gmm-inverse", "--samples", "128", *arguments, "--out",
        tmp_path / "e", "--json",
    )  # fmt: skip
    assert code == 0, err
    results = json.loads(text)
    methods = results["metrics"]["methods"]
    assert set(methods) == {"none", "mfm-gf", "mfm-smc", "tds", "mfm-search", "exact"}
    assert set(methods["mfm-gf"]) == {"2"}
    assert set(methods["none"]) == set(methods["tds"]) == set(methods["exact"]) == {"0"}
    cell = methods["mfm-gf"]["2"]
    assert cell.keys() >= {"sw2", "mmd", "mode_l1", "reward", "cost", "process", "steps"}
    assert cell["cost"]["nfe"] == 3 * 5
    assert (cell["process"], cell["steps"], cell["samples"]) == ("ode", 3, 128)
    assert set(results["metrics"]["floor"]) == {"sw2", "mode_l1"}
    assert {p.name for p in (tmp_path / "e").iterdir()} >= {"steered.png", "error-against-cost.png", "trajectory.png"}
    page = tmp_path / "page.html"
    assert mfm(capsys, "report", tmp_path / "e", "--out", page)[0] == 0
    assert "mfm-smc" in page.read_text()


def test_eval_steering_takes_the_exact_mixture_and_leaves_gradients_out(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text, err = mfm(
        capsys, "eval", "steering", "exact", "--task", "mixture-16d", "--samples", "64", "--set", "steps=2", "--set",
        "seeds=1", "--set", "num_draws=[2]", "--set", 'methods=["mfm-g","mfm-gf"]', "--json",
    )  # fmt: skip
    assert code == 0, err
    assert set(json.loads(text)["metrics"]["methods"]) == {"mfm-gf"}
    assert "leaving mfm-g out" in err


def test_eval_steering_refuses_what_does_not_fit(capsys, run, tmp_path):
    for arguments, says in (
        (["--task", "mixture-16d"], "another law"),
        (["--task", "gmm-invers"], "did you mean 'gmm-inverse"),
        (["--set", 'methods=["mfm-h"]'], "did you mean"),
        (["--set", "reward=brod"], "did you mean 'broad'"),
        (["--set", "num_draws=[0]"], "num_draws"),
    ):
        code, _, err = mfm(capsys, "eval", "steering", run, *arguments, "--out", tmp_path / "x")
        assert (code, err.count("\n")) == (2, 1), err
        assert says in err


def test_eval_value_compares_with_the_exact_value(capsys, run, tmp_path):
    code, text, err = mfm(
        capsys, "eval", "value", run, "--set", "states=16", "--set", "num_draws=8", "--set", "glass_steps=[2]", "--set",
        "map_steps=[1]", "--set", "times=[0.2,0.5]", "--out", tmp_path / "v", "--json",
    )  # fmt: skip
    assert code == 0, err
    by_sampler = json.loads(text)["metrics"]["by_sampler"]
    assert set(by_sampler) == {"map-1", "glass-2", "exact"}
    assert set(by_sampler["exact"]["0.2"]) == {"pearson", "rmse", "bias"}
    calls = json.loads(text)["metrics"]["network_calls_per_draw"]
    assert calls == {"map-1": 1.0, "glass-2": 2.0, "exact": 0.0}
