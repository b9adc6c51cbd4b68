"""Published files as they are: harmless surplus, relatives of one family, and which of two look-alikes a file is."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import metaflowmaps as mfm
from metaflowmaps.errors import InputError
from metaflowmaps.interop import pretrained
from metaflowmaps.interop.pretrained.direction import Direction

CONFIG = {"heads": 4, "encoder_depth": 3}
# outputs up to 4 through four blocks in float32 leave 1.3e-6; a wrong sign, time or norm would be of order 1
CLOSE = {"rtol": 0, "atol": 5e-6}


@pytest.fixture
def opened(interop_files):
    """``opened(name, family)``: what is known of a file, and its recorded inputs and outputs."""

    def open_file(name, family="auto", **config):
        found = pretrained.load_with_source(interop_files / f"{name}_weights.safetensors", family, CONFIG | config)
        return found, load_file(interop_files / f"{name}_io.safetensors")

    return open_file


@pytest.fixture
def renamed(interop_files, tmp_path):
    """``renamed(name, file, …)``: the tensors of a file, with others, under a name that says nothing."""

    def rename(name, file="weights.safetensors", prefix="", **more):
        weights = load_file(interop_files / f"{name}_weights.safetensors")
        save_file({**{prefix + key: value for key, value in weights.items()}, **more}, tmp_path / file)
        return tmp_path / file

    return rename


@torch.no_grad()
def own_output(model, seen):
    """What a model with data at time 0 gives: −v_{1−t, 1−r}, r = t where it knows one time."""
    later = seen.get("r", seen["t"])
    flow = model.anchor(seen["t"], seen["x"], {"label": seen["y"]})
    return -flow(1 - seen["t"], 1 - later, seen["x"])


@pytest.mark.parametrize("family", ["auto", "dmf"])
@pytest.mark.parametrize("name", ["dmf_logvar", "dmf512"])
def test_dmf_files_give_their_recorded_outputs(opened, name, family):
    found, seen = opened(name, family)
    torch.testing.assert_close(own_output(found.model, seen), seen["raw_output"], **CLOSE)
    assert found.family.name == "dmf"
    assert found.source.left_out == (("logvar_linear.bias", "logvar_linear.weight") if name == "dmf_logvar" else ())
    assert found.model.network.config.head_norms == (name == "dmf512")


@pytest.mark.parametrize("family", ["auto", "sit", "repa"])
def test_repa_gives_its_recorded_output_with_time_and_sign_turned(opened, family):
    found, seen = opened("repa", family)
    torch.testing.assert_close(own_output(found.model, seen), seen["raw_output"], **CLOSE)
    assert (found.family.name, found.family.layout) == ("sit", "repa")
    assert len(found.source.left_out) == 6


@pytest.mark.parametrize("family", ["auto", "sit", "sit-512"])
def test_sit_without_doubled_outputs_gives_its_recorded_velocity(opened, family):
    found, seen = opened("sit512", family)
    with torch.no_grad():
        out = found.model.drift(seen["t"], seen["x"], {"label": seen["y"]})
    torch.testing.assert_close(out, seen["velocity"], **CLOSE)
    assert (found.family.name, found.family.layout) == ("sit", "sit-512")


def test_head_norms_say_how_many_heads_there_are(interop_files):
    model = mfm.pretrained.load(interop_files / "dmf512_weights.safetensors", config={"encoder_depth": 3})
    assert model.network.config.heads == 4


@pytest.mark.parametrize(
    ("verdict", "layout"), [(Direction("forward", 0.3, 9.0), "dmf"), (Direction("backward", 9.0, 0.3), "sit-512")]
)
def test_the_way_of_time_tells_look_alikes_apart(monkeypatch, renamed, verdict, layout):
    """Whatever the file is called: the probe sees the file as a DMF unless it is named after a SiT."""
    monkeypatch.setattr(pretrained, "_direction", lambda model: verdict)
    found = pretrained.load_with_source(renamed("sit512"), config=CONFIG)
    assert (found.family.layout, found.direction) == (layout, Direction("forward", 0.3, 9.0))
    other = verdict.turned()  # seen as a SiT
    monkeypatch.setattr(pretrained, "_direction", lambda model: other)
    found = pretrained.load_with_source(renamed("sit512", "SiT-2-512.safetensors"), config=CONFIG)
    assert (found.family.layout, found.direction) == (layout, Direction("forward", 0.3, 9.0))


def test_look_alikes_that_nothing_tells_apart_are_asked_about(renamed):
    path = renamed("sit512")
    for check in (True, False):
        with pytest.raises(InputError, match=r"a dmf and a sit may have.*family='dmf' or family='sit'"):
            pretrained.load(path, config=CONFIG, check=check)
    assert pretrained.load_with_source(path, "dmf", CONFIG).family.layout == "dmf"
    assert pretrained.load_with_source(path, "sit", CONFIG).family.layout == "sit-512"


def test_the_wrong_one_of_two_look_alikes_is_named(monkeypatch, renamed):
    monkeypatch.setattr(pretrained, "_direction", lambda model: Direction("backward", 9.0, 0.3))
    with pytest.raises(InputError, match=r"as dmf its drift carries data to noise.*family='sit'"):
        pretrained.load(renamed("sit512"), "dmf", CONFIG)


def test_harmless_surplus_is_named_and_any_other_refused(renamed):
    counted = {"n_averaged": torch.tensor(7), "projectors.0.0.weight": torch.zeros(2, 2)}
    with pytest.raises(InputError, match=r"nearest is dmf, .*unexpected: projectors\.0\.0\.weight"):
        pretrained.load(renamed("dmf_logvar", **counted), config=CONFIG)
    del counted["projectors.0.0.weight"]
    with pytest.warns(UserWarning, match="left out what the map does not use: logvar_linear.bias, .*, n_averaged$"):
        pretrained.load(renamed("dmf_logvar", **counted), config=CONFIG)
    with pytest.raises(InputError, match="unexpected: latents_scale"):  # a DMF file has no such thing
        pretrained.load(renamed("dmf_logvar", latents_scale=torch.ones(4)), config=CONFIG)


def test_prefixes_are_stripped_key_by_key(interop_files, renamed):
    """A training module's file: the network under ``model.``, its autoencoder's numbers beside it."""
    own = {"latents_scale": torch.ones(4), "module.latents_bias": torch.zeros(4)}
    found = pretrained.load_with_source(renamed("mfm", prefix="model.", **own), config=CONFIG)
    assert found.source.left_out == ("latents_bias", "latents_scale")
    plain = pretrained.load(interop_files / "mfm_weights.safetensors", config=CONFIG).state_dict()
    assert all(torch.equal(value, plain[key]) for key, value in found.model.state_dict().items())
    twice = {"ema.pos_embed": torch.zeros(1, 16, 48)}
    with pytest.raises(InputError, match=r"holds two tensors pos_embed \(.*save the weights that are meant"):
        pretrained.load(renamed("sit", **twice), config=CONFIG)
