"""mfm array: a command as the tasks of an array; Slurm is stood in for by submitit's local executor."""

import json
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from test_cli import mfm

LOCAL = ["array", "--tasks", "2", "--cluster", "local", "--wait"]
SAMPLE = ["sample", "digits", "--num", "20", "--shard-size", "8", "--out"]  # three shards: two are worker 0's


def test_dry_run_prints_exact_commands_of_what_is_missing(capsys, tmp_path):
    out = tmp_path / "a b"
    code, text, err = mfm(capsys, "array", "--tasks", "3", "--dry-run", "--", *SAMPLE, out)
    assert (code, err) == (0, "")
    typed = f"mfm sample digits --num 20 --shard-size 8 --out '{out}' --worker"
    assert text.splitlines() == [f"{typed} {i}/3" for i in range(3)]
    assert not out.exists()
    assert mfm(capsys, *SAMPLE, out, "--worker", "1/3")[0] == 0
    code, text, _ = mfm(capsys, "array", "--tasks", "3", "--dry-run", "--json", "--", *SAMPLE, out)
    assert json.loads(text)["commands"] == [f"{typed} {i}/3" for i in (0, 2)]
    # other tasks than those that began: who has a missing shard
    code, text, _ = mfm(capsys, "array", "--tasks", "2", "--dry-run", "--", *SAMPLE, out)
    assert text.splitlines() == [f"{typed} 0/2"]


def test_all_shards_there_and_not_put_together_is_one_task(capsys, tmp_path):
    for i in (0, 2):
        assert mfm(capsys, *SAMPLE, tmp_path / "s", "--worker", f"{i}/3")[0] == 0
    shards = tmp_path / "s" / "shards"
    kept = {path: path.read_bytes() for path in shards.iterdir()}
    assert mfm(capsys, *SAMPLE, tmp_path / "s", "--worker", "1/3")[0] == 0
    last = {"00001.safetensors", "00001.json"} - {path.name for path in kept}
    assert len(last) == 2
    # as a worker leaves it that is killed before it puts all together
    other = tmp_path / "o"
    assert mfm(capsys, *SAMPLE, other, "--worker", "1/3")[0] == 0
    for path, data in kept.items():
        (other / "shards" / path.name).write_bytes(data)
    code, text, _ = mfm(capsys, "array", "--tasks", "3", "--dry-run", "--", *SAMPLE, other)
    assert (code, text.count("\n"), "--worker 0/3" in text) == (0, 1, True)


def test_two_tasks_on_this_machine(capsys, tmp_path):
    code, text, err = mfm(capsys, *LOCAL, "--json", "--", *SAMPLE, tmp_path / "s")
    assert code == 0, err
    assert "2 of 2 tasks submitted" in err
    assert mfm(capsys, *SAMPLE, tmp_path / "alone")[0] == 0
    samples = [(tmp_path / out / "samples.safetensors").read_bytes() for out in ("s", "alone")]
    assert samples[0] == samples[1]
    results = json.loads(text)
    assert results["config"] == json.loads((tmp_path / "alone" / "results.json").read_text())["config"]
    logs = sorted((tmp_path / "s" / "array").glob("*_log.out"))
    assert len(logs) == 2
    assert sorted(log.read_text().partition("--worker ")[2][:3] for log in logs) == ["0/2", "1/2"]
    code, again, err = mfm(capsys, *LOCAL, "--json", "--", *SAMPLE, tmp_path / "s")
    assert (code, json.loads(again) == results, "nothing to submit" in err) == (0, True, True)
    # results of other settings are not handed out as those that were asked for
    other = ["sample", "digits", "--num", "21", "--out"]
    code, text, err = mfm(capsys, *LOCAL, "--json", "--", *other, tmp_path / "s")
    assert (code, text, "holds another run (config.num: 20 ≠ 21)" in err) == (2, "", True), err


