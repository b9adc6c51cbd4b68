"""Work cut into shards: whoever makes them, in whatever order and however often interrupted, the result is the same."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from test_image_commands import EXPERIMENTS

from conftest import mfm_command as mfm
from metaflowmaps.errors import InputError
from metaflowmaps.lab.evaluate.images.setup import ImageSetup
from metaflowmaps.work import claims
from metaflowmaps.work import shards as sharding
from metaflowmaps.work.shards import Shard, Share, Worker

WEAK = ["--reward", "margin:7", "--strength", "0.05"]  # one draw of few must not have all the weight
CASES = {
    "refine": ["sample", "--steps", "2", "--num", "27"],
    "posterior": ["posterior", "--num-draws", "27", "--seed", "3"],
    "mfm-gf": ["steer", *WEAK, "--num", "27", "--steps", "4", "--method", "mfm-gf"],
    "mfm-g, sde": ["steer", *WEAK, "--num", "27", "--steps", "4", "--method", "mfm-g", "--process", "sde"],
    "best-of-n": ["steer", *WEAK, "--num", "27", "--steps", "3", "--method", "best-of-n"],
    "mfm-smc, systems": ["steer", *WEAK, "--num", "28", "--steps", "4", "--method", "mfm-smc",
                         "--set", "method.particles=4"],
    "mfm-anneal, systems": ["steer", *WEAK, "--num", "28", "--steps", "2", "--method", "mfm-anneal",
                            "--set", "method.particles=4"],
}  # fmt: skip
BY = ["--shard-size", "8"]  # 4 shards, the last one smaller
# another batch size rounds otherwise, and steering multiplies it: 2.1e-4 at most here; another seed differs by 0.1 to 1
CLOSE = {"rtol": 0.0, "atol": 1e-3}


def done(capsys, out, case, *more):
    """Run a case, which must succeed: its results."""
    code, text, err = mfm(capsys, case[0], "digits", *case[1:], *more, "--out", out, "--json")
    assert code == 0, err
    return json.loads(text), err


def drawn(out):
    (file,) = out.glob("*.safetensors")
    return file.read_bytes()


@pytest.fixture(scope="module")
def short():
    return ["sample", "--num", "27"]


LONG = ("mfm-gf", "best-of-n", "mfm-anneal, systems")  # as another of its kind: in `make attack`


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.attack] if n in LONG else []) for n in CASES])
def test_nothing_depends_on_how_many_workers_there_are(capsys, tmp_path, name):
    case = CASES[name]
    one, _ = done(capsys, tmp_path / "one", case, *BY)
    for count in (2, 3) if name == "refine" else (3,):
        out = tmp_path / str(count)
        for i in reversed(range(count)):
            made, err = done(capsys, out, case, *BY, "--worker", f"{i}/{count}")
            assert (i == 0) == ("command" in made)  # the last one puts them together
            assert (i == 0) == (out / "results.json").exists()
            assert err.count("is made") == len(range(i, 4, count))
        assert drawn(out) == drawn(tmp_path / "one")
        assert made["config"] == one["config"]
        assert made["metrics"] == one["metrics"]
        timed = ("seconds", "wall_seconds", "peak_memory_bytes")
        assert {k: v for k, v in made["cost"].items() if k not in timed} == {
            k: v for k, v in one["cost"].items() if k not in timed
        }
        assert not (out / "shards").exists()
    assert one["cost"]["shards"] == 4
    # and as without shards: the same seeds, the same samples up to the rounding of another batch size
    whole, _ = done(capsys, tmp_path / "whole", case)
    assert whole["config"] == one["config"]
    assert whole["cost"].keys() == one["cost"].keys() - {"shards", "wall_seconds"}
    assert whole["cost"]["forwards"] == one["cost"]["forwards"]
    assert whole["cost"].get("nfe") == one["cost"].get("nfe")
    a, b = (load_file(next((tmp_path / k).glob("*.safetensors"))) for k in ("whole", "one"))
    assert a.keys() == b.keys()
    order = [x["seeds"].argsort(stable=True) for x in (a, b)]  # whole systems: a shard has its rows together
    for key in a.keys() - {"x_t", "t"}:
        torch.testing.assert_close(a[key][order[0]], b[key][order[1]], **CLOSE)
    assert whole["metrics"].keys() == one["metrics"].keys()
    assert whole["metrics"].get("captions") == one["metrics"].get("captions")
    words = {key for key, value in whole["metrics"].items() if isinstance(value, str)}
    assert all(whole["metrics"][key] == one["metrics"][key] for key in words)
    for key in whole["metrics"].keys() - {"captions"} - words:
        assert whole["metrics"][key] == pytest.approx(one["metrics"][key], rel=1e-3, abs=1e-3), key


def test_twice_is_once(capsys, tmp_path, short):
    first, _ = done(capsys, tmp_path / "s", short, *BY)
    before = drawn(tmp_path / "s")
    stamp = (tmp_path / "s" / "samples.safetensors").stat().st_mtime_ns
    for more in ([], ["--worker", "1/2"], BY):
        again, err = done(capsys, tmp_path / "s", short, *more)
        assert again == first
        assert "is made" not in err
    assert drawn(tmp_path / "s") == before
    assert (tmp_path / "s" / "samples.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.attack
def test_killed_and_resumed(capsys, tmp_path):
    """kill -9 in the third of four shards: two are kept as they are, and the end is as if nothing had happened."""
    reward = tmp_path / "r.py"
    reward.write_text(
        "import os, signal\ncalls = [0]\ndef f(x):\n    calls[0] += 1\n"
        "    if calls[0] > 3 and 'DIE' in os.environ:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return x.flatten(1).mean(1)\n"
    )
    case = ["steer", "--reward", f"{reward}:f", "--num", "27", "--steps", "2", "--method", "none", *BY]
    done(capsys, tmp_path / "calm", case)
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "metaflowmaps.cli", case[0], "digits", *case[1:], "--out", str(out)]
    killed = subprocess.run(command, env={**os.environ, "DIE": "1"}, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    kept = {path: path.read_bytes() for path in (out / "shards").glob("*.safetensors")}
    assert 0 < len(kept) < 4
    assert not (out / "results.json").exists()
    _, err = done(capsys, out, case)
    assert err.count("is made") == 4 - len(kept)
    assert drawn(out) == drawn(tmp_path / "calm")


MORE = [pytest.param(damage, marks=pytest.mark.attack) for damage in ("no tensors", "no json")]


@pytest.mark.parametrize("damage", ["flipped", "short", "no entry", *MORE])
def test_damaged_shards_are_made_again(capsys, tmp_path, short, damage):
    done(capsys, tmp_path / "whole", short, *BY)
    for finisher, made in ((["--worker", "1/2"], 3), ([], 3)):
        out = tmp_path / f"s{len(finisher)}"
        done(capsys, out, short, *BY, "--worker", "0/2")  # 00000 and 00002
        file, entry = out / "shards" / "00000.safetensors", out / "shards" / "00000.json"
        data = bytearray(file.read_bytes())
        data[-5] ^= 4
        if damage == "flipped":
            file.write_bytes(data)
        elif damage == "short":
            file.write_bytes(data[:-9])
        elif damage == "no entry":
            entry.unlink()
        elif damage == "no tensors":
            file.unlink()
        else:
            entry.write_text("{")
        results, err = done(capsys, out, short, *finisher)
        if finisher and damage != "flipped":  # seen at once, and it is the other worker's
            assert results["metrics"] == {"shards": 4, "missing": 1}
            results, more = done(capsys, out, short, "--worker", "0/2")
            err += more
        assert err.count("is made") == made, err
        assert ("00000.safetensors is damaged" in err) == (damage != "no tensors")
        assert drawn(out) == drawn(tmp_path / "whole")


@pytest.mark.attack
def test_two_processes_at_once(capsys, tmp_path):
    case = ["sample", "--num", "400", "--steps", "4", "--shard-size", "20"]
    out = tmp_path / "s"
    command = [sys.executable, "-m", "metaflowmaps.cli", case[0], "digits", *case[1:], "--out", str(out)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(err.count("is made") for _, err in said) == 20  # each once
    done(capsys, tmp_path / "alone", case)
    assert drawn(out) == drawn(tmp_path / "alone")


@pytest.mark.parametrize("dies", [True, False])
def test_a_shard_in_other_hands_is_left_or_waited_for(capsys, tmp_path, short, dies):
    done(capsys, tmp_path / "whole", short, *BY)
    out, other = tmp_path / "s", tmp_path / "other"
    done(capsys, other, short, *BY, "--worker", "1/4")
    done(capsys, out, short, *BY, "--worker", "3/4")
    held = sharding.lock(out / "shards" / "00001.lock")
    results, err = done(capsys, out, short, "--worker", "0/1")
    assert results["metrics"] == {"shards": 4, "missing": 1}
    assert err.count("is made") == 2

    def let_go():
        time.sleep(0.5)
        if not dies:
            for name in ("00001.safetensors", "00001.json"):
                shutil.copy(other / "shards" / name, out / "shards" / name)
        os.close(held)

    thread = threading.Thread(target=let_go)
    thread.start()
    began = time.monotonic()
    _, err = done(capsys, out, short)
    thread.join()
    assert time.monotonic() - began > 0.4
    assert err.count("is made") == int(dies)  # if the other one did not make it, it is made here
    assert drawn(out) == drawn(tmp_path / "whole")


def test_one_process_reads_nothing_back_that_it_made(capsys, tmp_path, short, monkeypatch):
    def refuse(*_):
        raise AssertionError("read from disk")

    done(capsys, tmp_path / "whole", short)
    monkeypatch.setattr(sharding, "load", refuse)
    done(capsys, tmp_path / "shards", short, *BY)
    monkeypatch.setattr(sharding, "save", refuse)
    monkeypatch.setattr(sharding, "write_json", refuse)
    done(capsys, tmp_path / "memory", short)  # one shard: nothing to go on from, so nothing is written before the end
    assert drawn(tmp_path / "memory") == drawn(tmp_path / "whole")


def test_other_settings_are_refused(capsys, tmp_path, short):
    out = tmp_path / "s"
    done(capsys, out, short, *BY, "--worker", "0/2")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for more, says in (
        (["--seed", "1", *BY], "another run (config.seed: 0 ≠ 1)"),
        (["--num", "28"], "another run"),
        (["--shard-size", "9"], "shards of 8: leave --shard-size out"),
        (["--worker", "2/2"], "--worker takes i/K"),
        (["--worker", "one"], "--worker takes i/K"),
        (["--worker", "-1/2"], "--worker takes i/K"),
        (["--shard-size", "0"], "--shard-size"),
    ):
        code, text, err = mfm(capsys, *short[:1], "digits", *short[1:], *more, "--out", out)
        assert (code, text, err.count("\n")) == (2, "", 1), err
        assert says in err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_start_that_made_nothing_does_not_occupy_the_directory(capsys, tmp_path):
    (tmp_path / "r.py").write_text("def f(x):\n    raise ValueError('no')\n")
    steer = ["steer", "digits", "--num", "9", "--steps", "2", "--method", "none", "--out", tmp_path / "s"]
    code, _, err = mfm(capsys, *steer, "--reward", f"{tmp_path}/r.py:f", "--worker", "0/1", "--shard-size", "3")
    assert (code, err.count("\n")) == (2, 1), err
    assert (tmp_path / "s" / "shards" / "plan.json").exists()
    code, _, err = mfm(capsys, *steer, "--reward", "ink", "--shard-size", "4")
    assert code == 0, err


def test_what_cannot_be_cut_is_refused(capsys, tmp_path):
    steer = ["steer", "digits", *WEAK, "--steps", "2", "--out", tmp_path / "x", "--num"]
    systems = ["--set", "method.particles=6"]
    for arguments, says in (
        (["12", "--method", "tds", "--worker", "0/2"], "--set method.particles=64"),
        (["12", "--method", "mfm-smc", "--shard-size", "4"], "--set method.particles=64"),
        (["12", "--method", "tds", *systems, "--shard-size", "8"], "--shard-size must be a multiple of particles (6)"),
        (["13", "--method", "tds", *systems], "--num must be a multiple of particles (6)"),
    ):
        code, text, err = mfm(capsys, *steer, *arguments)
        assert (code, text, err.count("\n")) == (2, "", 1), err
        assert says in err
    assert not (tmp_path / "x").exists()
    # one worker of one cuts nothing
    code, _, err = mfm(capsys, *steer, "12", "--method", "tds", "--worker", "0/1")
    assert code == 0, err


def test_torchrun_says_who_a_process_is(capsys, tmp_path, short, monkeypatch):
    done(capsys, tmp_path / "whole", short, *BY)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        results, err = done(capsys, tmp_path / "s", short, *BY)
        assert err.count("is made") == 2
    assert "command" in results
    assert drawn(tmp_path / "s") == drawn(tmp_path / "whole")
    assert sharding.share_of("0/3", 5) == Share(Worker(0, 3), 5)  # what is typed comes first


# -- parts -------------------------------------------------------------------------------------------------------------


def test_many_may_share_a_claim_of_the_same(tmp_path, monkeypatch):
    """What another process does is done here on another file descriptor: flock tells descriptors apart."""
    monkeypatch.setattr(claims, "CLAIM_SECONDS", 0.1)
    out, config = tmp_path / "o", {"a": 1}
    assert claims.claim(out, "sample", config, shared=True) is None
    other = os.open(out / claims.LOCK, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)  # another worker comes in
    claims.release(out)
    assert claims.claim(out, "sample", config, shared=True) is None
    claims.release(out)
    with pytest.raises(InputError, match="another process"):  # nothing is made yet, but somebody is there
        claims.claim(out, "sample", {"a": 2}, shared=True)
    with pytest.raises(InputError, match="another process"):
        claims.claim(out, "sample", config)  # not shared: alone or not at all
    assert json.loads((out / "run.json").read_text())["config"] == config
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # both have let go; now one that does not share
    with pytest.raises(InputError, match="another process"):
        claims.claim(out, "sample", config, shared=True)
    os.close(other)
    assert claims.claim(out, "sample", {"a": 2}, shared=True) is None
    claims.release(out)


def test_seconds_by_the_clock_are_those_in_which_somebody_worked():
    assert sharding.wall_seconds([[5, 7], [0, 2], [1, 4], [3, 4]]) == 6
    made = [{"cost": {"forwards": 3, "seconds": 2.0, "peak_memory_bytes": 5}, "span": [0, 2]},
            {"cost": {"forwards": 4, "seconds": 3.0, "peak_memory_bytes": 4}, "span": [1, 4]}]  # fmt: skip
    assert sharding.total_cost(made) == {
        "forwards": 7, "seconds": 5.0, "peak_memory_bytes": 5, "shards": 2, "wall_seconds": 4.0,
    }  # fmt: skip


def test_who_makes_all_shards_alone_counts_no_second_twice(tmp_path):
    """The shards' own seconds and what came after them: no more than the clock, which then has nothing to add."""
    began = time.perf_counter()
    shards = sharding.ShardFolder(tmp_path / "shards", None, lambda: False, lambda line: None)
    shards.begin(["00000", "00001"], 4)
    shards.work(lambda name: time.sleep(0.02) or Shard({"samples": torch.ones(4)}, {}))
    cost = shards.cost()
    shards.close()
    assert cost.keys() == {"seconds"}
    assert 0.04 <= cost["seconds"] <= time.perf_counter() - began


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    shards = sharding.ShardFolder(tmp_path / "shards", None, lambda: False, lambda line: None)
    shards.begin(["00000", "00001"], 4)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        shards.work(lambda name: Shard({"samples": torch.ones(4)}, {}))
    assert {path.name for path in (tmp_path / "shards").iterdir()} == {"plan.json", "plan.lock", "00000.lock"}


