"""Models that come with the package, how they are exported, and the recipes of images that make them."""

import json

import pytest
import torch

from conftest import normal
from metaflowmaps.checkpoint import (
    CheckpointError,
    export_run,
    load_classifier,
    resolve_checkpoint,
    save_model,
    write_checkpoint,
)
from metaflowmaps.checkpoint.shipped import FOLDER, names, shipped
from metaflowmaps.cli.context import Context
from metaflowmaps.cli.train import resolve
from metaflowmaps.data import Digits, Emoji, Images, ImageSet
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks import make_classifier, make_network
from metaflowmaps.path import make_path
from metaflowmaps.recipes import RECIPES, recipe
from metaflowmaps.training import building
from metaflowmaps.training.building import build_classifier, build_map, fitted, network_of, sized
from metaflowmaps.training.classifier_objective import accuracy
from metaflowmaps.training.parents import drift_config
from metaflowmaps.training.train_config import ClassifierConfig, ModelConfig, TrainConfig

load_map = MetaFlowMap.from_pretrained

MLP = {"name": "mlp", "dim": 64, "shape": [1, 8, 8], "width": 16, "depth": 2}


def a_map(seed: str = "map") -> MetaFlowMap:
    """A small map with weights of every size, none of them zero."""
    model = MetaFlowMap(make_network(MLP), make_path("linear"), "gaussian", normal(1, 8, 8, seed="mean"), 0.5)
    for name, p in model.network.named_parameters():
        p.data = 0.2 * normal(*p.shape, seed=f"{seed} {name}", dtype=torch.float32)
    return model


# -- exported ----------------------------------------------------------------------------------------------------------


def a_run(folder, model: torch.nn.Module, averaged: torch.nn.Module) -> None:
    """A checkpoint as training leaves it: raw and averaged weights, an optimiser's state, its configuration."""
    from metaflowmaps.checkpoint import model_config

    tensors = {"model.safetensors": model.state_dict(), "ema.safetensors": averaged.state_dict()}
    tensors["optimizer.safetensors"] = {"step": torch.tensor(3)}
    config = {**model_config(model), "training": {"recipe": "digits", "seed": 5}}
    write_checkpoint(folder, tensors, {"config.json": config})


def test_an_exported_run_is_its_averaged_map_in_half_the_bytes(tmp_path):
    averaged = a_map()
    a_run(tmp_path / "run", a_map("raw"), averaged)
    export_run(
        tmp_path / "run", tmp_path / "out", {"command": "mfm train digits --seed 5", "reached": {"frechet": 0.3}}
    )
    kept = resolve_checkpoint(tmp_path / "out")
    assert not kept.has("ema.safetensors")
    assert not kept.has("optimizer.safetensors")
    assert {t.dtype for t in kept.tensors("model.safetensors").values()} == {torch.float16}
    assert kept.config["training"] == {"recipe": "digits", "seed": 5}
    assert kept.config["command"] == "mfm train digits --seed 5"
    loaded = load_map(tmp_path / "out")
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32}
    for name, weight in averaged.state_dict().items():
        # float16 has 11 bits: half a unit is 2^-11 of the number; below 6e-5 the unit is fixed
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=2**-11, atol=2**-25)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded.push(x, 0.3, x), averaged.push(x, 0.3, x), rtol=0.01, atol=0.01)
    # it is float32 from then on: kept again, nothing is rounded twice
    save_model(loaded, tmp_path / "again")
    torch.testing.assert_close(load_map(tmp_path / "again").state_dict(), loaded.state_dict(), rtol=0, atol=0)
    size = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    whole = sum(f.stat().st_size for f in (tmp_path / "again").glob("*.safetensors"))
    assert size < 0.6 * whole


def test_an_exported_classifier_and_a_run_without_averages(tmp_path):
    classifier = make_classifier({"name": "conv-classifier", "channels": 1, "size": 8, "num_classes": 3, "width": 8})
    save_model(classifier, tmp_path / "plain")
    export_run(tmp_path / "plain", tmp_path / "out", {})
    loaded = load_classifier(tmp_path / "out")
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(x), classifier.eval()(x), rtol=0.01, atol=0.01)
    assert next(loaded.parameters()).dtype == torch.float32
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(CheckpointError, match="classifier"):
        load_map(tmp_path / "out")


