"""Preprocessing in torch: that of the processors within what 8 bits allow, differentiable, read from configurations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny_vision import check_gradient
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import metaflowmaps as mfm
from conftest import F64, normal, uniform
from metaflowmaps.random import stream
from metaflowmaps.rewards import Pixels
from metaflowmaps.rewards.vision.clip import HPS_PIXELS

STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=F64)
CLIP = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
PROCESSORS = {
    "clip": (transformers.CLIPImageProcessorPil(**CLIP), 5 / 4),
    "clip, bilinear": (transformers.CLIPImageProcessorPil(**CLIP, resample=2), 1.0),
    "vit": (ViTImageProcessorPil(size={"height": 24, "width": 20}), 1.0),
    "blip-like": (ViTImageProcessorPil(size={"height": 24, "width": 24}, resample=3, image_mean=[0.4] * 3), 5 / 4),
    "convnext": (ConvNextImageProcessorPil(size={"shortest_edge": 24}), 5 / 4),
    "convnext, large": (ConvNextImageProcessorPil(size={"shortest_edge": 384}), 5 / 4),
    "other scale": (transformers.CLIPImageProcessorPil(**CLIP, rescale_factor=1 / 127.5), 5 / 4),
    "not rescaled": (transformers.CLIPImageProcessorPil(**CLIP, do_rescale=False), 5 / 4),
    "not normalised": (transformers.CLIPImageProcessorPil(**CLIP, do_normalize=False), 5 / 4),
    "crop alone": (transformers.CLIPImageProcessorPil(do_resize=False, crop_size={"height": 12, "width": 14}), 0.0),
}


def photo(height, width, seed="photo"):
    """8-bit colours, smooth and rough in turn, black and white among them: (H, W, 3)."""
    rough = torch.rand(height, width, 3, generator=stream(0, seed))
    smooth = torch.linspace(-0.2, 1.2, width)[None, :, None].expand(height, width, 3)
    mixed = torch.where(torch.arange(height)[:, None, None] % 8 < 4, rough, smooth).clamp(0, 1)
    return (mixed * 255).round().to(torch.uint8).numpy()


def as_x(image):
    return torch.from_numpy(image).permute(2, 0, 1)[None].double() / 127.5 - 1


def ours(processor, image):
    return Pixels.of(processor)(as_x(image))[0]


# (60, 50) shrinks, (15, 21) grows, (24, 24) stays
@pytest.mark.parametrize("size", [(60, 50), (37, 90), (15, 21), (24, 24)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_processors_own_result(name, size):
    processor, kernel = PROCESSORS[name]
    image = photo(*size)
    theirs = torch.from_numpy(np.asarray(processor(Image.fromarray(image))["pixel_values"][0])).double()
    mine = ours(processor, image)
    assert mine.shape == theirs.shape
    std = torch.tensor(processor.image_std, dtype=F64) if processor.do_normalize else torch.ones(3, dtype=F64)
    level = (processor.rescale_factor if processor.do_rescale else 1) / std[:, None, None]
    # PIL rounds to half a level after its first pass, which the second weighs by |K|₁, and once more; 1e-4: float32
    bound = ((kernel + 1) / 2 + 1e-4) * level
    assert bool(((mine - theirs).abs() <= bound).all())
    # and in the mean it is nothing but rounding: uniform in ± half a level twice has standard deviation .41 of one
    assert float(((mine - theirs) / level).square().mean().sqrt()) < 0.5


def test_the_tolerance_tells_other_preprocessings_apart():
    """The same bound refuses another filter, no antialiasing, another crop and another mean."""
    processor, kernel = PROCESSORS["clip"]
    image = photo(60, 50)
    theirs = torch.from_numpy(np.asarray(processor(Image.fromarray(image))["pixel_values"][0])).double()
    bound = (kernel + 1) / 2 / 255 / STD[:, None, None] + 1e-6
    pixels = Pixels.of(processor)
    for other in (
        Pixels(**{**vars(pixels), "resample": "bilinear"}),
        Pixels(**{**vars(pixels), "fit": "exact"}),
        Pixels(**{**vars(pixels), "mean": (0.5, 0.5, 0.5)}),
        Pixels(**{**vars(pixels), "size": (25, 25)}),
    ):
        assert not bool(((other(as_x(image))[0] - theirs).abs() <= bound).all())


def test_values_beyond_the_range_are_clipped_before_and_after():
    """As if the picture had been saved: white that is too white is white, and a filter's overshoot is cut."""
    pixels = Pixels(size=(24, 24), crop=(24, 24), mean=(0.0,) * 3, std=(1.0,) * 3)
    step = torch.full((1, 3, 12, 12), -1.0, dtype=F64)
    step[..., 6:] = 1.0
    assert torch.equal(pixels(step * 3), pixels(step))
    assert float(pixels(step).min()) == 0
    assert float(pixels(step).max()) == 1
    loose = Pixels(size=(24, 24), crop=(24, 24), mean=(0.0,) * 3, std=(1.0,) * 3, clip=False)
    assert float(loose(step).min()) < -0.01  # a bicubic kernel does overshoot a step
    assert float(loose(step).max()) > 1.01


