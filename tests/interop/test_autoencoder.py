"""The codec against the autoencoder it wraps, its gradient against differences, and what it keeps in memory."""

import math
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import metaflowmaps as mfm
from calls import steer
from conftest import F64, normal, uniform
from metaflowmaps.errors import InputError
from metaflowmaps.interop.autoencoder import SD_VAE, AutoencoderCodec, Decoded
from metaflowmaps.networks import make_network
from metaflowmaps.random import stream
from metaflowmaps.rewards import InverseProblem, Tempered, WeightedSum
from tiny_codec import tiny_codec, tiny_vae

# float32 convolutions of another batch size sum in another order: about √(terms = 16·9) roundings of 6e-8 a layer,
# some twenty layers, values of order 1
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def codec() -> AutoencoderCodec:
    return tiny_codec()


@pytest.fixture(scope="module")
def exact() -> AutoencoderCodec:
    """In float64."""
    return tiny_codec(dtype=F64)


def pictures(n: int, size: int = 32, seed: str = "pictures") -> torch.Tensor:
    return uniform(n, 3, size, size, low=-1, high=1, seed=seed).float()


def brightness(x):
    return x.flatten(1).mean(1)


def test_encode_is_the_scaled_posterior_of_the_autoencoder(codec):
    x = pictures(5)
    mean, std = codec.encode(x)
    law = codec.vae.encode(x).latent_dist
    assert codec.scale == 0.18215
    assert mean.shape == (5, *codec.latent_shape(32)) == (5, 4, 4, 4)
    torch.testing.assert_close(mean, 0.18215 * law.mean, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(std, 0.18215 * law.std, rtol=0, atol=ROUNDING)
    assert not mean.requires_grad


def test_decode_undoes_shift_and_scale_and_stays_in_range(codec):
    z = normal(5, 4, 4, 4, seed="z").float()
    raw = codec.vae.decode(z / 0.18215).sample
    assert float(raw.abs().max()) > 1  # or the clamp would not show
    assert codec.image_shape((4, 4, 4)) == tuple(raw.shape[1:]) == (3, 32, 32)
    torch.testing.assert_close(codec.decode(z), raw.clamp(-1, 1), rtol=0, atol=10 * ROUNDING)  # z/scale is 5 times z
    torch.testing.assert_close(tiny_codec(clamp=False).decode(z), raw, rtol=0, atol=10 * ROUNDING)
    shifted = tiny_vae()
    shifted.register_to_config(shift_factor=0.3)
    moved = AutoencoderCodec(shifted)
    torch.testing.assert_close(moved.decode(z - 0.3 * 0.18215), codec.decode(z), rtol=0, atol=10 * ROUNDING)
    expected = codec.encode(pictures(2))[0] - 0.3 * 0.18215
    torch.testing.assert_close(moved.encode(pictures(2))[0], expected, rtol=0, atol=ROUNDING)


def test_samples_have_the_encoded_mean_and_spread(codec):
    x = pictures(1)
    mean, std = codec.encode(x)
    n = 4000
    many = AutoencoderCodec(tiny_vae())
    many.encode = lambda images: (mean.expand(n, -1, -1, -1), std.expand(n, -1, -1, -1))  # the same, not n times
    drawn = many.sample(x, stream(0, "sample"))
    z = (drawn.mean(0) - mean[0]) / std[0] * math.sqrt(n)
    assert float(z.abs().max()) < 5  # 64 normals: P < 4e-5
    ratio = drawn.var(0) / std[0].square()
    assert float((ratio - 1).abs().max()) < 5 * math.sqrt(2 / n)  # its standard error
    torch.testing.assert_close(codec.sample(x, stream(3)), codec.sample(x, stream(3)), rtol=0, atol=0)


@pytest.mark.parametrize("clamp", [False, True])
def test_the_gradient_of_decode_is_a_finite_difference(clamp):
    codec = tiny_codec(dtype=F64, clamp=clamp, micro_batch=2)
    z, direction = 0.3 * normal(3, 4, 2, 2, seed="z"), normal(3, 4, 2, 2, seed="direction")
    weights = normal(3, 3, 16, 16, seed="weights")
    z.requires_grad_()
    (gradient,) = torch.autograd.grad((weights * codec.decode(z)).sum(), z)

    def value(h: float) -> float:
        with torch.no_grad():
            return float((weights * codec.decode(z + h * direction)).sum())

    h = 1e-6  # roundings 1e-16·|value|/h = 1e-9 of it, curvature h² = 1e-12
    slope = (value(h) - value(-h)) / (2 * h)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)
    assert abs(slope) > 1e-2


