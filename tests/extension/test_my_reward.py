"""Rewards that stand outside the package work through Python, the command line and the report."""

import json
from pathlib import Path

import pytest
import torch

import metaflowmaps as mfm
from conftest import mfm_command as run
from metaflowmaps.errors import InputError
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.work.choices import outside

FILE = Path(__file__).parent / "my_reward.py"
right, quadrant = outside(f"{FILE}:right"), outside(f"{FILE}:quadrant")
TUNING = {"steps": 2, "batch_size": 16, "threads": 1, "meters": {"every": 0}, "map": "none",
          "states": {"pool": 64, "pool_steps": 1}}  # fmt: skip
NAMES = [f"{FILE}:right", f"{FILE}:quadrant"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mfm.MetaFlowMap(MLPConfig(width=8, depth=2).network((2,)), mfm.LinearPath())


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "base"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("reward", [right, quadrant], ids=["function", "class"])
def test_steer_uses_a_reward_from_outside(model, reward):
    result = mfm.steer(model, reward, 8, "mfm-gf", mfm.ODE(steps=3), seed=0)
    torch.testing.assert_close(result.rewards, reward(result.samples))


@pytest.mark.parametrize(("reward", "estimator"), [(right, "gradient"), (quadrant, "gradient-free")])
def test_value_gradient_uses_a_reward_from_outside(model, reward, estimator):
    posterior = mfm.MapPosterior(model)
    estimate = mfm.value_gradient(posterior, reward, 0.5, torch.zeros(3, 2), 4, estimator)
    torch.testing.assert_close(estimate.rewards, torch.stack([reward(x) for x in estimate.draws]))
    assert estimate.gradient.isfinite().all()


def test_what_a_reward_declares_is_believed(model):
    with pytest.raises(InputError, match="not differentiable"):
        mfm.steer(model, quadrant, 8, "mfm-g", mfm.ODE(steps=3), seed=0)


@pytest.mark.parametrize("reward", [right, quadrant], ids=["function", "class"])
def test_finetune_uses_a_reward_from_outside(model, reward, tmp_path):
    tuned = mfm.finetune(model, reward, tmp_path / "run", **TUNING)
    assert any(not torch.equal(p, q) for p, q in zip(tuned.parameters(), model.parameters(), strict=True))


@pytest.mark.usefixtures("quick_judgement")
@pytest.mark.parametrize(
    "reward", [pytest.param(NAMES[0], marks=pytest.mark.attack, id="function"), pytest.param(NAMES[1], id="class")]
)
def test_the_commands_and_the_report_use_a_reward_from_outside(checkpoint, reward, tmp_path, capsys):
    # seven samples: of eight or more the bias of so few draws would be measured, and warned of
    steer = ["steer", checkpoint, "--reward", reward, "--method", "mfm-gf", "--steps", "2", "--num", "7"]
    settings = ["threads=1", "meters.every=0", "batch_size=16", "states.pool=64", "states.pool_steps=1"]
    tune = ["finetune", checkpoint, "--reward", reward, "--map", "none", "--max-steps", "1"]
    tune += [part for setting in settings for part in ("--set", setting)]
    for name, command in (("steered", steer), ("tuned", tune)):
        code, text, err = run(capsys, *command, "--out", tmp_path / name, "--json")
        assert code == 0, err
        assert reward in json.dumps(json.loads(text)["config"])
    code, _, err = run(capsys, "report", tmp_path / "steered", tmp_path / "tuned", "--out", tmp_path / "report.html")
    assert code == 0, err
    assert Path(reward).name in (tmp_path / "report.html").read_text()


def test_evaluations_of_images_take_a_reward_from_outside(tmp_path, capsys):
    """Of so few draws the value is poor, but it is that of this reward: another one has another value."""
    few = ["states=4", "times=[0.5]", "num_draws=[4]", "map_steps=[1]", "glass_steps=[]", "rollout_steps=4",
           "rollout_particles=8", "strength=1.0"]  # fmt: skip
    settings = [part for setting in few for part in ("--set", setting)]
    measured = {}
    for name in NAMES:
        value = ["eval", "value", "digits", *settings, "--set", f"reward={name}"]
        code, text, err = run(capsys, *value, "--out", tmp_path / name.partition(":")[2], "--json")
        assert code == 0, err
        results = json.loads(text)
        assert results["config"]["reward"] == name
        measured[name] = results["metrics"]["by_sampler"]["map-1"]["4"]["0.5"]
    one, other = measured.values()
    assert one != other
    code, _, err = run(capsys, "eval", "value", "digits", *settings, "--set", f"reward={FILE}:wrong", "--out", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
