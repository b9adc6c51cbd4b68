"""mfm sample and mfm steer save a seed with each sample, and make chosen ones again."""

import json

import pytest
import torch
from safetensors.torch import load_file

from conftest import mfm_command as mfm

STEER = ["--strength", "0.05", "--steps", "5", "--method"]  # one draw of few must not have all the weight
CASES = {
    "sample": ["sample", "--steps", "3"],
    "sample, compose": ["sample", "--steps", "2", "--method", "compose"],
    "steer, mfm-gf": ["steer", *STEER, "mfm-gf"],
    "steer, tds": ["steer", *STEER, "tds", "--set", "method.particles=3", "--set", "method.returns=one"],
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # a batch of two rounds otherwise than one of twenty


def made(capsys, out, command, checkpoint, *arguments):
    code, text, err = mfm(capsys, command, checkpoint, *arguments, "--out", out, "--json")
    assert code == 0, err
    return load_file(out / "samples.safetensors"), json.loads(text)


@pytest.mark.parametrize("name", CASES)
def test_chosen_samples_are_made_again(capsys, run, tmp_path, name):
    command, *options = CASES[name]
    whole, results = made(capsys, tmp_path / "all", command, run, *options, "--num", "20", "--seed", "3")
    assert whole["seeds"].shape == (20,)
    assert whole["seeds"].dtype == torch.int64
    assert results["config"]["only"] == []
    chosen = whole["seeds"][[11, 4]].tolist()
    only = [part for seed in chosen for part in ("--only", seed)]
    again, results = made(capsys, tmp_path / "two", command, run, *options, *only)
    assert results["config"]["only"] == chosen
    assert results["config"]["num"] == results["metrics"]["num"] == 2
    assert again["seeds"].tolist() == chosen
    torch.testing.assert_close(again["samples"], whole["samples"][[11, 4]], **CLOSE)
    if command == "steer":
        torch.testing.assert_close(again["rewards"], whole["rewards"][[11, 4]], **CLOSE)
    # the first of fewer
    few, _ = made(capsys, tmp_path / "few", command, run, *options, "--num", "7", "--seed", "3")
    assert torch.equal(few["seeds"], whole["seeds"][:7])
    torch.testing.assert_close(few["samples"], whole["samples"][:7], **CLOSE)


def test_particle_systems_are_made_again_whole(capsys, run, tmp_path):
    options = [*STEER, "mfm-smc", "--set", "method.particles=4"]
    whole, _ = made(capsys, tmp_path / "all", "steer", run, *options, "--num", "12")
    seeds = whole["seeds"][:3]  # row m·S + s: one a system
    assert whole["seeds"].tolist() == seeds.repeat(4).tolist()
    again, results = made(capsys, tmp_path / "one", "steer", run, *options, "--only", int(seeds[1]))
    assert results["metrics"]["num"] == 4
    torch.testing.assert_close(again["samples"], whole["samples"][1::3], **CLOSE)
    code, _, err = mfm(capsys, "steer", run, *STEER, "mfm-smc", "--only", "5", "--out", tmp_path / "no")
    assert (code, err.count("\n"), "--set method.particles=" in err) == (2, 1, True)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("command", ["sample", "steer"])
def test_bad_seeds_are_one_line(capsys, run, tmp_path, command):
    for arguments, says in (
        (["--only", "first"], "--only"),
        (["--only", "-1"], "--only"),
        (["--only", str(2**63)], "--only"),
        (["--only", "1", "--num", "2"], "leave --num out"),
    ):
        code, out, err = mfm(capsys, command, run, *arguments, "--out", tmp_path / "x")
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert says in err
    assert not (tmp_path / "x").exists()


def test_chosen_posterior_draws_are_made_again(capsys, run, tmp_path):
    options = ["--t", "0.4", "--seed", "3"]  # the noisy state is the seed's
    code, _, err = mfm(capsys, "posterior", run, *options, "--num-draws", "20", "--out", tmp_path / "all")
    assert code == 0, err
    whole = load_file(tmp_path / "all" / "draws.safetensors")
    chosen = whole["seeds"][[11, 4]].tolist()
    only = [part for seed in chosen for part in ("--only", seed)]
    code, _, err = mfm(capsys, "posterior", run, *options, *only, "--out", tmp_path / "two")
    assert code == 0, err
    again = load_file(tmp_path / "two" / "draws.safetensors")
    assert again["seeds"].tolist() == chosen
    torch.testing.assert_close(again["draws"], whole["draws"][[11, 4]], **CLOSE)