def test_hps_fits_the_longest_side_into_black():
    """224 × 112 in the middle of black; checked on a constant picture, whatever the kernel."""
    x = torch.full((1, 3, 80, 40), 0.5, dtype=F64)
    seen = HPS_PIXELS(x)
    mean = torch.tensor(HPS_PIXELS.mean, dtype=F64)
    black, grey = -mean / STD, (0.75 - mean) / STD
    assert seen.shape == (1, 3, 224, 224)
    for columns, level in ((slice(0, 56), black), (slice(56, 168), grey), (slice(168, 224), black)):
        part = seen[0, :, :, columns]
        # weights of a kernel add to 1 within rounding
        torch.testing.assert_close(part, level[:, None, None].expand_as(part), rtol=0, atol=1e-12)
    square = uniform(1, 3, 224, 224, low=-1, high=1)
    torch.testing.assert_close(
        HPS_PIXELS(square), ((square + 1) / 2 - mean[:, None, None]) / STD[:, None, None], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "pixels",
    [
        Pixels(size=(12, 12), crop=(10, 10)),
        Pixels(size=(12, 9), fit="exact", crop=None, resample="bilinear"),
        Pixels(size=(24, 24), fit="longest", crop=None, clip=False),
        Pixels(fit="none", crop=(8, 8)),
    ],
)
def test_gradients(pixels):
    weight = normal(3, *pixels(torch.zeros(1, 3, 16, 20, dtype=F64)).shape[2:], seed="weight")

    def reward(x):
        return (pixels(x).sin() * weight).flatten(1).sum(1)

    check_gradient(reward, uniform(2, 3, 16, 20, low=-0.6, high=0.6))


def test_rows_and_dtypes():
    pixels = Pixels(size=(12, 12), crop=(10, 10))
    x = uniform(3, 3, 16, 20, low=-1, high=1)
    for i in range(3):
        torch.testing.assert_close(pixels(x)[i : i + 1], pixels(x[i : i + 1]), rtol=0, atol=1e-14)
    assert pixels(x.float()).dtype == torch.float32
    assert pixels(x.bfloat16()).dtype == torch.float32  # nothing is lost that was not lost before
    grey = x[:, :1]
    assert torch.equal(pixels(grey), pixels(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # as in the folders of openai/clip-vit-large-patch14, laion's, google's ViT, microsoft's ResNet
        (
            {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3,
             "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
             "size": 224},
            Pixels(),
        ),
        (
            {"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "size": {"shortest_edge": 224},
             "image_processor_type": "CLIPImageProcessor", "resample": 3},
            Pixels(),
        ),
        (
            {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2,
             "size": 224},
            Pixels(fit="exact", crop=None, mean=(0.5,) * 3, std=(0.5,) * 3, resample="bilinear"),
        ),
        (
            {"crop_pct": 0.875, "do_resize": True, "size": {"shortest_edge": 224}, "resample": 3},
            Pixels(size=(256, 256), crop=(224, 224)),
        ),
        (
            {"size": 224, "crop_size": 224, "do_center_crop": True, "resample": None, "do_normalize": None,
             "image_mean": None, "image_std": None, "do_rescale": None, "rescale_factor": None, "do_pad": None},
            Pixels(resample="bilinear"),  # null is as if nothing was said
        ),
        (
            {"image_processor": {"do_resize": False, "do_center_crop": False}},
            Pixels(fit="none", crop=None, resample="bilinear"),
        ),
    ],
)  # fmt: skip
def test_configurations(given, expected, tmp_path):
    assert Pixels.of(given) == expected
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(given))
    assert Pixels.from_file(file) == expected
    assert Pixels.of(expected) is expected


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"do_pad": True}, "do_pad is not supported"),
        ({"size": {"longest_edge": 3}}, "size={'longest_edge': 3} is not supported"),
        ({"size": 224, "resample": 1}, "resample=1 has no gradient"),
        (3.0, "processor must be a Pixels"),
    ],
)
def test_configurations_that_cannot_be_used(given, says):
    with pytest.raises(mfm.InputError, match=says):
        Pixels.of(given)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.zeros(2, 4, 8, 8), "decode latents first"),
        (torch.zeros(2, 3, 8), "pictures"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"\.float\(\)"),
        (torch.zeros(2, 3, 6, 8), "smaller than the crop of 8 × 8"),
    ],
)
def test_what_is_no_picture(x, says):
    with pytest.raises(mfm.InputError, match=says):
        Pixels(fit="none", crop=(8, 8))(x)


def test_options_that_cannot_be():
    with pytest.raises(mfm.InputError, match="fit must be one of"):
        Pixels(fit="stretch")
    with pytest.raises(mfm.InputError, match="std above 0"):
        Pixels(std=(0.0, 1.0, 1.0))
    with pytest.raises(mfm.InputError, match="cannot be read"):
        Pixels.from_file(Path("/nowhere/preprocessor_config.json"))