def test_checkpointing_changes_no_gradient(exact):
    z = normal(5, 4, 2, 2, seed="z").requires_grad_()
    plain = tiny_codec(dtype=F64, checkpointing=False, micro_batch=8)
    grads = []
    for one in (plain, tiny_codec(dtype=F64, micro_batch=2)):
        out = one.decode(z)
        (gradient,) = torch.autograd.grad(out.square().sum(), z)
        grads.append((out.detach(), gradient))
    for a, b in zip(*grads, strict=True):  # float64 sums in another order
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def remembered(codec: AutoencoderCodec, n: int) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of n rows."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    z = normal(n, 4, 8, 8, seed="z").float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        alive = codec.decode(z)
    assert alive.requires_grad
    return sum(kept.values())


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_activations():
    one_latent, one_picture = 4 * 4 * 8 * 8, 4 * 3 * 64 * 64
    checked, plain = tiny_codec(micro_batch=1), tiny_codec(micro_batch=1, checkpointing=False)
    # checkpointed, a row adds at most its latent and its picture; else all that the decoder made on the way
    assert remembered(checked, 6) - remembered(checked, 2) <= 4 * (one_latent + one_picture)
    assert remembered(plain, 6) - remembered(plain, 2) > 4 * 10 * one_picture


PEAKS = """
import torch
from metaflowmaps.cost import Meter
from tests.tiny_codec import tiny_codec

torch.set_num_threads(1)

def peak(codec, n):
    z = torch.randn(n, 4, 24, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with Meter() as meter:
        torch.autograd.grad(codec.decode(z).mean((1, 2, 3)).sum(), z)
    return meter.peak_memory_bytes

checked, plain = tiny_codec(micro_batch=1), tiny_codec(micro_batch=1, checkpointing=False)
peak(checked, 1)  # warm: what the library allocates once
print(peak(checked, 2), peak(checked, 10), peak(plain, 10))
"""


@pytest.mark.attack
def test_peak_memory_under_a_gradient_is_flat_in_the_number_of_rows():
    """In a process of its own, which hands small blocks back at once: elsewhere one sees what others have left."""
    root = Path(__file__).parents[2]
    given = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAKS], env={**os.environ, **given}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    small, large, without = map(int, done.stdout.split())
    # eight more pictures of 192 × 192 take 3.4 MiB, in a few copies (25 MiB were measured); the activations of a row
    # take 22 MiB, of ten 221 MiB
    assert large - small < 60 * 2**20
    assert without - small > 120 * 2**20


def test_it_is_frozen_and_stays_in_evaluation_mode(codec):
    assert not any(p.requires_grad for p in codec.parameters())
    assert not codec.train().training
    assert not any(m.training for m in codec.modules())


def test_dtype_belongs_to_the_network_and_not_to_its_pictures():
    codec = tiny_codec(dtype=torch.bfloat16)
    z = normal(2, 4, 2, 2, seed="z").float()
    out = codec.decode(z)
    assert (codec.dtype, out.dtype) == (torch.bfloat16, torch.float32)
    # 8 bits of mantissa through some twenty layers
    torch.testing.assert_close(out, tiny_codec().decode(z), rtol=0, atol=0.2)
    assert not torch.equal(out, tiny_codec().decode(z))
    assert codec.identity == tiny_codec().identity  # of the weights as they were given
    assert tiny_codec(1).identity != codec.identity
    mirrored = tiny_vae()
    mirrored.decoder.conv_out.bias.data.neg_()
    assert AutoencoderCodec(mirrored).identity != codec.identity
    with pytest.raises(InputError, match=r"torch\.float32"):
        tiny_codec(dtype=torch.int64)


def identity_of(**weights):
    """Of an autoencoder that has these weights and nothing else."""
    vae = torch.nn.ParameterDict(weights)
    vae.config = {"scaling_factor": 1.0}
    return AutoencoderCodec(vae).identity