def test_counters_are_not_rounded(tmp_path):
    """A float16 counts to 2,048 only."""
    model = a_map()
    model.network.register_buffer("seen", torch.tensor(100_001))
    save_model(model, tmp_path / "plain")
    export_run(tmp_path / "plain", tmp_path / "out", {})
    kept = resolve_checkpoint(tmp_path / "out").tensors("model.safetensors")["network.seen"]
    assert (kept.dtype, int(kept)) == (torch.int64, 100_001)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """A package that carries one model, ours, and a place to work in."""
    save_model(a_map(), tmp_path / "package" / "ours")
    monkeypatch.setattr("metaflowmaps.checkpoint.shipped.FOLDER", tmp_path / "package")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_a_shipped_name_resolves_from_anywhere(carried):
    assert names() == ["ours"]
    assert resolve_checkpoint("ours").path == carried / "package" / "ours"
    assert load_map("ours").event_shape == (1, 8, 8)
    assert shipped("other") is None
    assert shipped("../package/ours") is None
    assert shipped("") is None
    with pytest.raises(CheckpointError, match=r"hub id \(owner/name\), ours$"):
        resolve_checkpoint("theirs")


def test_a_local_directory_of_that_name_wins(carried):
    other = a_map("other")
    save_model(other, "ours")
    assert resolve_checkpoint("ours").path.resolve() == carried / "work" / "ours"
    torch.testing.assert_close(load_map("ours").state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_damaged_shipped_model_is_refused(carried):
    file = carried / "package" / "ours" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_map("ours")


def bytes_of(pattern: str) -> int:
    """What the shipped models of such names take."""
    return sum(f.stat().st_size for folder in FOLDER.glob(pattern) for f in folder.iterdir())


DIGITS = ("digits", "digits-drift", "digits-guide", "digits-judge")
needs_models = pytest.mark.skipif(
    not set(DIGITS) <= set(names()), reason=f"the package carries no trained models yet: {FOLDER}"
)


@needs_models
def test_the_package_carries_the_digits():
    assert bytes_of("digits*") <= 4 * 2**20
    for name in DIGITS:
        config = resolve_checkpoint(FOLDER / name).config
        assert config["training"]["recipe"] in ("digits", name)
        assert isinstance(config["training"]["seed"], int)
    assert load_map("digits").event_shape == load_map("digits-drift").event_shape == (1, 8, 8)
    guide, judge = load_classifier("digits-guide"), load_classifier("digits-judge")
    assert type(guide) is not type(judge)
    _, held_out = Digits().load()
    assert accuracy(guide, held_out) > 0.95
    assert accuracy(judge, held_out) > 0.95


def test_the_package_carries_emoji_in_colour():
    assert bytes_of("emoji") <= 6_000_000
    model = load_map("emoji")
    assert model.event_shape == (3, 32, 32)
    assert sum(p.numel() for p in model.parameters()) <= 3_000_000
    guide, judge = load_classifier("emoji-guide"), load_classifier("emoji-judge")
    assert type(guide) is not type(judge)
    _, held_out = Emoji(hold_out=100).load()
    for classifier in (guide, judge):  # .77 and .86 of all that is held out; four deviations of a hundred are .17
        assert accuracy(classifier, held_out) > 0.6
    # a draw at little noise is near the emoji, as no emoji is near another
    x = held_out.tensor(slice(4))
    x_t = model.path.interpolate(normal(4, 3, 32, 32, dtype=torch.float32), x, 0.8)
    with torch.no_grad():
        draws = model.draw(0.8, x_t, 1, generator=torch.Generator().manual_seed(0))[0]
    own, others = (draws - x).flatten(1).norm(dim=1), torch.cdist(x.flatten(1), x.flatten(1)) + 1e9 * torch.eye(4)
    assert (own < 0.5 * others.amin(1)).all()


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", ["digits", "mnist", "images"])
def test_guide_and_judge_share_nothing_but_the_images(name, fast):
    guide, judge = (recipe(f"{name}-{role}", fast) for role in ("guide", "judge"))
    assert guide.data == judge.data
    assert guide.network.name != judge.network.name
    assert guide.seed != judge.seed


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("digits")])
def test_recipes_of_digits_resolve_and_build(name, fast):
    config = resolve(recipe(name, fast), (), Context())
    assert config == resolve(type(config).model_validate(config.model_dump()), (), Context())
    if isinstance(config, ClassifierConfig):
        assert build_classifier(config).num_classes == 10
    else:
        assert build_map(config).event_shape == (1, 8, 8)
        assert drift_config(config).steps == config.drift_steps


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", ["mnist", "mnist-guide", "mnist-judge"])
def test_recipes_of_mnist_resolve_and_build(shared, name, fast):
    folder = shared / "data" / "mnist"
    if not folder.is_dir():
        pytest.skip(f"no MNIST in {folder}")
    config = resolve(recipe(name, fast, str(folder)), (), Context(seed=3, max_steps=100))
    assert (config.seed, config.steps) == (3, 100)
    assert (build_map if isinstance(config, TrainConfig) else build_classifier)(config) is not None


def test_the_measured_spread_of_mnist(shared):
    folder = shared / "data" / "mnist"
    if not folder.is_dir():
        pytest.skip(f"no MNIST in {folder}")
    base = recipe("mnist", True, str(folder))
    open_ended = base.model_copy(update={"model": base.model.model_copy(update={"data_std": None})})
    # the recipe states it to three digits, of another choice of training images perhaps
    assert fitted(open_ended).model.data_std == pytest.approx(base.model.data_std, abs=0.01)


