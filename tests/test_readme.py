"""README's lines, and the guide's section on published weights: the hub is a stand-in, everything after it is real."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks.synthetic_pictures import draw
from PIL import Image
from tests.tiny_codec import tiny_vae

import metaflowmaps as mfm
from metaflowmaps.interop import autoencoder as codec
from metaflowmaps.interop.pretrained import FAMILIES
from metaflowmaps.interop.pretrained.layout import Shape, expected
from metaflowmaps.lab.evaluate.tuning_error import TunedEvalConfig
from metaflowmaps.lab.evaluate.tuning_subject import TuningSubject
from metaflowmaps.metrics import inception
from metaflowmaps.networks.dit import SIZES
from metaflowmaps.networks.embed import positions

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "imagenet.md"
XL = {"width": 32, "depth": 2, "heads": 4, "encoder_depth": 1}
PUBLISHED = {"adh1s/mfm": ("mfm", "mfm-xl2.pt"), "kyungmnlee/DMF": ("dmf", "dmf_xl_2_256.pt")}
SMALL = {  # what a command is given besides, to take a second: amounts, never names
    "mfm sample": "--num 2",
    "mfm steer": "--num 2 --steps 2",
    "mfm train": "--set batch_size=8 --set micro_batches=1 --set drift_batch_size=8 --max-steps 2 --set threads=1 "
    "--set precision=float32 --set sample_every=0 --device cpu",
    "mfm encode-latents": "--size 256",
    "mfm run imagenet-fid": "--set samples=8",
    "mfm run imagenet-steer": "--set samples=64 --set pool=128 --set best_of=[1,2] --set base_steps=1 --set steps=1 "
    "--set 'methods=[\"mfm-g-rescale-1\"]' --set rescales=[1.0] --set pictures=8 --set 'rewards=[\"aesthetic\"]'",
    "mfm run imagenet-xl2-finetune": "--set steps=2 --set distil_steps=2 --set batch_size=4 --set distil_batch_size=4 "
    "--set states.pool=64 --set distil_pool=64 --set distil_pool_steps=1 --set meters.every=0 "
    "--set threads=1 --set precision=float32",
}


def commands():
    section = GUIDE.read_text().split("## With the published weights")[1].split("\n## ")[0]
    blocks = [body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", section, re.S | re.M) if not kind]
    lines = [line for block in blocks for line in block.splitlines() if line]
    return [line for line in lines if not line.startswith("pip ")]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """What the hub has: weights in the published layouts, an autoencoder, a CLIP."""
    root = tmp_path_factory.mktemp("hub")
    g = torch.Generator().manual_seed(0)
    for family, file in PUBLISHED.values():
        shape = Shape(32, 2, 2, 4, 32, 1000, 128, 256, 2)
        weights = {k: torch.randn(s, generator=g) / 8 for k, s in expected(FAMILIES[family], shape).items()}
        weights["pos_embed"] = positions(32, 16)[None]
        torch.save({"ema": {f"dit.{k}" if family == "mfm" else k: v for k, v in weights.items()}}, root / file)
    return root


def _vae():
    """Pictures are latents eight times as large: what a decoder computes is tested elsewhere."""
    vae = tiny_vae()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae.encoder = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Conv2d(3, 8, 1))
        vae.decoder = torch.nn.Sequential(torch.nn.Conv2d(4, 3, 1), torch.nn.Upsample(scale_factor=8))
    return vae


class _Reward:
    """A preference model of no weight."""

    differentiable = True

    def __init__(self, strength):
        self.strength = strength

    def to(self, device):
        return self

    def __call__(self, x, cond=None):
        return self.strength * x.mean((1, 2, 3))


@pytest.fixture
def world(shop, monkeypatch, tmp_path):
    """A place to work in, a hub without a network, networks of the released sizes shrunk; what was asked for."""
    asked = []

    def info(self, repo, revision=None):
        asked.append(repo)
        return SimpleNamespace(sha="0" * 40, siblings=[SimpleNamespace(rfilename=PUBLISHED[repo][1])])

    def reward(kind):
        def make(*place, prompt=None, strength=1.0, **options):
            asked.append((kind, prompt))
            return _Reward(strength)

        return make

    def autoencoder(place, revision):
        asked.append(str(place))
        return _vae()

    class Extractor(torch.nn.Module):
        def forward(self, x):
            return (torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1),)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file, revision=None: str(shop / file))
    monkeypatch.setattr(codec, "_load", autoencoder)
    monkeypatch.setattr(inception, "_extractor", lambda weights: Extractor())
    for name in ("PickScore", "HPSv2", "ImageReward", "AestheticScore"):
        monkeypatch.setattr(getattr(mfm.rewards, name), "from_pretrained", reward(name))
    monkeypatch.setitem(SIZES, "XL", XL)
    monkeypatch.setattr("metaflowmaps.finetuning.reward_probe.PROBED", 8)  # samples that a reward is tried on
    few = TunedEvalConfig(samples=64, seeds=1, ode_steps=1)
    monkeypatch.setattr(TuningSubject, "usual_judgement", lambda subject: few)
    monkeypatch.chdir(tmp_path)
    for label, wnid in enumerate(("n01440764", "n01443537")):
        folder = tmp_path / "imagenet" / "train" / wnid
        folder.mkdir(parents=True)
        for i in range(12):
            Image.fromarray(draw(label, 2, 256, np.random.default_rng((label, i)))).save(folder / f"{i}.png")
    np.savez("VIRTUAL_imagenet256_labeled.npz", mu=np.full(12, 0.5), sigma=np.eye(12) * 0.01)
    return asked


def typed(line):
    """The words of a line of the guide, with what makes it small."""
    words = shlex.split(line)
    if words[0] == "torchrun":  # one rank of it
        words = ["mfm", *words[words.index("metaflowmaps.cli") + 1 :]]
    line = shlex.join(words)
    words += next((shlex.split(more) for start, more in SMALL.items() if line.startswith(start)), [])
    return words[1:]


@pytest.mark.attack
def test_every_command_does_what_it_says(world, command):
    said = {}
    for line in commands():
        code, said[line], err = command(*typed(line))
        assert code == 0, f"{line}\n{err}"
    assert len(said) == len(commands()) >= 10
    for place in ("runs/mfm-xl2/manifest.json", "runs/dmf-xl2/manifest.json", "data/imagenet-latents/latents.json",
                  "runs/imagenet-xl2/results.json"):  # fmt: skip
        assert Path(place).exists(), place
    pictures = sorted(Path("runs").glob("mfm-xl2-*/images/*.png"))
    assert {Image.open(p).size for p in pictures} == {(256, 256)}
    assert len(pictures) == 4
    for wanted in ("adh1s/mfm", "kyungmnlee/DMF", "stabilityai/sd-vae-ft-mse", ("PickScore", "a photo of a tabby cat")):
        assert wanted in world
    (dry,) = (text for line, text in said.items() if "--dry-run" in line)
    assert "seconds per step" in dry


def test_the_python_runs_as_it_stands(world, command):
    assert command(*typed(commands()[0]))[0] == 0
    section = GUIDE.read_text().split("## With the published weights")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.S)
    small = block.replace('device="cuda"', 'device="cpu"').replace('.to("cuda")', '.to("cpu")')
    small = small.replace("num_images=8", "num_images=1").replace("num_draws=8", "num_draws=2")
    small = small.replace("mfm.ODE(", "mfm.ODE(steps=2, ")
    small = small.replace("pipe.estimate(8,", "pipe.estimate(1,")
    names = {}
    exec(compile(small, "imagenet.md", "exec"), names)
    assert len(names["cats"]) == 4
    assert len(names["again"]) == 2
    assert names["liked"][0].size == (256, 256)
    assert ("PickScore", "a tabby cat in the snow") in world


def test_the_dozen_lines_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 100
    (lines,) = re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M)
    names: dict[str, object] = {}
    exec(compile(lines, "README.md", "exec"), names)
    assert names["draws"].shape == (100, 1, 1, 8, 8)  # type: ignore[attr-defined]
    assert float(names["sevens"].rewards.mean()) > 10  # log-odds of a seven; unsteered samples are far below 0
    assert (tmp_path / "sevens.png").stat().st_size > 10_000
