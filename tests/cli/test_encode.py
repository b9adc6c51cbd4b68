"""mfm encode-latents as a newcomer meets it."""

import json
import shutil
from pathlib import Path

import pytest
from benchmarks.synthetic_pictures import write_synthetic
from PIL import Image

from conftest import mfm_command as mfm
from metaflowmaps.data.latents import LatentShards
from metaflowmaps.interop.autoencoder import AutoencoderCodec
from tiny_codec import tiny_codec, tiny_vae


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("vae")
    tiny_vae().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("pictures") / "made", 2, 5, 40)


def encode(capsys, pictures, vae, out, *more) -> tuple[int, str, str]:
    given = ["encode-latents", pictures, "--vae", vae, "--out", out, "--size", 32, "--shard-size", 4, *more]
    return mfm(capsys, *given, "--device", "cpu")


def test_encode_train_and_verify(capsys, pictures, vae, tmp_path):
    out = tmp_path / "latents"
    code, printed, said = encode(capsys, pictures, vae, out, "--flip", "--json")
    assert code == 0, said
    result = json.loads(printed)
    assert result["complete"]
    assert {k: result["metrics"][k] for k in ("examples", "classes", "shards", "skipped")} == {
        "examples": 10, "classes": 2, "shards": 3, "skipped": 0
    }  # fmt: skip
    assert result["config"]["vae"] == tiny_codec().identity
    assert "10 pictures, 2 classes" in said
    assert "3 of 3 are there" in said
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    code, printed, said = encode(capsys, pictures, vae, out, "--flip")
    assert (code, "is made" in said) == (0, False)
    assert before == {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    code, printed, said = mfm(capsys, "encode-latents", "--verify", "--out", out)
    assert code == 0
    assert "all 3 shards" in said
    # what training reads of data works on latents: shape, mean, spread, classes
    code, printed, said = mfm(
        capsys, "train", "images", "--set", "data.name=latents", "--set", f"data.path={out}",
        "--set", "data.labels=true", "--set", "model.data_mean=image",
        "--set", "batch_size=4", "--set", "drift_batch_size=4",
        "--set", "model.network={\"name\": \"mlp\", \"width\": 8, \"depth\": 1}", "--dry-run", "--json",
    )  # fmt: skip
    assert code == 0, said
    config = json.loads(printed)["config"]
    assert config["model"]["network"]["num_classes"] == 2
    # what is left of the spread about the mean image; rounded to four digits
    bend = LatentShards(out).mean_image - result["metrics"]["mean"]
    rest = (result["metrics"]["std"] ** 2 - float(bend.square().mean())) ** 0.5
    assert config["model"]["data_std"] == pytest.approx(rest, abs=1e-4)


def test_two_workers(capsys, pictures, vae, tmp_path):
    one, both = tmp_path / "one", tmp_path / "both"
    assert encode(capsys, pictures, vae, one)[0] == 0
    code, printed, said = encode(capsys, pictures, vae, both, "--worker", "1/2", "--json")
    assert (code, json.loads(printed)["complete"]) == (0, False)
    assert "this worker's shards" in said
    assert encode(capsys, pictures, vae, both, "--worker", "0/2")[0] == 0
    assert {f.name: f.read_bytes() for f in one.iterdir()} == {f.name: f.read_bytes() for f in both.iterdir()}


def test_an_interrupt_keeps_what_was_finished(capsys, pictures, vae, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert encode(capsys, pictures, vae, whole)[0] == 0
    original, calls = AutoencoderCodec.encode, []

    def stopping(self, images):
        calls.append(images)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, images)

    with monkeypatch.context() as patched:
        patched.setattr(AutoencoderCodec, "encode", stopping)
        code, _, said = encode(capsys, pictures, vae, out)
    assert code == 130
    assert "finished files are kept" in said
    assert (out / "latents-00000.safetensors").exists()
    code, _, said = encode(capsys, pictures, vae, out)
    assert code == 0
    assert said.count("is made") == 2
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}