def test_max_steps_bounds_the_drift_too():
    config = resolve(recipe("digits"), (), Context(max_steps=7))
    assert (config.steps, config.drift_steps) == (7, 7)
    assert resolve(recipe("gmm"), (), Context(max_steps=7)).drift_steps == 0
    assert resolve(recipe("digits"), ("drift_steps=3",), Context(max_steps=7)).drift_steps == 3


def test_recipes_that_take_files():
    assert recipe("images", data="here").data.path == "here"
    assert recipe("mnist", data="here").data.path == "here"
    for name in ("digits", "digits-guide", "gmm"):
        with pytest.raises(InputError, match="takes no files"):
            recipe(name, data="here")


# -- what is measured --------------------------------------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch):
    """Own images: a bright left half and a dark right one, ± 0.25 about them, pixel by pixel."""

    def use(size: int, channels: int = 1, labels: bool = False) -> None:
        pattern = torch.full((channels, size, size), -0.5)
        pattern[..., : size // 2] = 0.5
        offsets = torch.tensor([0.25, -0.25]).repeat(10)[:, None, None, None]
        names = ("a", "b", "c") if labels else ()
        images = ImageSet("images", pattern + offsets, torch.arange(20) % 3 if labels else None, names)
        monkeypatch.setattr(Images, "load", lambda config: (images, images))

    return use


def images_config(data_mean="image", labels: bool = False) -> TrainConfig:
    base = recipe("images", data="here")
    model = ModelConfig(data_mean=data_mean, data_std=None, network=None)
    return base.model_copy(update={"model": model, "data": base.data.model_copy(update={"labels": labels})})


def test_the_spread_of_a_made_up_set(own):
    """About the mean image .25; about a number c, √(.25² + .5² + c²)."""
    own(8)
    found = fitted(images_config())
    assert found.model.data_std == 0.25
    assert (found.data.size, found.data.channels) == (8, 1)
    assert fitted(images_config(0.0)).model.data_std == pytest.approx((0.0625 + 0.25) ** 0.5, abs=1e-4)
    assert fitted(images_config(1.0)).model.data_std == pytest.approx((0.0625 + 0.25 + 1) ** 0.5, abs=1e-4)
    mean = building.mean_image(Images().load()[0])
    assert mean[0, 0].tolist() == pytest.approx([0.5] * 4 + [-0.5] * 4)
    assert fitted(found) == found  # what was measured stays


def test_a_spread_is_positive(monkeypatch):
    """Of images that are all alike √1e-6 is taken; none that is given may be 0 or less."""
    images = ImageSet("images", torch.full((20, 1, 8, 8), 0.3), None, ())
    monkeypatch.setattr(Images, "load", lambda config: (images, images))
    assert fitted(images_config()).model.data_std == 1e-3
    for std in (0.0, -1.0):
        with pytest.raises(ValueError, match="data_std"):
            ModelConfig(data_std=std)


def test_what_is_given_is_not_measured(own):
    own(8)
    config = images_config()
    given = config.model_copy(update={"model": config.model.model_copy(update={"data_std": 0.7})})
    assert fitted(given).model.data_std == 0.7
    digits = recipe("digits")
    assert fitted(digits) is digits  # a full recipe reads no data


@pytest.mark.parametrize(
    ("size", "kind"), [(8, "mlp"), (12, "mlp"), (13, "unet"), (28, "unet"), (64, "unet"), (65, "dit"), (128, "dit")]
)
def test_networks_sized_to_images(own, size, kind):
    for channels in (1, 3):
        own(size, channels)
        found = fitted(images_config())
        assert found.model.network.name == kind
        assert found.model.network.num_classes == 0
        with torch.device("meta"):
            network = network_of(found)
        assert tuple(network.event_shape) == (channels, size, size)
    own(size, labels=True)
    assert fitted(images_config(labels=True)).model.network.num_classes == 3
    assert fitted(images_config()).model.network.num_classes == 0  # unless they are asked for


def test_every_size_has_a_network():
    for size in [*range(1, 70), 97, 100, 127, 128, 256]:
        with torch.device("meta"):
            assert sized((1, size, size)).network((1, size, size)).event_shape == (1, size, size)


def test_a_mixture_has_no_pictures():
    config = recipe("gmm")
    network = sized((1, 28, 28))
    with pytest.raises(InputError, match=r"set model\.network=mlp"):
        network_of(config.model_copy(update={"model": config.model.model_copy(update={"network": network})}))


def test_exported_configurations_are_json(tmp_path):
    a_run(tmp_path / "run", a_map(), a_map())
    export_run(tmp_path / "run", tmp_path / "out", {"reached": {"frechet": 0.3}})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["reached"] == {"frechet": 0.3}
