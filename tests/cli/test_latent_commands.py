"""The drawing commands on a latent, class-conditional map: names, guidance, pictures, a missing autoencoder."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.tiny_codec import tiny_codec, tiny_vae

import metaflowmaps as mfm
from metaflowmaps.errors import InputError
from metaflowmaps.networks.dit import DiTConfig

NAMES = ("disc", "square", "ring", "stripes")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A map of 4×4×4 latents with its autoencoder beside it, and one whose autoencoder is not to be had."""
    root = tmp_path_factory.mktemp("latents")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DiTConfig(
            patch=2, width=32, depth=2, heads=4, encoder_depth=1, num_classes=4, guidance=[1.0, 2.5]
        ).network((4, 4, 4))
        for p in network.parameters():
            p.data += 0.05 * torch.randn_like(p)
    pipe = mfm.Pipeline(mfm.MetaFlowMap(network, mfm.LinearPath(), "plain"), tiny_codec(), NAMES, guidance=2.5)
    pipe.save_pretrained(root / "map")
    pipe.save_pretrained(root / "bare", vae="nobody/nothing-here")
    tiny_vae().save_pretrained(root / "vae")
    (root / "reward.py").write_text(
        "def bright(x):\n    assert x.shape[1:] == (3, 32, 32), x.shape\n    return 50 * x.mean((1, 2, 3))\n"
    )
    return root


