"""A fine-tuning objective that stands outside the package works through Python, the command line and the report."""

import json
import sys
from pathlib import Path

import pytest
import torch

import metaflowmaps as mfm
from conftest import mfm_command as run
from metaflowmaps.checkpoint import resolve_checkpoint
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning import TuningSetup
from metaflowmaps.finetuning.tuning_config import tuned_parts
from metaflowmaps.lab.evaluate.tuning_error import TunedEvalConfig
from metaflowmaps.lab.evaluate.tuning_subject import TuningSubject
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.work.choices import outside

HERE = Path(__file__).parent
NAME = f"{HERE / 'my_objective.py'}:RewardWeighted"
sys.path.append(str(HERE.parent / "finetuning"))  # exact maps and z-scores
from exact import LEVEL, LOUD, Case, collect, features, z_scores  # noqa: E402

BASE_ALONE = {"base": 1.0, "tilted": 0.0, "pool": 64, "pool_steps": 1}
SMALL = {
    "steps": 3,
    "batch_size": 16,
    "threads": 1,
    "distil": {"steps": 2, "batch_size": 16, "pool": 64},
    "meters": {"every": 0},
}


def small_map():
    torch.manual_seed(0)
    return mfm.MetaFlowMap(MLPConfig(width=8, depth=2).network((2,)), mfm.LinearPath())


def test_its_fixed_point_is_the_tilted_drift():
    case = Case("mixture-2d", mfm.LinearPath())
    objective = outside(NAME)(ceiling=1e9).start(TuningSetup(case.problem(), case.states("base"), 2000, 0))
    batch = collect(objective, case.student(), 10)
    weight, functions = batch.weight[:, None], features(batch)
    assert z_scores(weight * (case.answer(batch) - batch.target), functions).abs().max() < LEVEL
    assert z_scores(weight * (case.answer(batch, case.law) - batch.target), functions).abs().max() > LOUD


def test_from_python_by_object_and_by_name(tmp_path):
    chosen = outside(NAME)(ceiling=20.0)
    settings = {**SMALL, "states": BASE_ALONE}
    tuned = mfm.finetune(small_map(), lambda x: x[:, 0], tmp_path / "object", method=chosen, **settings)
    method = {"name": NAME, "ceiling": 20.0}
    named = mfm.finetune(small_map(), lambda x: x[:, 0], tmp_path / "name", method=method, **settings)
    for one, other in zip(tuned.parameters(), named.parameters(), strict=True):
        assert torch.equal(one, other)
    training = resolve_checkpoint(tmp_path / "object").config["training"]
    assert training["method"] == method
    assert tuned_parts(training) == {"drift": True, "map": True}
    with pytest.raises(InputError, match="did you mean 'ceiling'"):
        mfm.finetune(small_map(), lambda x: x[:, 0], tmp_path / "x", method={"name": NAME, "cieling": 2.0})


def test_from_the_command_line_and_into_the_report(tmp_path, capsys, monkeypatch):
    few = TunedEvalConfig(samples=64, seeds=1, ode_steps=3)
    monkeypatch.setattr(TuningSubject, "usual_judgement", lambda subject: few)
    small_map().save_pretrained(tmp_path / "base")
    (tmp_path / "rewards.py").write_text("def right(x):\n    return x[:, 0]\n")
    settings = [
        "threads=1", "meters.every=0", "batch_size=16", "states.pool=64", "states.pool_steps=1", "states.base=1",
        "states.tilted=0", "distil.batch_size=16", "distil.pool=64", "method.ceiling=20",
    ]  # fmt: skip
    arguments = ["finetune", tmp_path / "base", "--reward", f"{tmp_path / 'rewards.py'}:right", "--method", NAME]
    arguments += [part for setting in settings for part in ("--set", setting)]
    code, text, err = run(capsys, *arguments, "--max-steps", "2", "--out", tmp_path / "run", "--json")
    assert code == 0, err
    results = json.loads(text)
    assert results["config"]["method"] == {"name": NAME, "ceiling": 20.0}
    assert results["metrics"]["samplers"].keys() == {"map-1", "map-4", "ode-3"}
    code, _, err = run(capsys, "report", tmp_path / "run", "--out", tmp_path / "report.html")
    assert code == 0, err
    assert "by reward-weighted flow matching" in (tmp_path / "report.html").read_text()
