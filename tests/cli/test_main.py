"""The command line as a newcomer meets it: exit codes, one-line errors, results.json, interruption."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import TINY
from conftest import mfm_command as mfm
from metaflowmaps import cli
from metaflowmaps.training.loop import NonFiniteLoss

BAD = {
    "no such command": (["trian"], "train"),
    "no recipe": (["train"], "mfm train --help"),
    "unknown recipe": (["train", "gm"], "did you mean 'gmm'"),
    "unknown option": (["train", "gmm", "--stesp", "3"], "--"),
    "unknown setting": (["train", "gmm", "--set", "optimizer.lrr=1"], "did you mean 'optimizer.lr'"),
    "setting without value": (["train", "gmm", "--set", "steps"], "key=value"),
    "group of settings": (["train", "gmm", "--set", "optimizer=3"], "optimizer is a group"),
    "wrong type": (["train", "gmm", "--set", "steps=many"], "steps"),
    "not finite": (["train", "gmm", "--set", "optimizer.lr=NaN"], "optimizer.lr"),
    "out of range": (["train", "gmm", "--set", "optimizer.lr=-1"], "greater than 0"),
    "no batch": (["train", "gmm", "--set", "batch_size=0"], "batch_size"),
    "no threads": (["train", "gmm", "--set", "threads=0"], "threads"),
    "impossible pair": (["train", "gmm", "--set", "loss.consistency.velocity=data"], "bad value for velocity"),
    "no teacher": (["train", "gmm", "--set", "teacher=none"], "teacher=exact"),
    "zero steps": (["train", "gmm", "--max-steps", "0"], "at least 1"),
    "negative seed": (["train", "gmm", "--seed", "-1"], "--seed"),
    "no gpu": (["train", "gmm", "--device", "cuda:7"], "--device cpu"),
    "no such device": (["train", "gmm", "--device", "tpu9"], "auto, cpu or cuda"),
    "unwritable output": (["train", "gmm", "--out", "/proc/nowhere"], "choose another directory"),
    "output is a file": (["train", "gmm", "--out", __file__], "directory"),
    "misspelt map": (["sample", "digit"], "did you mean 'digits'?"),
    "missing checkpoint": (["sample", "/no/such/place"], "no such file or directory"),
    "unknown law": (["eval", "posterior", "x", "--law", "gm"], "did you mean 'gmm'"),
    "one sample": (["eval", "posterior", "x", "--samples", "1"], "samples"),
    "report of nothing": (["report", "/no/such/run"], "does not exist"),
    "demo of nothing": (["demo", "--law", "digit"], "digits"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD)
def test_bad_usage_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = mfm(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert says in err
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_a_run_that_diverges_is_one_line_and_exit_code_1(capsys):
    """Its command was right: code 2 would say that it was not."""
    assert cli._failed(NonFiniteLoss("non-finite loss at step 3")) == 1
    assert capsys.readouterr().err == "error: non-finite loss at step 3\n"


def test_bad_states_and_times(capsys, run, tmp_path):
    for arguments, says in (
        (["--t", "1.5"], "[0, 1]"),
        (["--t", "nan"], "finite number"),
        (["--x", "1,2,3"], "needs 2"),
        (["--x", "1,one"], "numbers"),
        (["--num-draws", "0"], "--num-draws"),
    ):
        code, _, err = mfm(capsys, "posterior", run, *arguments, "--out", tmp_path / "p")
        assert code == 2
        assert err.count("\n") == 1
        assert says in err
    code, _, err = mfm(capsys, "sample", run, "--method", "refin", "--out", tmp_path / "s")
    assert (code, "did you mean 'refine'" in err) == (2, True)
    code, _, err = mfm(capsys, "sample", run, "--out", run / "checkpoints" / "step-00000040")
    assert (code, "is a checkpoint" in err) == (2, True)
    code, _, err = mfm(capsys, "train", "gmm", *TINY, "--max-steps", "40", "--resume", "none", "--out", run / "x")
    assert code == 0  # an empty directory
    code, _, err = mfm(capsys, "train", "gmm", *TINY, "--max-steps", "41", "--resume", "/no/such", "--out", run / "y")
    assert (code, "no such file" in err) == (2, True)


def test_train_writes_its_results_and_reports_completion(capsys, run):
    results = json.loads((run / "results.json").read_text())
    assert results["schema"] == 1
    assert results["command"] == "train"
    assert results["cost"]["steps"] == 40
    assert results["cost"]["seconds"] > 0
    assert results["metrics"]["loss"] > 0
    assert results["environment"].keys() >= {"torch", "device", "threads", "commit", "seed"}
    again = ["train", "gmm", *TINY, "--max-steps", "40", "--out", run]
    code, out, err = mfm(capsys, *again, "--json")
    assert code == 0
    assert "is complete" in err
    assert json.loads(out)["metrics"] == results["metrics"]
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, _, err = mfm(capsys, *again, "--seed", "5")
    assert (code, "config.seed: 0 ≠ 5" in err) == (2, True)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_is_refused_by_name(capsys, run, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run / "checkpoints" / "step-00000040", copy)
    weights = copy / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    code, out, err = mfm(capsys, "sample", copy, "--out", tmp_path / "s")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(weights) in err
    assert not (tmp_path / "s").exists()


def test_dry_run_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = mfm(capsys, "train", "gmm", "--dry-run", "--json")
    assert code == 0
    metrics = json.loads(out)["metrics"]
    assert metrics["parameters"] == 53_122
    assert metrics["memory_bytes"] > 4 * 5 * 53_122  # weights, gradients, EMA and two moments at least
    assert list(tmp_path.iterdir()) == []


def test_sample_and_posterior(capsys, run, tmp_path):
    from safetensors.torch import load_file

    for method in ("refine", "compose", "ode"):
        out = tmp_path / method
        code, text, _ = mfm(
            capsys, "sample", run, "--num", "50", "--steps", "3", "--method", method, "--out", out, "--json"
        )
        assert code == 0
        assert load_file(out / "samples.safetensors")["samples"].shape == (50, 2)
        assert json.loads(text)["cost"]["forwards"] == 150
    out = tmp_path / "posterior"
    code, text, _ = mfm(
        capsys, "posterior", run, "--t", "0.9", "--x", "1.0,-0.5", "--num-draws", "64", "--out", out, "--json"
    )
    assert code == 0
    metrics = json.loads(text)["metrics"]
    # at t = .9 even a hardly trained gaussian map is close: its spread is right to a few hundredths
    assert metrics["mean"] == pytest.approx(metrics["exact_mean"], abs=0.1)
    assert load_file(out / "draws.safetensors")["draws"].shape == (64, 2)
    assert (out / "posteriors.png").read_bytes()[:4] == b"\x89PNG"


def test_eval_posterior_and_report(capsys, run, tmp_path):
    out = tmp_path / "eval"
    few = ["sets=2", "contexts=2", "other_contexts=1", "glass_steps=[1,2]"]
    options = [part for setting in few for part in ("--set", setting)]
    code, text, _ = mfm(capsys, "eval", "posterior", run, "--samples", "500", *options, "--out", out, "--json")
    assert code == 0
    results = json.loads(text)
    assert results == {**json.loads((out / "results.json").read_text()), "out": results["out"]}
    keys = {"0.0", "0.2", "0.4", "0.6", "0.8", "0.95"}
    assert results["metrics"]["relative_sw2"].keys() == keys == results["metrics"]["floor"].keys()
    assert results["metrics"]["by_sampler"].keys() == {"map-1", "map-2", "map-4", "glass-1", "glass-2"}
    page = tmp_path / "report.html"
    code, text, _ = mfm(capsys, "report", out, run, "--out", page)
    assert (code, text.strip()) == (0, str(page))
    html = page.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", html), "the page must need no network"
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(pictures) == 4
    assert all(base64.b64decode(p)[:4] == b"\x89PNG" for p in pictures)
    assert "ratio to floor" in html
    (out / "results.json").write_text("{")
    code, _, err = mfm(capsys, "report", out, "--out", page)
    assert (code, "damaged" in err) == (2, True)


@pytest.mark.attack
def test_interruption_saves_and_the_same_command_goes_on(tmp_path):
    """In a process of its own; tests/cli/test_image_commands.py raises the signal in this one."""
    command = [sys.executable, "-m", "metaflowmaps.cli", "train", "gmm", *TINY, "--max-steps", "3000"]
    command += ["--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 130
    assert "state saved" in err.splitlines()[-1]
    assert "Traceback" not in err
    step = int(re.search(r"at step (\d+)", err)[1])
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()


@pytest.mark.attack
def test_a_closed_pipe_is_no_error_message():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "metaflowmaps.cli", "recipes"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert done.stderr == b""


KEYS = ["steps", "optimizer.lr", "optimizer.betas", "times.focus", "data.means", "loss.diagonal"]
KEYS += ["law.covariances", "law.weights", "model.data_std", "nonsense", "a.b.c", ""]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(KEYS),
    value=st.one_of(
        st.text(max_size=8), st.integers().map(str), st.floats().map(str),
        st.sampled_from(["null", "[]", "{}", "[1,2]", "[[1,2],[3]]", '"x"', "1e999", "-0", "true"]),
    ),
)  # fmt: skip
def test_any_setting_is_taken_or_refused_in_one_line(capsys, tmp_path, key, value):
    """Malformed settings never raise anything but a one-line refusal (the dry run stops before training)."""
    sizes = ["--set", "model.network.width=4", "--set", "batch_size=8"]
    code, _, err = mfm(capsys, "train", "gmm", *sizes, "--set", f"{key}={value}", "--dry-run")
    assert code in (0, 2)
    if code == 2:
        assert err.count("\n") == 1


def test_requests_without_a_place_never_collide(capsys, run, tmp_path, monkeypatch):
    """Each makes a folder of its own, says where, and is complete when it is asked for again."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "own")
    places = []
    for num in ("4", "5", "4", "5"):
        code, text, err = mfm(capsys, "sample", "own", "--num", num, "--json")
        assert code == 0, err
        places.append(json.loads(text)["out"])
    assert places[:2] == places[2:]
    assert places[0] != places[1]


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        (["sample", "RUN", "--num", "10"], 10),  # one call a sample, where nobody says
        (["sample", "RUN", "--num", "10", "--steps", "3"], 30),
        (["posterior", "RUN", "--num-draws", "10", "--steps", "2"], 20),
        (["steer", "RUN", "--num", "10", "--steps", "4", "--method", "none"], 40),
        (["eval", "value", "RUN", "--set", "states=8", "--set", "times=[0.5]", "--set", "num_draws=4", "--set",
          "map_steps=[1]", "--set", "glass_steps=[2]"], 8 * 4 * 3),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)  # fmt: skip