def test_an_identity_is_of_names_shapes_and_every_bit():
    a, b = normal(2, 3, seed="a").float(), normal(4, seed="b").float()
    held = identity_of(a=a, b=b)
    assert identity_of(b=b.clone(), a=a.clone()) == held  # in whatever order
    above = b.clone()
    above[-1] = torch.nextafter(b[-1], torch.tensor(torch.inf))
    others = [
        identity_of(a=a, b=above),
        identity_of(a=a.reshape(3, 2), b=b),
        identity_of(a=a, c=b),
        identity_of(a=a),
    ]
    assert len({held, *others}) == 5


def test_slicing_and_tiling_are_those_of_diffusers(codec):
    z = normal(2, 4, 8, 8, seed="z").float()
    torch.testing.assert_close(tiny_codec(slicing=True).decode(z), codec.decode(z), rtol=0, atol=10 * ROUNDING)
    tiled = tiny_codec(tiling=True)  # made for 32 pixels: 64 are nine tiles
    reference = tiny_vae().tiled_decode(z / 0.18215).sample.clamp(-1, 1)
    torch.testing.assert_close(tiled.decode(z), reference, rtol=0, atol=10 * ROUNDING)
    assert not torch.allclose(tiled.decode(z), codec.decode(z), atol=1e-3)


def test_from_pretrained_reads_what_diffusers_wrote(tmp_path, codec):
    codec.vae.save_pretrained(tmp_path / "vae")
    read = AutoencoderCodec.from_pretrained(tmp_path / "vae", micro_batch=3)
    assert (read.identity, read.micro_batch) == (codec.identity, 3)
    z = normal(2, 4, 2, 2, seed="z").float()
    assert torch.equal(read.decode(z), tiny_codec(micro_batch=3).decode(z))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    gone = weights.pop("decoder.conv_out.bias")
    save_file(weights, file)
    with pytest.raises(InputError, match=r"decoder\.conv_out\.bias"):
        AutoencoderCodec.from_pretrained(tmp_path / "vae")
    save_file({**weights, "decoder.conv_out.bias": gone, "more": gone.clone()}, file)
    with pytest.raises(InputError, match="more"):
        AutoencoderCodec.from_pretrained(tmp_path / "vae")
    file.unlink()
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(InputError, match="safetensors"):
        AutoencoderCodec.from_pretrained(tmp_path / "vae")


@pytest.mark.parametrize("place", ["/no/such/place", "no-owner", "./vae", "a/b/c"])
def test_places_that_are_nowhere(place):
    with pytest.raises(InputError, match=r"there is no .*stabilityai/sd-vae-ft-mse"):
        AutoencoderCodec.from_pretrained(place)


def test_a_folder_that_is_no_autoencoder(tmp_path):
    with pytest.raises(InputError, match=r"config\.json"):
        AutoencoderCodec.from_pretrained(tmp_path)


def test_shapes_are_checked(codec):
    for wrong in (pictures(1)[:, :1], pictures(1)[..., :30], pictures(1)[0]):
        with pytest.raises(InputError, match="images must"):
            codec.encode(wrong)
    with pytest.raises(InputError, match="multiple of 8"):
        codec.latent_shape(30)
    with pytest.raises(InputError, match=r"\(4, h, w\)"):
        codec.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(InputError, match="micro_batch"):
        tiny_codec(micro_batch=0)
    by_channel = tiny_vae()
    by_channel.register_to_config(latents_mean=(0.0,) * 4)
    with pytest.raises(InputError, match="latents_mean"):
        AutoencoderCodec(by_channel)


# -- rewards on pictures ---------------------------------------------------------------------------------------------


def test_a_decoded_reward_is_the_reward_of_the_picture_with_its_gradient(exact):
    z = 0.3 * normal(3, 4, 2, 2, seed="z")
    reward = Decoded(lambda x: 5 * x[:, 0].square().flatten(1).mean(1), exact)
    torch.testing.assert_close(
        reward(z), 5 * exact.decode(z)[:, 0].square().flatten(1).mean(1), rtol=1e-12, atol=1e-14
    )  # the same operations
    assert reward.differentiable
    probe, direction = z.clone().requires_grad_(), normal(3, 4, 2, 2, seed="direction")
    (gradient,) = torch.autograd.grad(reward(probe).sum(), probe)
    h = 1e-6  # as above
    slope = float((reward(z + h * direction) - reward(z - h * direction)).sum()) / (2 * h)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("gradient", [False, True])
