"""Losses, networks, data sources and recipes from outside the package: trained, kept, drawn from, steered, judged."""

import json
from pathlib import Path

import pytest
import torch

import metaflowmaps as mfm
from conftest import mfm_command
from metaflowmaps.checkpoint import resolve_checkpoint
from metaflowmaps.data import read_source
from metaflowmaps.errors import InputError
from metaflowmaps.recipes import recipe
from metaflowmaps.training.building import fitted
from metaflowmaps.training.loop import Watch
from metaflowmaps.training.training_run import run_training
from metaflowmaps.work.choices import outside
from metaflowmaps.work.config import override

HERE = Path(__file__).parent
RING, SPIRAL = f"{HERE / 'my_recipe.py'}:ring", f"{HERE / 'my_recipe.py'}:spiral"
LOSS, NETWORK, DATA = (HERE / f"my_{kind}.py" for kind in ("loss", "network", "data"))
REWARD = "def height(x):\n    return x[:, 1]\n"


@pytest.fixture(scope="module")
def ring(tmp_path_factory) -> Path:
    """A run of a recipe whose loss, network and data are all from outside."""
    out = tmp_path_factory.mktemp("own") / "ring"
    run_training(recipe(RING), out)
    return out


def test_checkpoints_keep_where_classes_are_and_their_options(ring):
    checkpoint = resolve_checkpoint(ring)
    training = checkpoint.config["training"]
    assert checkpoint.config["network"]["name"] == f"{NETWORK}:WavesConfig"
    assert checkpoint.config["network"]["event_shape"] == [2]
    assert training["loss"]["consistency"] == {"name": f"{LOSS}:Halfway", "share": 0.25}
    assert read_source(training) == outside(f"{DATA}:Ring")()


def test_a_loaded_map_draws_what_the_trained_one_drew(ring, tmp_path):
    model = mfm.MetaFlowMap.from_pretrained(ring)
    x = torch.zeros(3, 2)
    draws = model.draw(0.3, x, 4, generator=torch.Generator().manual_seed(0))
    assert draws.std() > 0
    model.save_pretrained(tmp_path / "again")
    again = mfm.MetaFlowMap.from_pretrained(tmp_path / "again")
    assert torch.equal(again.draw(0.3, x, 4, generator=torch.Generator().manual_seed(0)), draws)


def test_a_stopped_run_ends_with_the_same_bytes(ring, tmp_path):
    """Stopped at half of it: what the waves were drawn as, and every row's loss, come back."""
    config = recipe(RING).model_copy(update={"checkpoint_every": 4})

    class Stop(Exception):
        pass

    def stop(stage, record):
        if record.step == 5:
            raise Stop

    with pytest.raises(Stop):
        run_training(config, tmp_path / "run", watch=Watch(stop))
    run_training(config, tmp_path / "run")
    one, other = (
        resolve_checkpoint(run).path.joinpath("model.safetensors").read_bytes() for run in (ring, tmp_path / "run")
    )
    assert one == other


def test_the_command_line_trains_draws_steers_judges_and_reports(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARD)

    def mfm_json(*arguments):
        code, out, err = mfm_command(capsys, *arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    trained = mfm_json("train", RING, "--max-steps", 4, "--out", "run")
    assert trained["cost"]["steps"] == 4
    again = mfm_json("train", RING, "--max-steps", 4, "--out", "run")
    assert again["metrics"] == trained["metrics"]  # it is complete
    mfm_json("sample", "run", "--num", 8, "--out", "samples")
    steered = mfm_json("steer", "run", "--reward", "rewards.py:height", "--steps", 4, "--num", 4, "--out", "steered")
    assert steered["cost"]["forwards"] > 0
    few = ["--set", "contexts=4", "--set", "sets=2", "--samples", "64"]
    judged = mfm_json("eval", "posterior", "run", "--law", f"{DATA}:Ring", *few, "--out", "judged")
    assert judged["metrics"]["relative_sw2"]["0.4"] > judged["metrics"]["floor"]["0.4"]
    code, _, err = mfm_command(capsys, "eval", "posterior", "run", *few, "--out", "other")
    assert (code, err.count("\n")) == (2, 1)
    assert "another law" in err
    assert mfm_command(capsys, "report", "run", "steered", "judged", "--out", "report.html")[0] == 0
    assert "ring" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("loss", ["my_loss.py:Halfway", "my_teacher_loss.py:Pulled"])
def test_each_goes_into_a_recipe_of_the_package(capsys, tmp_path, loss):
    own = [f"loss.consistency={HERE / loss}", f"model.network={NETWORK}:WavesConfig", f"data={DATA}:Ring"]
    own += ["data.modes=3", "model.network.waves=8", "batch_size=16", "threads=1"]
    settings = [part for setting in own for part in ("--set", setting)]
    code, out, err = mfm_command(capsys, "train", "gmm", *settings, "--max-steps", 3, "--out", tmp_path, "--json")
    assert code == 0, err
    config = json.loads(out)["config"]
    assert config["data"] == {"name": f"{DATA}:Ring", "modes": 3, "radius": 2.0}
    assert config["model"]["network"]["waves"] == 8
    assert mfm.MetaFlowMap.from_pretrained(tmp_path).network.frequencies.shape == (7, 8)


def test_a_loss_of_ones_own_reaches_what_the_packages_does(tmp_path):
    """Halfway at its half is the semigroup loss at γ = 1/2: from the same seed the loss falls as far."""
    config = override(recipe("gmm"), ["model.network.width=32", "model.network.depth=2"])
    config = config.model_copy(update={"steps": 100, "batch_size": 128, "threads": 1, "log_every": 50})
    reached = {}
    for name in ("semigroup", f"{LOSS}:Halfway"):
        loss = config.loss.model_validate({**config.loss.model_dump(), "consistency": name})
        reached[name] = run_training(config.model_copy(update={"loss": loss}), tmp_path / name[-5:]).loss
    one, other = reached.values()
    assert one != other
    assert other == pytest.approx(one, rel=0.2)


def test_examples_and_classes_of_ones_own(capsys, tmp_path, monkeypatch):
    """Vectors that are no law: the spread is measured, labels are counted, and nobody knows their posteriors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARD)
    config = fitted(recipe(SPIRAL, fast=True))
    assert config.steps == 4
    examples = config.data.load()[0]
    assert config.model.data_std == pytest.approx((examples.std**2 + examples.mean**2) ** 0.5, abs=1e-4)
    assert mfm_command(capsys, "train", SPIRAL, "--fast", "--out", "run")[0] == 0
    assert mfm_command(capsys, "sample", "run", "--num", 4, "--out", "samples")[0] == 0
    steer = ["steer", "run", "--reward", "rewards.py:height", "--steps", 4, "--num", 4, "--out", "steered"]
    code, _, err = mfm_command(capsys, *steer)
    assert code == 0, err
    assert mfm.MetaFlowMap.from_pretrained("run").network.num_classes == 2


def test_what_is_no_recipe_is_refused():
    with pytest.raises(InputError, match="is no recipe: let it be a TrainConfig"):
        recipe(f"{DATA}:Ring")
    with pytest.raises(InputError, match="takes no files"):
        recipe(RING, data="x")