def test_a_dry_run_counts_calls_and_writes_nothing(capsys, run, tmp_path, monkeypatch, arguments, calls):
    monkeypatch.chdir(tmp_path)
    before = sorted(run.rglob("*"))
    code, text, err = mfm(capsys, *[run if word == "RUN" else word for word in arguments], "--dry-run", "--json")
    assert code == 0, err
    metrics = json.loads(text)["metrics"]
    assert metrics["calls"] == calls
    assert ("expected_seconds" in metrics) == (arguments[0] == "steer")
    assert metrics.get("expected_seconds", 1) > 0
    assert list(tmp_path.iterdir()) == []
    assert sorted(run.rglob("*")) == before


def test_ctrl_c_in_the_first_imports_is_one_line_and_exit_code_130():
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'pydantic': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from metaflowmaps.cli import main\n"
        "sys.argv = ['mfm', 'sample', 'digits']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (130, "", 1), done.stderr
    assert "interrupted" in done.stderr


def test_a_rejected_start_does_not_occupy_its_directory(capsys, tmp_path):
    out = ["--max-steps", "5", "--out", tmp_path / "run"]
    for refused in (["--set", "law.covariances=[[1,2],[2,1]]"], ["--resume", "/no/such"], ["--set", "law.means=[]"]):
        code, _, err = mfm(capsys, "train", "gmm", *TINY, *refused, *out)
        assert (code, err.count("\n")) == (2, 1)
    assert mfm(capsys, "train", "gmm", *TINY, *out)[0] == 0