@pytest.fixture
def run(command, monkeypatch, place):
    """Commands typed beside the map."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no retries
    monkeypatch.chdir(place)
    return command


def pipeline(place):
    return mfm.Pipeline.from_pretrained(place / "map")


def test_samples_are_those_of_the_pipeline_and_written_as_pictures(run, place, tmp_path):
    out = tmp_path / "s"
    code, _, err = run(
        "sample", "map", "--num", 3, "--steps", 2, "--label", "ring", "--guidance", 2.5, "--images", "--out", out
    )
    assert code == 0, err
    held = load_file(out / "samples.safetensors")
    pipe = pipeline(place)
    made = pipe("ring", steps=2, guidance=2.5, num_images=3, seed=held["seeds"])
    torch.testing.assert_close(held["samples"], made.latents, rtol=0, atol=1e-6)
    for i, picture in enumerate(made.images):
        with Image.open(out / f"images/{i:06d}.png") as written:
            assert written.size == (32, 32)
            assert list(written.getdata()) == list(picture.getdata())
    settings = json.loads((out / "results.json").read_text())["config"]
    assert (settings["label"], settings["guidance"]) == (2, 2.5)
    with Image.open(out / "samples.png") as grid:
        assert grid.size[0] > 100


def test_all_takes_the_classes_in_turn_whatever_the_shards(run, place, tmp_path):
    for name, more in (("whole", ()), ("cut", ("--shard-size", 2))):
        assert run("sample", "map", "--num", 6, "--label", "all", "--out", tmp_path / name, *more)[0] == 0
    whole, cut = (load_file(tmp_path / name / "samples.safetensors") for name in ("whole", "cut"))
    torch.testing.assert_close(whole["samples"], cut["samples"], rtol=1e-4, atol=1e-5)  # batches of another size
    pipe = pipeline(place)
    each = pipe([0, 1, 2, 3, 0, 1], steps=1, seed=whole["seeds"])
    torch.testing.assert_close(whole["samples"], each.latents, rtol=1e-4, atol=1e-5)


def test_draws_for_a_picture(run, place, tmp_path):
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "red.png")
    out = tmp_path / "p"
    code, _, err = run(
        "posterior",
        "map",
        "--image",
        tmp_path / "red.png",
        "--t",
        0.7,
        "--num-draws",
        4,
        "--label",
        "disc",
        "--out",
        out,
    )
    assert code == 0, err
    held = load_file(out / "draws.safetensors")
    pipe = pipeline(place)
    x_1 = pipe.encode(Image.open(tmp_path / "red.png"))
    noise = (held["x_t"] - 0.7 * x_1[0]) / 0.3
    assert noise.std() == pytest.approx(1, abs=0.4)  # 64 normals: five standard errors of their spread
    cond = pipe.condition(torch.zeros(4, dtype=torch.int64), None, 4)
    assert cond["guidance"].tolist() == [2.5] * 4
    assert held["draws"].shape == (4, 4, 4, 4)
    assert (out / "posteriors.png").exists()


def test_rewards_see_pictures(run, place, tmp_path):
    out = tmp_path / "r"
    code, text, err = run(
        "steer", "map", "--reward", "reward.py:bright", "--num", 3, "--steps", 4, "--num-draws", 1, "--label", "disc",
        "--images", "--json", "--out", out,
    )  # fmt: skip
    assert code == 0, err
    held = load_file(out / "samples.safetensors")
    pictures = pipeline(place).decode(held["samples"])
    torch.testing.assert_close(held["rewards"], 50 * pictures.mean((1, 2, 3)), rtol=1e-4, atol=1e-4)
    cost = json.loads(text)["cost"]
    assert cost["decodes"] == cost["reward_calls"] == 3 * 4
    assert len(list((out / "images").glob("*.png"))) == 3


@pytest.mark.filterwarnings("always:the samples are kept")
def test_an_autoencoder_that_is_missing_costs_the_picture_and_not_the_samples(run, place, tmp_path):
    code, _, err = run("sample", "bare", "--num", 2, "--out", tmp_path / "s")
    assert code == 0
    assert "the samples are kept, and shown as latents" in err
    assert (tmp_path / "s/samples.safetensors").exists()
    assert run("sample", "bare", "--num", 2, "--vae", "vae", "--images", "--out", tmp_path / "t")[0] == 0
    assert len(list((tmp_path / "t/images").glob("*.png"))) == 2
    code, _, err = run(
        "steer", "bare", "--reward", "reward.py:bright", "--num", 2, "--steps", 2, "--out", tmp_path / "u"
    )
    assert code == 2
    assert "nobody/nothing-here" in err.splitlines()[-1]


@pytest.mark.filterwarnings("always:the samples are kept")
def test_an_autoencoder_that_is_missing_is_said_before_the_work(run, monkeypatch, tmp_path):
    """And where pictures were asked for, nothing is drawn that could not be shown."""

    def begun(*_, **__):
        raise InputError("the work has begun")

    monkeypatch.setattr(mfm.MetaFlowMap, "generate", begun)
    for more, says in (
        ([], ["warning: the samples are kept, and shown as latents", "error: the work has begun"]),
        (["--images"], ["error: the autoencoder nobody/nothing-here cannot be loaded"]),
    ):
        code, _, err = run("sample", "bare", "--num", 2, *more, "--out", tmp_path / f"s{len(more)}")
        assert code == 2
        lines = err.splitlines()
        assert len(lines) == len(says)
        assert all(line.startswith(words) for line, words in zip(lines, says, strict=True))


@pytest.mark.attack
def test_tuning_to_a_reward_of_pictures(run, tmp_path):
    small = {"steps": 2, "distil_steps": 2, "batch_size": 4, "distil_batch_size": 4, "states.pool": 64, "threads": 1,
             "states.replay": 0, "distil_pool": 64, "meters.every": 0, "num_draws": 1}  # fmt: skip
    given = [part for key, value in small.items() for part in ("--set", f"{key}={value}")]
    out = tmp_path / "tuned"
    code, text, err = run(
        "finetune",
        "map",
        "--reward",
        "reward.py:bright",
        "--guidance",
        2.5,
        *given,
        "--map",
        "none",
        "--json",
        "--out",
        out,
    )
    assert code == 0, err
    assert json.loads(text)["metrics"]["samplers"]
    tuned = mfm.MetaFlowMap.from_pretrained(out)
    assert tuned.event_shape == (4, 4, 4)
    code, _, err = run("finetune", "map", "--reward", "reward.py:bright", "--guidance", 3, "--out", tmp_path / "x")
    assert code == 2
    assert "trained at 1, 2.5" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sample", "map", "--label", "rong"), "did you mean 'ring'"),
        (("sample", "map", "--label", "9"), "a number from 0 to 3"),
        (("sample", "map", "--label", "1", "--guidance", "3"), "1, 2.5"),
        (("sample", "map", "--precision", "half"), "allowed are bf16, float32"),
        (("sample", "digits", "--label", "1"), "knows no classes"),
        (("posterior", "map", "--image", "none.png"), "--image none.png cannot be read"),
        (("posterior", "map", "--image", "reward.py"), "give a picture"),
        (("posterior", "map", "--image", "a.png", "--x", "1"), "give one of them"),
        (("sample", "map", "--vae", "map"), "cannot be loaded"),
    ],
)
def test_bad_wishes_are_one_line(run, tmp_path, arguments, words):
    code, _, err = run(
        *arguments, "--num-draws" if arguments[0] == "posterior" else "--num", 2, "--out", tmp_path / "o"
    )
    assert code == 2, err
    assert words in err.splitlines()[-1]


@pytest.mark.parametrize(
    "typed",
    [
        "sample map --num 3 --steps 2 --label ring --guidance 2.5 --images",
        "steer map --reward reward.py:bright --num 3 --steps 2 --num-draws 2 --label disc --images",
        pytest.param("posterior map --t 0.7 --num-draws 2 --label disc", marks=pytest.mark.attack),
        pytest.param(
            "steer map --reward reward.py:bright --num 4 --steps 2 --method mfm-smc --label disc"
            " --set method.particles=2",
            marks=pytest.mark.attack,
        ),
    ],
)
def test_latents_on_a_device_of_their_own(run, tmp_path, accelerator, typed):
    """Nothing of the processor is left among them, and what is written is as on the processor."""
    for place, device in (("there", "auto"), ("here", "cpu")):
        with pytest.MonkeyPatch.context() as patch:
            if device == "cpu":
                patch.setattr("metaflowmaps.lab.opened.pick_device", torch.device)
            code, _, err = run(*typed.split(), "--device", device, "--out", tmp_path / place)
            assert code == 0, err
    [there], [here] = ([load_file(f) for f in (tmp_path / p).glob("*.safetensors")] for p in ("there", "here"))
    assert there.keys() == here.keys()
    for key, value in there.items():
        torch.testing.assert_close(value, here[key], rtol=1e-4, atol=1e-5)
