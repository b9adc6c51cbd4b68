"""mfm convert: what it writes, and every way to get it wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import metaflowmaps as mfm
from metaflowmaps.networks.dit import SIZES, DiTConfig


@pytest.fixture
def files(interop_files):
    return {family: interop_files / f"{family}_weights.safetensors" for family in ("mfm", "dmf", "sit")}


@pytest.mark.parametrize("family", ["mfm", "dmf", "sit"])
def test_what_it_writes_loads_as_the_same_map(command, files, tmp_path, family):
    out = tmp_path / "map"
    options = ("--set", "heads=4", "--set", "encoder_depth=3", "--json")
    code, text, err = command("convert", files[family], "--out", out, *options)
    assert code == 0, err
    results = json.loads(text)
    assert results["metrics"]["family"] == family
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "manifest.json", "model.safetensors", "pipeline.json",
    ]  # fmt: skip
    direct = mfm.pretrained.load(files[family], config={"heads": 4, "encoder_depth": 3}).state_dict()
    loaded = mfm.MetaFlowMap.from_pretrained(out).state_dict()
    assert direct.keys() == loaded.keys()
    assert all(torch.equal(direct[key], loaded[key]) for key in direct)
    config = json.loads((out / "config.json").read_text())
    assert config["origin"]["family"] == family
    assert str(files[family].parent) not in json.dumps(config)  # no path of this machine
    card = (out / "README.md").read_text()
    assert f"layout: {family}" in card
    assert "number 10 is the null class" in card
    code, _, err = command("convert", files[family], "--out", out, *options)
    assert code == 0
    assert "holds this conversion already" in err


def test_a_file_as_published_is_converted_and_its_surplus_named(command, interop_files, tmp_path):
    """Averaged weights in a training script's dictionary, beside the layer that weighed times."""
    weights = load_file(interop_files / "dmf_logvar_weights.safetensors")
    torch.save({"ema": {f"module.{k}": v for k, v in weights.items()}, "steps": 7}, tmp_path / "dmf_xl_2_256.pt")
    options = ("--set", "heads=4", "--set", "encoder_depth=3", "--json")
    code, text, err = command("convert", tmp_path / "dmf_xl_2_256.pt", "--out", tmp_path / "map", *options)
    assert code == 0, err
    line = "dmf_xl_2_256.pt: left out what the map does not use: logvar_linear.bias, logvar_linear.weight"
    assert err.splitlines().count(line) == 1
    assert json.loads(text)["metrics"]["left_out"] == ["logvar_linear.bias", "logvar_linear.weight"]
    assert mfm.MetaFlowMap.from_pretrained(tmp_path / "map").network.num_classes == 1000


def test_bad_input_is_one_line_that_names_the_fix(command, files, tmp_path):
    weights = load_file(files["dmf"])
    save_file({**weights, "odd": torch.zeros(1)}, tmp_path / "odd.safetensors")
    taken = tmp_path / "taken"
    assert command("convert", files["sit"], "--set", "heads=4", "--out", taken)[0] == 0
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("keep")
    heads = ("--set", "heads=4", "--set", "encoder_depth=3")
    for arguments, words in (
        ((tmp_path / "none.pt",), "no such file"),
        ((tmp_path / "odd.safetensors", *heads), "nearest is dmf, from which it differs: unexpected: odd"),
        ((files["dmf"],), "--set heads=N --set encoder_depth=N"),
        ((files["dmf"], "--family", "mfm", *heads), "it is a dmf file: family='dmf'"),
        ((files["dmf"], "--set", "head=4"), "did you mean 'heads'"),
        ((files["dmf"], *heads, "--out", taken), "another checkpoint: choose another"),
        ((files["dmf"], *heads, "--out", notes), "holds other files"),
        (("nobody/nothing-of-the-kind@main",), "not on the hub"),
    ):
        code, out, err = command("convert", *arguments)
        assert code == 2, (arguments, err)
        assert words in err, err
        assert err.count("\n") == 1 or err.splitlines()[-1].startswith("error:")
        assert out == ""
    assert (notes / "mine.txt").read_text() == "keep"