@pytest.mark.attack
def test_a_second_writer_is_refused(capsys, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", "gmm", *TINY, "--max-steps", "100000", "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "metaflowmaps.cli", *arguments], stderr=subprocess.DEVNULL)
    try:
        while not (out / "metrics.jsonl").exists():
            time.sleep(0.01)
            assert process.poll() is None
        code, _, err = mfm(capsys, *arguments)
        assert (code, "another process is writing" in err) == (2, True)
    finally:
        process.kill()
        process.wait()


def test_starting_from_another_run(capsys, run, tmp_path):
    longer = ["train", "gmm", *TINY, "--max-steps", "60", "--resume", run, "--out", tmp_path / "more"]
    assert mfm(capsys, *longer)[0] == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "more" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [45, 50, 55, 60]
    for changes, says in (
        (["--set", "model.network.width=8"], "has another model (network.width: 16 ≠ 8)"),
        (["--set", "optimizer.name=adam"], "has another optimizer"),
        (["--max-steps", "30"], "stands at step 40, this run ends at 30"),
    ):
        code, _, err = mfm(capsys, *longer[:-1], tmp_path / "other", *changes)
        assert (code, err.count("\n")) == (2, 1)
        assert says in err


def test_damaged_logs(capsys, tmp_path):
    out = tmp_path / "run"
    command = ["train", "gmm", *TINY, "--max-steps", "20", "--out", out]
    assert mfm(capsys, *command)[0] == 0
    whole = (out / "metrics.jsonl").read_bytes()
    (out / "results.json").unlink()  # as if stopped just before its end
    with (out / "timings.jsonl").open("a") as file:
        file.write("3\n{")
    assert mfm(capsys, *command)[0] == 0
    assert (out / "metrics.jsonl").read_bytes() == whole
    (out / "results.json").unlink()
    (out / "metrics.jsonl").write_bytes(whole[:-10])
    code, _, err = mfm(capsys, *command)
    assert (code, err.count("\n"), "metrics.jsonl is shorter" in err) == (2, 1, True)