# -- evaluations -------------------------------------------------------------------------------------------------------


def same(one, other):
    """The metrics, but for what is measured by a clock."""

    def untimed(value):
        if isinstance(value, dict):
            return {k: untimed(v) for k, v in value.items() if "seconds" not in k and k not in ("tables", "summary")}
        return [untimed(v) for v in value] if isinstance(value, list) else value

    return untimed(one["metrics"]) == untimed(other["metrics"])


LONGER = [pytest.param(name, marks=pytest.mark.attack) for name in ("generation", "race")]


@pytest.mark.parametrize("name", ["value", "inverse", *LONGER])
def test_evaluations_are_shared_by_workers(capsys, tmp_path, name):
    command, *_ = EXPERIMENTS[name]
    case = ["eval", command[0], "digits", *command[1:], "--shard-size", "8"]

    def run(out, *more):
        code, text, err = mfm(capsys, *case, *more, "--out", tmp_path / out, "--json")
        assert code == 0, err
        return json.loads(text), err

    first, err = run("two", "--worker", "1/2")
    cells = first["metrics"]["shards"]
    assert first["metrics"]["missing"] == -(-cells // 2)
    assert err.count("is made") == cells // 2
    two, _ = run("two", "--worker", "0/2")
    assert not (tmp_path / "two" / "cells").exists()
    assert two["cost"]["wall_seconds"] > 0
    one, _ = run("one")
    assert two["config"] == one["config"]
    if name != "race":  # its headline divides by seconds, and so its order may change
        assert same(one, two)
    else:
        keys = ("reward", "distance", "vendi", "frechet", "method", "samples")
        for reward in one["metrics"]["rewards"]:
            a, b = ([[c[k] for k in keys] for c in r["metrics"]["rewards"][reward]["cells"]] for r in (one, two))
            assert a == b


def test_an_interrupted_evaluation_keeps_its_cells(capsys, tmp_path, monkeypatch):
    command, *_ = EXPERIMENTS["generation"]
    case = ["eval", command[0], "digits", *command[1:], "--shard-size", "8", "--json", "--out"]
    uncut = [part for part in case if part not in ("--shard-size", "8")]
    whole = json.loads(mfm(capsys, *uncut, tmp_path / "whole")[1])

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ImageSetup, "flow", stop)
        code, _, err = mfm(capsys, *case, tmp_path / "s")
    assert code == 130
    made = err.count("is made")
    assert made == 6  # refine-1, refine-3 and compose-2, two each, before the first ODE
    code, text, err = mfm(capsys, *case, tmp_path / "s")
    assert code == 0, err
    results = json.loads(text)
    assert f"{made + 1} of" in err
    assert err.count("is made") == 4  # ode-3 of the map and of the drift
    assert results["config"] == whole["config"]
    for name, cell in whole["metrics"]["by_sampler"].items():  # cut or not: other batch sizes round otherwise
        made = results["metrics"]["by_sampler"][name]
        assert {**made, "cost": 0} == pytest.approx({**cell, "cost": 0}, rel=1e-3)
