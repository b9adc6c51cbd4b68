"""Rewards whose weights come as packages: they know real pictures, and nothing is downloaded."""

import functools
import socket
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

import metaflowmaps as mfm
from conftest import normal
from metaflowmaps.errors import InputError
from metaflowmaps.rewards.vision.ocr import edits, nearness

UNIFORM = 652  # of ImageNet: what Grace Hopper wears in the picture that matplotlib carries
DATA = Path(matplotlib.get_data_path())


@functools.cache
def classifier():
    return mfm.rewards.ImageNetClassifier("military uniform")


@functools.cache
def hopper():
    picture = np.asarray(Image.open(DATA / "sample_data" / "grace_hopper.jpg").convert("RGB").resize((224, 265)))
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1


def test_the_classifier_knows_a_real_picture():
    judged = classifier().probabilities(hopper())
    assert judged.shape == (1, 1000)
    assert int(judged.argmax()) == UNIFORM == classifier().label
    assert float(judged[0, UNIFORM]) > 5 * float(judged[0].sort().values[-2])  # .46, and .07 for "suit"
    torch.testing.assert_close(classifier()(hopper())[0], judged[0, UNIFORM].log(), rtol=1e-4, atol=1e-4)
    assert int(classifier().probabilities(hopper().flip(2)).argmax()) != UNIFORM  # upside down it is something else


def test_the_classifiers_gradient_is_the_finite_difference():
    reward = mfm.rewards.ImageNetClassifier(UNIFORM, kind="margin", strength=2.0)
    reward.model.double()
    x = (hopper()[..., ::4, ::4].double() / 2).requires_grad_(True)  # where nothing is clipped
    along, h = normal(*x.shape), 1e-6
    (gradient,) = torch.autograd.grad(reward(x).sum(), x)
    difference = (reward(x.detach() + h * along) - reward(x.detach() - h * along)) / (2 * h)
    # kinks of ReLU6 between the two: 9 % of -38 at h = 1e-4, 2 % at 1e-5, .05 % at 1e-6
    torch.testing.assert_close((gradient * along).sum(), difference[0], rtol=5e-3, atol=0)


def test_features_are_those_before_the_last_layer_and_few_at_a_time():
    x = torch.cat([hopper()[:, :, ::4, ::4], hopper().flip(3)[:, :, ::4, ::4]])
    features = classifier().features(x)
    assert features.shape == (2, 1280)
    one = mfm.rewards.ImageNetClassifier(micro_batch=1)
    torch.testing.assert_close(one.features(x), features, rtol=1e-4, atol=1e-5)  # other sums of float32
    logits = classifier().model.network._fc(features)
    torch.testing.assert_close(logits.softmax(1), classifier().probabilities(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("package", "make", "said"),
    [
        ("efficientnet_lite_pytorch", lambda: mfm.rewards.ImageNetClassifier(3), "judge"),
        ("rapidocr", lambda: mfm.rewards.OCR("HELLO"), "ocr"),
    ],
)
def test_without_its_package_one_line_says_what_to_install(package, make, said, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"pip install 'metaflowmaps\[{said}\]'"):
        make()


def test_nearness_counts_letters_to_change():
    assert edits("kitten", "sitting") == 3
    assert (edits("", "abc"), edits("abc", ""), edits("abc", "abc")) == (3, 3, 0)
    assert nearness("Hello, 42!", "HELLO 42") == 1
    assert nearness("", "hello") == 0
    assert nearness("hellish", "hello") == pytest.approx(1 - 3 / 7)


def test_a_text_without_letters_is_refused():
    with pytest.raises(InputError, match="needs a text with letters or digits"):
        mfm.rewards.OCR("!?")


# -- the reader, of the extra `ocr`, which `make attack` asks for and dev does not bring ------------------------------


def written(text):
    """Black on white, (1, 3, 128, 256)."""
    picture = Image.new("RGB", (256, 128), "white")
    font = ImageFont.truetype(str(DATA / "fonts" / "ttf" / "DejaVuSans.ttf"), 40)
    ImageDraw.Draw(picture).text((20, 40), text, fill="black", font=font)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.mark.attack
def test_the_reader_reads_and_asks_no_network(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    reward = mfm.rewards.OCR("Hello 42", strength=3.0)
    x = torch.cat([written("HELLO 42"), written("HELL 4"), torch.ones(1, 3, 128, 256)])
    assert reward.read(x[:1]) == ["HELLO 42"]
    torch.testing.assert_close(reward(x), torch.tensor([3.0, 3 * 5 / 7, 0.0]))
    assert not reward.differentiable