def test_damage_and_bad_pictures(capsys, pictures, vae, tmp_path):
    out, made = tmp_path / "out", tmp_path / "made"
    shutil.copytree(pictures, made)
    bad = sorted(made.rglob("*.png"))[2]
    bad.write_bytes(b"not a picture")
    code, _, said = encode(capsys, made, vae, out)
    assert (code, len(said.splitlines())) == (2, 2)  # the set, and the error
    assert str(bad) in said
    assert "--skip-bad" in said
    code, _, said = encode(capsys, made, vae, out, "--skip-bad")
    assert code == 0
    assert "1 of the pictures could not be read" in said
    shard = out / "latents-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 4
    shard.write_bytes(data)
    code, _, said = mfm(capsys, "encode-latents", "--verify", "--out", out)
    assert code == 2
    assert shard.name in said
    code, _, said = encode(capsys, made, vae, out, "--skip-bad", "--verify")
    assert (code, "making it again" in said) == (0, True)
    assert mfm(capsys, "encode-latents", "--verify", "--out", out)[0] == 0


BAD = {
    "no source": (["--out", "here"], "which pictures?"),
    "no place": (["SOURCE", "--vae", "VAE"], "add --out DIR"),
    "source nowhere": (["/no/such/place", "--vae", "VAE", "--out", "here"], "there is no /no/such/place"),
    "vae nowhere": (["SOURCE", "--vae", "/no/vae", "--out", "here"], "there is no /no/vae"),
    "vae is a folder of something": (["SOURCE", "--vae", "SOURCE", "--out", "here"], "config.json"),
    "size": (["SOURCE", "--vae", "VAE", "--out", "here", "--size", "36"], "multiple of 8"),
    "no size": (["SOURCE", "--vae", "VAE", "--out", "here", "--size", "0"], "--size"),
    "worker": (["SOURCE", "--vae", "VAE", "--out", "here", "--worker", "2/2"], "from 0 to K − 1"),
    "no worker": (["SOURCE", "--vae", "VAE", "--out", "here", "--worker", "one"], "such as 0/4"),
    "dtype": (["SOURCE", "--vae", "VAE", "--out", "here", "--dtype", "float33"], "did you mean 'float32'"),
    "classes": (["SOURCE", "--vae", "VAE", "--out", "here", "--classes", "imagnet"], "did you mean 'imagenet'"),
    "no gpu": (["SOURCE", "--vae", "VAE", "--out", "here", "--device", "cuda:7"], "--device cpu"),
    "out is a file": (["SOURCE", "--vae", "VAE", "--out", __file__], "is a file"),
    "out is unwritable": (["SOURCE", "--vae", "VAE", "--out", "/proc/nowhere"], "choose another directory"),
    "nothing to verify": (["--verify", "--out", "here"], "there is no directory"),
    "hub": (["hf:nobody", "--vae", "VAE", "--out", "here"], "hf:owner/name"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD)
def test_bad_usage_is_one_line_and_exit_code_2(capsys, pictures, vae, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    given = [{"SOURCE": str(pictures), "VAE": str(vae)}.get(word, word) for word in arguments]
    code, printed, said = mfm(capsys, "encode-latents", *given)
    lines = [line for line in said.splitlines() if not line.startswith(f"{pictures}:")]  # what was found in it
    assert (code, printed, len(lines)) == (2, "", 1)
    assert says in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_other_settings_in_the_same_place_are_refused(capsys, pictures, vae, tmp_path):
    out = tmp_path / "out"
    assert encode(capsys, pictures, vae, out)[0] == 0
    code, _, said = encode(capsys, pictures, vae, out, "--flip")
    assert code == 2
    assert "flip: False ≠ True" in said
    Image.new("RGB", (40, 40)).save(tmp_path / "more.png")
    code, _, said = encode(capsys, pictures, vae, tmp_path)
    assert code == 2
    assert "holds other files" in said


def test_it_is_listed(capsys):
    assert "encode-latents" in mfm(capsys, "--help")[1]