def test_a_decoded_reward_holds_the_pictures_of_one_part(gradient):
    codec, pictures, judged = tiny_codec(micro_batch=2), [], []
    codec.register_forward_hook(lambda _module, _given, out: pictures.append(weakref.ref(out)))

    def watched(x, cond):
        judged.append((len(x), sum(picture() is not None for picture in pictures)))
        return cond["weight"] * brightness(x)

    z, cond = normal(7, 4, 2, 2, seed="z").float().requires_grad_(gradient), {"weight": torch.arange(7.0)}
    r = Decoded(watched, codec)(z, cond)
    assert judged == [(2, 1)] * 3 + [(1, 1)]
    assert not any(picture() is not None for picture in pictures)
    torch.testing.assert_close(r, cond["weight"] * brightness(codec.decode(z)), rtol=0, atol=6 * ROUNDING)
    if gradient:
        (found,) = torch.autograd.grad(r.sum(), z)
        (whole,) = torch.autograd.grad((cond["weight"] * brightness(codec.decode(z))).sum(), z)
        torch.testing.assert_close(found, whole, rtol=0, atol=6 * ROUNDING)


def test_a_decoded_reward_passes_on_what_the_reward_declares(codec):
    def plain(x, cond):
        return cond["label"].to(x) * brightness(x)

    z = normal(2, 4, 2, 2, seed="z").float()
    assert torch.equal(Decoded(plain, codec)(z, {"label": torch.tensor([0, 2])})[:1], torch.zeros(1))
    plain.differentiable = False
    closed = Decoded(plain, codec)
    assert not closed.differentiable
    assert not closed(z.requires_grad_(), {"label": torch.ones(2)}).requires_grad
    seen = InverseProblem(lambda x: x[:, 0, 0, :3], torch.zeros(5, 3), 1.0)  # one observation a sample
    assert Decoded(seen, codec).rows_for(z) == 5
    assert Decoded(brightness, codec).rows_for(z) is None


def test_decodes_are_counted_wherever_the_codec_is(codec):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make_network({"name": "mlp", "dim": 16, "shape": [4, 2, 2], "width": 8, "depth": 1})
    model = mfm.MetaFlowMap(network, mfm.LinearPath())
    decoded = Decoded(brightness, codec)
    for reward in (decoded, Tempered(decoded, 2.0), WeightedSum([(1.0, Tempered(decoded, 0.5))])):
        got = steer(model, reward, 3, "mfm-g", num_draws=2, steps=2, generator=stream(0))
        # a checkpointed decode that is repeated for the backward pass is one decode
        assert got.cost["decodes"] == got.cost["reward_calls"] > 0
    model.decoder = codec  # known to model and reward: once
    got = steer(model, decoded, 3, "mfm-g", num_draws=2, steps=2, generator=stream(0))
    assert got.cost["decodes"] == got.cost["reward_calls"]


def test_the_page_about_latents_runs(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "latents.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    tiny_vae().save_pretrained(tmp_path / "vae")
    names: dict = {}
    exec(compile(block.replace(SD_VAE, str(tmp_path / "vae")), "latents.md", "exec"), names)
    assert names["mean"].shape == names["std"].shape == names["z"].shape == (2, 4, 8, 8)
    assert names["again"].shape == (2, 3, 64, 64)
    assert torch.equal(names["reward"](names["z"]), names["again"].mean((1, 2, 3)))


def test_the_hub_is_asked_once_where_it_does_not_answer(monkeypatch):
    """Each file that is asked for is asked for five times, which took most of a minute."""
    import diffusers
    import huggingface_hub

    asked = []

    def refuse(self, name, **options):
        asked.append((name, options["timeout"]))
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", None)
    with pytest.raises(InputError, match="no route"):
        AutoencoderCodec.from_pretrained("nobody/nothing-here")
    assert asked == [("nobody/nothing-here", 10.0)]
