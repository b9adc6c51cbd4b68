"""Every command with arguments that nobody can have meant: exit code 2, one line that helps, nothing on disk."""

import shutil

import pytest

from conftest import mfm_command
from metaflowmaps.cli.app import COMMANDS

MADE = {
    "train": ["gmm"],
    "distill": ["digits"],
    "sample": ["digits"],
    "posterior": ["digits"],
    "advise": ["digits"],
    "steer": ["digits"],
    "finetune": ["digits"],
    "eval posterior": ["digits"],
    "eval value": ["digits"],
    "eval steering": ["digits"],
    "eval generation": ["digits"],
    "bench": ["digits"],
    "run": ["digits-inverse", "digits"],
    "convert": ["w.safetensors"],
    "encode-latents": ["pictures"],
    "report": ["runs"],
    "demo": [],
    "completion": ["bash"],
    "recipes": [],
    "doctor": [],
    "play": ["digits"],
}
BAD = {
    "an option that is none": ["--stesp", "3"],
    "an option without its value": ["--out"],
    "no name of a folder": ["--out", ""],
    "all there is": ["--out", "/"],
    "a device that is none": ["--device", "tpu9"],
    "a negative seed": ["--seed", "-1"],
    "a seed in words": ["--seed", "seven"],
    "a setting that is none": ["--set", "no.such.thing=1"],
    "a setting without a value": ["--set", "x"],
    "more than there is room for": ["one", "two", "three", "four", "five"],
}
OWN = [
    ["sample", "digits", "--num", "0"],
    ["sample", "digits", "--num", "1e3"],
    ["sample", "digits", "--steps", "-1"],
    ["sample", "digits", "--method", "guess"],
    ["sample", "digits", "--label", "eleven"],
    ["sample", "digits", "--only", "-4"],
    ["sample", "digits", "--worker", "4/4"],
    ["sample", "digits", "--worker", "a/b"],
    ["sample", "/no/such/place"],
    ["sample", "/dev/null"],
    ["sample", "."],
    ["posterior", "digits", "--t", "nan"],
    ["posterior", "digits", "--t", "2"],
    ["posterior", "digits", "--num-draws", "0"],
    ["posterior", "digits", "--image", "/dev/zero"],
    ["steer", "digits", "--reward", "slnat"],
    ["steer", "digits", "--reward", "/no/such.py:reward"],
    ["steer", "digits", "--strength", "nan"],
    ["steer", "digits", "--method", "mfm-h"],
    ["steer", "digits", "--num-draws", "0"],
    ["steer", "digits", "--steps", "0"],
    ["steer", "digits", "--process", "odd"],
    ["steer", "digits", "--preset", "imagse"],
    ["steer", "digits", "--set", "method.recycle=-1"],
    ["steer", "digits", "--batch-size", "0"],
    ["train", "gm"],
    ["train", "gmm", "--max-steps", "0"],
    ["train", "gmm", "--set", "optimizer.lr=inf"],
    ["train", "gmm", "--set", "model.network.depth=1000000"],
    ["train", "gmm", "--resume", "/no/such"],
    ["train", "images", "--data", "/dev/zero"],
    ["train", "mnist", "--data", "/no/such"],
    ["eval", "posterior", "digits", "--law", "gm"],
    ["eval", "steering", "digits", "--task", "rase"],
    ["eval", "generation", "digits", "--samples", "1"],
    ["eval", "nothing", "digits"],
    ["encode-latents", "pictures"],
    ["encode-latents", "/dev/zero", "--out", "there"],
    ["encode-latents", "--out", "there"],
    ["convert", "/dev/zero"],
    ["convert", "w.txt"],
    ["report"],
    ["play", "/no/such/place"],
    ["play", "/dev/zero"],
    ["play", "digits", "--port", "99999"],
    ["recipes", "all"],
]


def commands() -> list[list[str]]:
    # what some commands lack is an option that is none there: as bad
    made = [[*name.split(), *MADE[name], *bad] for name in MADE for bad in BAD.values()]
    made.remove(["doctor", "--device", "tpu9"])  # a fault that it is there to find
    return made + OWN


def test_every_command_is_attacked():
    assert {name.split()[0] for name in MADE} == set(COMMANDS)


@pytest.mark.attack
def test_bad_arguments_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, record_property):
    monkeypatch.chdir(tmp_path)
    failures = []
    for arguments in commands():
        try:
            code, out, err = mfm_command(capsys, *arguments)
        except Exception as error:
            failures.append(f"{arguments}: {type(error).__name__}: {str(error)[:200]}")
            continue
        if (code, out) != (2, "") or err.count("\n") != 1 or "Traceback" in err:
            failures.append(f"{arguments}: code {code}, {out[:100]!r}, {err[-300:]!r}")
        for left in tmp_path.iterdir():
            if "--resume" not in arguments:  # which is read once the run's folder is claimed
                failures.append(f"{arguments}: left {left.name}")
            shutil.rmtree(left)
    refused = len(commands()) - len(failures)
    record_property("attack", {"what": "bad arguments", "tries": len(commands()), "refused": refused})
    assert not failures, "\n".join(failures)