def test_a_task_that_fails_is_one_line_with_its_log_and_is_submitted_again(capsys, tmp_path):
    flag, reward = tmp_path / "broken", tmp_path / "r.py"
    reward.write_text(
        f"from pathlib import Path\ndef f(x):\n    if Path({str(flag)!r}).exists():\n"
        "        raise ValueError('the scales are out of order')\n    return x.flatten(1).mean(1)\n"
    )
    case = ["steer", "digits", "--reward", f"{reward}:f", "--method", "none", "--steps", "2", "--num", "12",
            "--shard-size", "8", "--out", tmp_path / "s"]  # fmt: skip
    assert mfm(capsys, *case, "--worker", "0/2")[0] == 0
    flag.touch()
    code, text, err = mfm(capsys, *LOCAL, "--", *case)
    assert (code, text) == (1, "")
    submitted, failed = err.splitlines()
    assert "1 of 2 tasks submitted" in submitted
    assert failed.startswith("error: 1 of 1 tasks failed: 1/2 (")
    log = Path(failed.partition("(")[2].partition(")")[0])
    assert log.parent == tmp_path / "s" / "array"
    assert "the scales are out of order" in log.read_text()
    flag.unlink()
    code, _, err = mfm(capsys, *LOCAL, "--", *case)
    assert code == 0, err
    assert "1 of 2 tasks submitted" in err
    assert (tmp_path / "s" / "results.json").exists()


class Cluster:
    """What is asked of submitit, without a cluster behind it."""

    seen: ClassVar[dict] = {}

    def __init__(self, folder, cluster):
        self.seen.update(folder=folder, cluster=cluster)

    def update_parameters(self, **parameters):
        self.seen.update(parameters=parameters)

    def map_array(self, function, *arguments):
        self.seen.update(function=function, calls=list(zip(*arguments, strict=True)))
        return [type("Job", (), {"job_id": f"7_{i}"})() for i in range(len(self.seen["calls"]))]


def test_what_slurm_is_asked_for(capsys, tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit, "AutoExecutor", Cluster)
    array = ["array", "--tasks", "3", "--partition", "h200", "--gpus", "1", "--hours", "1.5", "--slurm", "account=mine"]
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = mfm(capsys, *array, "--", *SAMPLE, tmp_path / "s")
    assert (code, err.count("\n"), "no sbatch" in err) == (2, 1, True)
    assert not (tmp_path / "s").exists()
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    code, text, err = mfm(capsys, *array, "--json", "--", *SAMPLE, tmp_path / "s")
    assert code == 0, err
    assert json.loads(text)["jobs"] == ["7_0", "7_1", "7_2"]
    assert Cluster.seen["cluster"] == "slurm"
    assert Cluster.seen["folder"] == tmp_path / "s" / "array"
    assert Cluster.seen["parameters"] == {
        "name": "mfm-sample", "timeout_min": 90, "gpus_per_node": 1, "slurm_partition": "h200",
        "slurm_array_parallelism": 3, "slurm_additional_parameters": {"account": "mine"},
    }  # fmt: skip
    assert Cluster.seen["calls"] == [([str(part) for part in (*SAMPLE, tmp_path / "s")], f"{i}/3") for i in range(3)]


def test_bad_usage_is_one_line(capsys, tmp_path, monkeypatch):
    out = ["--out", tmp_path / "x"]
    for arguments, says in (
        (["--", "train", "gmm", *out], "mfm array takes one of sample, posterior, steer, eval"),
        (["--", "sample", "digits"], "as --out DIR"),
        (["--", "sample", "digits", "--out"], "as --out DIR"),
        (["--", "sample", "digits", *out, "--worker", "0/2"], "leave it out"),
        (["--cluster", "slrum", "--", "sample", "digits", *out], "did you mean 'slurm'"),
        (["--slurm", "account", "--", "sample", "digits", *out], "key=value"),
        (["--tasks", "0", "--", "sample", "digits", *out], "--tasks"),
        ([], "COMMAND"),
    ):
        code, text, err = mfm(capsys, "array", *arguments)
        assert (code, text, err.count("\n")) == (2, "", 1), err
        assert says in err
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, _, err = mfm(capsys, "array", "--", "sample", "digits", *out)
    assert (code, err.count("\n"), "pip install 'metaflowmaps[slurm]'" in err) == (2, 1, True)
    assert not (tmp_path / "x").exists()
