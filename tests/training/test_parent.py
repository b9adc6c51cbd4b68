"""Maps in the place of a pretrained flow model: its drift teaches, its weights are where they begin."""

import pytest
import torch

import metaflowmaps as mfm
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks.dit import DiTConfig
from metaflowmaps.recipes import recipe
from metaflowmaps.training.building import build_map, like_parent
from metaflowmaps.training.loop import Watch
from metaflowmaps.training.parents import inherit, taught_by
from metaflowmaps.training.training_run import run_training
from metaflowmaps.work.config import override

load_map = MetaFlowMap.from_pretrained

SMALL = ["model.network.width=16", "model.network.depth=2", "batch_size=32", "steps=6", "log_every=1", "threads=1"]
LAW = mfm.GaussianMixture([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], 0.5)


def config(*settings, name="gmm"):
    return override(recipe(name), [*SMALL, *settings])


@pytest.fixture
def parent(tmp_path):
    """A map that was trained a little."""
    return str(run_training(config("seed=5"), tmp_path / "parent").checkpoint)


def both(parent, *settings):
    """Two settings that only make sense together."""
    start = config().model_dump()
    changed = {**start, "teacher": "pretrained", "parent": parent}
    return override(type(config()).model_validate(changed), settings)


def test_a_wrapped_exact_drift_teaches_as_the_exact_teacher_does(tmp_path):
    exact = run_training(config(), tmp_path / "exact")
    wrapped = mfm.wrap(
        lambda x, t: LAW.drift(mfm.LinearPath(), 1 - t, x).neg(), "velocity", "data-at-0", event_shape=(2,)
    )
    taught = run_training(both("the mixture itself"), tmp_path / "taught", parent=wrapped)
    # one auxiliary drift in closed form and by GLASS: float32 through six steps
    assert taught.loss == pytest.approx(exact.loss, rel=1e-3)
    one, two = (load_map(run.checkpoint).state_dict() for run in (exact, taught))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=2e-3, msg=key)  # steps of 3e-3 each


def test_it_begins_with_the_parents_weights(parent, tmp_path):
    still = both(parent, "start_from_drift=true", "optimizer.lr=1e-12", "steps=1")
    child = load_map(run_training(still, tmp_path / "child").checkpoint)
    for key, value in load_map(parent).state_dict().items():
        torch.testing.assert_close(child.state_dict()[key], value, rtol=0, atol=1e-9)
    fresh = load_map(run_training(both(parent, "optimizer.lr=1e-12", "steps=1"), tmp_path / "fresh").checkpoint)
    assert any(not torch.allclose(fresh.state_dict()[k], v, atol=1e-3) for k, v in child.state_dict().items())


def test_an_interrupted_run_goes_on_with_its_parent(parent, tmp_path):
    whole = load_map(run_training(both(parent, "start_from_drift=true"), tmp_path / "whole").checkpoint)
    cut = both(parent, "start_from_drift=true", "checkpoint_every=2")

    class Stop(Exception):
        pass

    def stop(stage, record):
        if record.step == 4:
            raise Stop

    with pytest.raises(Stop):
        run_training(cut, tmp_path / "cut", watch=Watch(stop))
    again = load_map(run_training(cut, tmp_path / "cut").checkpoint)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in whole.state_dict().items())


def test_the_network_may_be_taken_from_the_parent(interop_files, tmp_path):
    model = mfm.pretrained.load(interop_files / "sit_weights.safetensors", config={"heads": 4})
    model.save_pretrained(tmp_path / "sit")
    asked = recipe("latents")
    taken = like_parent(asked.model_copy(update={"parent": str(tmp_path / "sit")}))
    network = taken.model.network
    assert (network.name, network.width, network.depth, network.num_classes) == ("dit", 48, 4, 10)
    assert network.guidance is True  # the recipe trains guided rows: the parent had no embedding of scales
    assert taken.model.parameterization == "plain"
    teacher = taught_by(model, taken)
    assert teacher.null_class == 10


def test_an_embedding_of_guidance_is_added_and_nothing_else_may_differ(interop_files):
    path = interop_files / "sit_weights.safetensors"
    plain = mfm.pretrained.load(path, config={"heads": 4})
    guided = mfm.pretrained.load(path, config={"heads": 4, "guidance": [1.0, 2.5]})
    for p in guided.parameters():
        p.data.zero_()
    inherit(guided, plain)
    for key, value in plain.state_dict().items():
        assert torch.equal(guided.state_dict()[key], value), key
    other = mfm.pretrained.load(interop_files / "dmf_weights.safetensors", config={"heads": 4, "encoder_depth": 3})
    with pytest.raises(InputError, match="the parent's network is another one"):
        inherit(build_map(config()), build_map(config("model.network.width=9")))
    inherit(guided, other)  # DMF and SiT of one size have one form
    with pytest.raises(InputError, match=r"same parameterisation \(gaussian, not plain\)"):
        inherit(build_map(config()), plain)


def test_what_cannot_be_is_refused(parent, tmp_path):
    trigonometric = both(parent, "model.path=trigonometric")
    with pytest.raises(InputError, match=r"--set model\.path=linear"):
        run_training(trigonometric, tmp_path / "path")
    with pytest.raises(InputError, match="no such file or directory"):
        run_training(both(str(tmp_path / "nothing")), tmp_path / "none")
    with pytest.raises(InputError, match="go together"):
        config("teacher=pretrained")
    assert not (tmp_path / "path" / "checkpoints").exists()


def test_a_parents_mean_image_is_taken_over(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parent, child = (
            DiTConfig(patch=2, width=16, depth=1, heads=2, encoder_depth=1).network((4, 8, 8)) for _ in range(2)
        )
    mean = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = mfm.MetaFlowMap(parent, mfm.LinearPath(), "gaussian", mean, 0.5)
    ours = mfm.MetaFlowMap(child, mfm.LinearPath(), "gaussian", 0.0, 0.5)
    inherit(ours, theirs)
    assert torch.equal(ours.data_mean, mean)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours.drift(0.3, x), theirs.drift(0.3, x))


def test_networks_that_say_nothing_of_guidance_and_other_perceptrons(tmp_path):
    asked = recipe("latents")
    assert like_parent(asked.model_copy(update={"parent": "digits"})).model.network.guidance is True
    with torch.random.fork_rng(devices=[]):
        narrow = mfm.MetaFlowMap(
            DiTConfig(patch=2, width=16, depth=1, heads=2, encoder_depth=1, mlp_ratio=2.0).network((4, 8, 8)),
            mfm.LinearPath(),
            "plain",
        )
    narrow.save_pretrained(tmp_path / "narrow")
    assert like_parent(asked.model_copy(update={"parent": str(tmp_path / "narrow")})).model.network.mlp_ratio == 2.0