def test_parameters_of_the_released_size():
    """684 M with the context, 675 M without (method notes, §10)."""
    with torch.device("meta"):
        network = DiTConfig(patch=2, num_classes=1000, guidance=[1.0, 2.5], **SIZES["XL"]).network((4, 32, 32))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == 684
    assert round(network.parameters_of_parent() / 1e6) == 675


def test_an_autoencoder_of_this_machine_goes_beside_the_map(command, files, tmp_path, monkeypatch):
    """From wherever it is opened later, and when it is converted again."""
    from tests.tiny_codec import tiny_vae

    published = files["mfm"].resolve()
    monkeypatch.chdir(tmp_path)
    tiny_vae().save_pretrained("given")
    options = ("--set", "heads=4", "--set", "encoder_depth=3", "--vae", "given")
    for _ in range(2):
        assert command("convert", published, *options, "--out", "map")[0] == 0
    assert command("convert", "map")[0] == 0
    (tmp_path / "given").rename(tmp_path / "gone")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for made in (tmp_path / "map", tmp_path / "runs/map-map"):
        assert json.loads((made / "pipeline.json").read_text())["vae"] == "vae"
        assert "the autoencoder in `vae/`" in (made / "README.md").read_text()
        assert mfm.Pipeline.from_pretrained(made)(1, steps=1).images[0].size == (64, 64)
        assert not [p for p in made.iterdir() if p.name.startswith(".")]


def test_another_conversion_is_never_taken_for_the_same(command, files, tmp_path):
    heads, out = ("--set", "heads=4", "--set", "encoder_depth=3"), tmp_path / "map"
    assert command("convert", files["mfm"], *heads, "--out", out)[0] == 0
    (out / "README.md").unlink()  # as an interrupted conversion leaves it
    assert command("convert", files["mfm"], *heads, "--out", out)[0] == 0
    assert (out / "README.md").exists()
    other = tmp_path / files["mfm"].name
    save_file({k: 1.1 * v for k, v in load_file(files["mfm"]).items()}, other)
    taken = tmp_path / "file"
    taken.write_text("keep")
    for arguments, words in (
        ((other, *heads, "--out", out), "another checkpoint"),
        ((files["mfm"], *heads, "--out", out, "--vae", "some/other"), "another autoencoder, guidance or names"),
        ((files["mfm"], *heads, "--out", out, "--guidance", "1"), "another autoencoder, guidance or names"),
        ((files["mfm"], *heads, "--out", taken), "is a file"),
        ((files["mfm"], *heads, "--out", tmp_path / "x", "--guidance", "7"), "this map knows 1, 2.5"),
        ((files["mfm"], *heads, "--out", tmp_path / "x", "--guidance", "nan"), "finite"),
        ((files["sit"], *heads, "--out", tmp_path / "x", "--guidance", "2.5"), "no embedding of scales"),
        ((files["mfm"], *heads, "--out", tmp_path / "x", "--vae", tmp_path), "no autoencoder"),
        ((out, *heads), "--family and --set are for published files"),
    ):
        code, _, err = command("convert", *arguments)
        assert (code, words in err, err.count("\n")) == (2, True, 1), (arguments, err)
    assert not (tmp_path / "x").exists()
    assert taken.read_text() == "keep"


def test_a_thousand_other_classes_keep_their_names():
    from metaflowmaps import imagenet_names as imagenet
    from metaflowmaps.interop.opening import pipeline_document

    with torch.random.fork_rng(devices=[]):
        network = DiTConfig(patch=2, width=8, depth=1, heads=2, encoder_depth=1, num_classes=1000).network((4, 4, 4))
    model = mfm.MetaFlowMap(network, mfm.LinearPath(), "plain")
    own = [f"bird {i}" for i in range(1000)]
    assert pipeline_document(model, own)["class_names"] == own
    for names in ((), imagenet.wnids(), imagenet.class_names()):
        assert pipeline_document(model, names)["class_names"] == "imagenet"


def test_run_refuses_what_tuning_cannot_use(command, tmp_path):
    code, _, err = command("run", "imagenet-xl2-finetune", "digits", "--set", "strength=abc")
    assert (code, "strength" in err, err.count("\n")) == (2, True, 1), err
