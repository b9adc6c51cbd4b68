"""A method and a posterior that stand outside the package, through Python, the command line, evaluation and report."""

import json
from pathlib import Path

import pytest
import torch
from my_method import TopDraw
from my_mover import Hold
from my_posterior import TwoSteps

import metaflowmaps as mfm
from conftest import CASES, PATHS
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.random import randn, stream

HERE = Path(__file__).parent
METHOD, POSTERIOR = f"{HERE / 'my_method.py'}:TopDraw", f"{HERE / 'my_posterior.py'}:TwoSteps"


def mfm_run(*arguments):
    """``mfm`` in this process, which must end well."""
    from metaflowmaps import cli

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mfm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code


def random_map(path):
    """A map with small random weights."""
    network = MLPConfig(width=16, depth=2).network((2,))
    for parameter in network.parameters():
        parameter.data = 0.3 * randn(tuple(parameter.shape), stream(0, "weights", *parameter.shape))
    return mfm.MetaFlowMap(network.requires_grad_(False), path)


def mild(x):
    return -0.4 * (x - 0.5).square().sum(1)


def test_a_method_steers_from_python_by_object_and_by_name():
    model = random_map(PATHS["linear"])
    by_object = mfm.steer(model, mild, 8, TopDraw(num_draws=3, keep=1), mfm.ODE(steps=4), seed=0)
    unsteered = mfm.steer(model, mild, 8, mfm.Unsteered(), mfm.ODE(steps=4), seed=0)
    assert by_object.cost["nfe"] == 4 * (1 + 2 * 3)
    assert float(by_object.rewards.mean()) > float(unsteered.rewards.mean())
    defaults = mfm.steer(model, mild, 8, METHOD, "ode", seed=torch.arange(8), batch_size=3)
    assert torch.isfinite(defaults.samples).all()


def test_a_method_that_moves_in_its_own_way_is_counted_and_its_samples_are_their_seeds():
    model = random_map(PATHS["linear"])
    held = mfm.steer(model, mild, 8, Hold(num_draws=3), mfm.ODE(steps=4), seed=0)
    assert held.cost["nfe"] == 4 * 2 * 3 == 4 * Hold(num_draws=3).calls_per_step
    assert torch.equal(held.info["best_reward"][1:] >= held.info["best_reward"][:-1], torch.ones(3, dtype=torch.bool))
    alone = mfm.steer(model, mild, 1, Hold(num_draws=3), mfm.ODE(steps=4), seed=held.seeds[5:6])
    torch.testing.assert_close(alone.samples[0], held.samples[5], rtol=1e-4, atol=1e-5)  # it rounds otherwise
    with pytest.raises(mfm.InputError, match="noises its best draw: it has no renormalize"):
        mfm.steer(model, mild, 8, Hold(), mfm.ODE(steps=4, renormalize="clip"))


class Told(Hold):
    """Reports a figure of its systems without saying so."""

    def finish(self, problem, state):
        return state.best, {"best": state.reward.max()[None]}


def test_a_figure_of_systems_that_the_method_does_not_list_is_refused():
    with pytest.raises(mfm.InputError, match="'best': name it in of_systems"):
        mfm.steer(random_map(PATHS["linear"]), mild, 8, Told(), mfm.ODE(steps=4), seed=0)


def test_a_posterior_gives_values_and_steers():
    exact = mfm.ExactModel(PATHS["linear"], CASES["per-component-full"].law)
    x = exact.law.sample(5, stream(0))
    estimate = mfm.value_gradient(TwoSteps(exact), mild, 0.3, x, 16, "gradient-free", stream(1))
    assert estimate.gradient.shape == x.shape
    model = random_map(PATHS["linear"])
    own = mfm.steer(model, mild, 6, mfm.MFMGF(4, posterior=TwoSteps), mfm.ODE(steps=4), seed=0)
    usual = mfm.steer(model, mild, 6, mfm.MFMGF(4), mfm.ODE(steps=4), seed=0)
    assert not torch.allclose(own.samples, usual.samples)
    assert own.cost["forwards"] == usual.cost["forwards"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A mixture's map, barely trained."""
    out = tmp_path_factory.mktemp("own") / "gmm"
    mfm_run("train", "gmm", "--max-steps", "3", "--set", "batch_size=32", "--out", out)
    return out


def test_the_command_line_takes_them(run, tmp_path):
    common = (run, "--reward", "gmm-inverse", "--strength", "0.01", "--num", "8", "--steps", "3")
    mfm_run(
        "steer", *common, "--method", METHOD, "--num-draws", "4", "--set", "method.keep=3", "--out", tmp_path / "method"
    )
    mfm_run(
        "steer",
        *common,
        "--method",
        "mfm-gf",
        "--set",
        f"method.posterior={POSTERIOR}",
        "--out",
        tmp_path / "posterior",
    )
    mfm_run("steer", *common, "--method", f"{HERE / 'my_mover.py'}:Hold", "--out", tmp_path / "mover")
    mfm_run("report", tmp_path / "mover", "--out", tmp_path)
    assert "8 samples by hold the best: " in (tmp_path / "report.html").read_text()
    for name in ("method", "posterior"):
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["metrics"]["num"] == 8


def test_evaluation_and_report_take_a_method(run, tmp_path):
    methods = json.dumps(["none", "mfm-gf", METHOD, f"{METHOD}-3"])
    settings = ["samples=64", "seeds=1", "num_draws=[2]", "steps=3", f"methods={methods}"]
    sets = [word for setting in settings for word in ("--set", setting)]
    mfm_run("eval", "steering", run, "--task", "gmm-inverse", *sets, "--out", tmp_path / "steering")
    metrics = json.loads((tmp_path / "steering" / "results.json").read_text())["metrics"]
    assert metrics["methods"][METHOD]["2"]["cost"]["nfe"] == pytest.approx(3 * (1 + 2 * 2))
    assert "3" in metrics["methods"][f"{METHOD}-3"]
    mfm_run("report", tmp_path / "steering", "--out", tmp_path / "report.html")
    assert "top draws" in (tmp_path / "report.html").read_text()
