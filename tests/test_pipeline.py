"""The pipeline: names to numbers, pictures to latents and back, and nothing that the parts do not do themselves."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.tiny_codec import tiny_codec, tiny_vae

import metaflowmaps as mfm
from metaflowmaps import imagenet_names as imagenet
from metaflowmaps.checkpoint import Checkpoint
from metaflowmaps.data.imaging import from_tensor, to_tensor
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.interop.opening import beside, published
from metaflowmaps.networks.dit import DiTConfig

LEFT = torch.linspace(1, -1, 32)[None, None, None, :]


def bright_left(x, cond=None):
    return 4 * (x * LEFT.to(x)).mean((1, 2, 3))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def make_map(size=4, classes=1000, guidance=(1.0, 2.5)):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DiTConfig(
            patch=2,
            width=32,
            depth=2,
            heads=4,
            encoder_depth=1,
            num_classes=classes,
            guidance=list(guidance) if guidance else False,
        ).network((4, size, size))
        for p in network.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return mfm.MetaFlowMap(network, mfm.LinearPath(), "plain")


@pytest.fixture(scope="module")
def pipe():
    return mfm.Pipeline(make_map(), tiny_codec(), imagenet.class_names(), progress=False)


def in_batches(pipe, size):
    return mfm.Pipeline(pipe.model, pipe.codec, pipe.class_names, batch_size=size, progress=False)


def test_a_call_is_refinement_and_decoding(pipe):
    out = pipe("tabby cat", steps=3, guidance=2.5, num_images=3, seed=generator())
    cond = {"label": torch.full((3,), 281), "guidance": torch.full((3,), 2.5)}
    latents = pipe.model.generate(3, 3, cond=cond, seeds=out.seeds)
    assert torch.equal(out.latents, latents)
    with torch.no_grad():
        assert torch.equal(out.pictures, pipe.codec.decode(latents))
    assert out.labels.tolist() == [281] * 3
    assert out.cost["forwards"] == 9
    assert out.cost["decodes"] == 3
    plain = pipe("tabby cat", steps=3, num_images=3, seed=out.seeds, guidance=1.0)
    other = pipe("goldfish", steps=3, num_images=3, seed=out.seeds, guidance=2.5)
    assert not torch.allclose(plain.latents, out.latents)
    assert not torch.allclose(other.latents, out.latents)


def test_a_picture_is_a_function_of_its_seed(pipe):
    out = in_batches(pipe, 3)(["tabby cat", 1], steps=2, num_images=2, seed=generator(1))
    assert out.labels.tolist() == [281, 281, 1, 1]
    again = pipe(1, steps=2, seed=out.seeds[3:])
    # the same float32 sums in batches of another size
    torch.testing.assert_close(again.pictures[0], out.pictures[3], rtol=1e-4, atol=1e-5)


def test_labels_are_names_numbers_and_wordnet_ids(pipe):
    for name in ("tabby cat", "Tabby", "n02123045", 281, "281"):
        assert pipe.label(name) == 281
    with pytest.raises(InputError, match="did you mean 'tabby cat'"):
        pipe("tabbi cat")
    with pytest.raises(InputError, match="give a number from 0 to 999"):
        pipe(1000)
    own = mfm.Pipeline(make_map(classes=2), tiny_codec(), ("sea", "land"))
    assert own.label("land") == 1
    unnamed = mfm.Pipeline(make_map(classes=2), tiny_codec())
    assert unnamed.label(1) == 1
    with pytest.raises(InputError, match="3 names for 2 classes"):
        mfm.Pipeline(make_map(classes=2), tiny_codec(), ("a", "b", "c"))


def test_without_a_label_the_null_class_is_meant(pipe):
    out = pipe(steps=1, num_images=2, seed=generator(2))
    null = pipe.model.generate(2, 1, cond={"label": torch.full((2,), 1000)}, seeds=out.seeds)
    assert torch.equal(out.latents, null)


def test_guidance_has_to_be_learned():
    plain = mfm.Pipeline(make_map(guidance=None), tiny_codec(), imagenet.class_names())
    plain("goldfish", steps=1, guidance=1.0)
    with pytest.raises(InputError, match="not trained with guidance"):
        plain("goldfish", steps=1, guidance=2.5)


def test_the_usual_guidance_is_that_of_the_checkpoint(tmp_path):
    first = mfm.Pipeline(make_map(), tiny_codec(), imagenet.class_names(), guidance=2.5)
    first.save_pretrained(tmp_path / "pipe")
    assert json.loads((tmp_path / "pipe/pipeline.json").read_text())["class_names"] == "imagenet"
    again = mfm.Pipeline.from_pretrained(tmp_path / "pipe")
    assert again.guidance == 2.5
    seeds = torch.tensor([3, 4])
    one, two = (p("goldfish", steps=2, num_images=2, seed=seeds) for p in (first, again))
    assert torch.equal(one.pictures, two.pictures)
    said = again("goldfish", steps=2, num_images=2, seed=seeds, guidance=2.5)
    assert torch.equal(one.latents, said.latents)
    assert isinstance(mfm.MetaFlowMap.from_pretrained(tmp_path / "pipe"), mfm.MetaFlowMap)


def test_posterior_draws_are_those_of_the_map(pipe):
    picture = pipe("goldfish", steps=1, seed=generator(3)).pictures
    out = pipe.posterior(picture, 0.6, num_draws=5, label="goldfish", guidance=2.5, generator=generator(4))
    assert out.pictures.shape == (5, 1, 3, 32, 32)
    assert out.images[4][0].size == (32, 32)
    g = generator(4)
    with torch.no_grad():
        x_1 = pipe.codec.encode(picture)[0]
        x_t = pipe.model.path.interpolate(torch.randn(x_1.shape, generator=g), x_1, 0.6)
        cond = {"label": torch.tensor([1]), "guidance": torch.tensor([2.5])}
        draws = pipe.model.draw(0.6, x_t, 5, generator=g, cond=cond)
    torch.testing.assert_close(out.info["noisy"], x_t, rtol=0, atol=0)
    torch.testing.assert_close(out.latents, draws, rtol=0, atol=0)
    late = pipe.posterior(picture, 1.0, num_draws=2, generator=generator())
    assert late.cost["forwards"] == 2


def test_steering_raises_the_reward_and_is_that_of_steer(pipe):
    options = {"num_images": 4, "guidance": 2.5}
    seeds = torch.arange(4)
    free = pipe.steer("goldfish", bright_left, "none", mfm.ODE(steps=8), seed=seeds, **options)
    led = pipe.steer("goldfish", lambda x: 400 * bright_left(x), mfm.MFMG(1), mfm.ODE(steps=8), seed=seeds, **options)
    assert (
        bright_left(led.pictures).mean() > bright_left(free.pictures).mean() + 0.01
    )  # the spread of the free ones is .003
    torch.testing.assert_close(led.rewards, 400 * bright_left(led.pictures), rtol=1e-4, atol=1e-4)
    cond = {"label": torch.ones(4, dtype=torch.int64), "guidance": torch.full((4,), 2.5)}
    decoded = lambda z: 400 * bright_left(pipe.codec.decode(z))  # noqa: E731
    own = mfm.steer(pipe.model, decoded, 4, mfm.MFMG(1), mfm.ODE(steps=8), seed=seeds, cond=cond)
    torch.testing.assert_close(led.latents, own.samples, rtol=1e-4, atol=1e-5)
    assert led.cost["decodes"] == led.cost["reward_calls"] == 4 * 8
    with pytest.raises(InputError, match="needs a reward"):
        pipe.steer("goldfish", num_images=1)
    with pytest.raises(InputError, match="did you mean 'mfm-g"):
        pipe.steer("goldfish", bright_left, "mfm_g")


@pytest.mark.parametrize("what", ["reward", "network"])
def test_what_does_not_fit_memory_is_made_in_smaller_batches(pipe, what):
    most = []

    def hungry(rows):
        most.append(rows)
        if rows > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    def reward(x):
        if what == "reward":
            hungry(len(x))
        return bright_left(x)

    options = {"num_images": 4, "process": mfm.ODE(steps=2), "seed": torch.arange(4)}
    easy = in_batches(pipe, 2).steer("goldfish", bright_left, mfm.MFMG(1), **options)
    if what == "reward":  # which is judged in smaller parts, in batches as they were
        with pytest.warns(UserWarning, match="micro_batch=2"):
            out = in_batches(pipe, 4).steer("goldfish", reward, mfm.MFMG(1), **options)
    else:
        hook = pipe.model.network.register_forward_pre_hook(lambda _module, given: hungry(len(given[0])))
        out = in_batches(pipe, 4).steer("goldfish", reward, mfm.MFMG(1), **options)
        hook.remove()
    assert max(most) == 4
    assert most[-1] <= 2
    assert 2 in most  # halved, not given up
    torch.testing.assert_close(out.latents, easy.latents, rtol=1e-4, atol=1e-5)

    def broken(x):
        raise RuntimeError("CUDA out of memory")

    with pytest.raises((RuntimeError, InputError), match="out of memory"):
        pipe.steer("goldfish", broken, "mfm-g", **options)


@pytest.mark.parametrize(
    ("reward", "batch_size", "options"),
    [
        (None, 4, {"steps": 6, "num_images": 10}),
        (bright_left, 4, {"process": mfm.ODE(steps=9), "num_images": 5, "method": mfm.MFMG(2)}),
        (bright_left, 2, {"process": mfm.ODE(steps=7), "num_images": 2, "method": mfm.MFMGF(3)}),
        (bright_left, 4, {"process": mfm.ODE(steps=5), "num_images": 4, "method": "dps"}),
    ],
)
def test_the_estimate_is_what_the_call_costs(pipe, reward, batch_size, options):
    pipe = in_batches(pipe, batch_size)
    guess = pipe.estimate(reward=reward, label="goldfish", **options)
    make = pipe if reward is None else lambda label, **o: pipe.steer(label, reward, **o)
    cost = make("goldfish", seed=generator(), **options).cost
    for key in ("forwards", "backwards", "reward_calls", "reward_backwards", "decodes"):
        assert guess[key] == pytest.approx(cost[key]), key
    # a guess from two trials of some ten milliseconds, on a machine that others use
    assert 0.1 * cost["seconds"] < guess["seconds"] < 10 * cost["seconds"]


def test_bfloat16_is_near_float32(pipe):
    half = mfm.Pipeline(make_map(), tiny_codec(), imagenet.class_names()).to(dtype=torch.bfloat16)
    seeds = torch.arange(2)
    a, b = (p("goldfish", steps=2, num_images=2, seed=seeds) for p in (pipe, half))
    assert b.latents.dtype == torch.float32
    gap = (a.latents - b.latents).abs().max()
    assert 0 < gap < 0.05 * a.latents.abs().max()  # eight bits of mantissa through a dozen layers
    with pytest.raises(InputError, match="float32 or torch"):
        half.to(dtype=torch.float64)


def test_halved_weights_make_the_same_pictures(pipe, tmp_path):
    """To the bit: autocast rounds the same matrices at every use. Saving them, or float32 again, is refused."""
    rounded, halved = (mfm.Pipeline(make_map(), tiny_codec(), imagenet.class_names(), progress=False) for _ in range(2))
    rounded.to(dtype=torch.bfloat16)
    assert halved.halve().halve() is halved
    held = {name for name, p in halved.model.network.named_parameters() if p.dtype == torch.bfloat16}
    parts = ("attention.qkv", "attention.out", "mlp.0", "mlp.2")  # times, what scales by them and patches stay whole
    assert held == {f"blocks.{block}.{part}.weight" for block in range(2) for part in parts}
    seeds = torch.arange(2)
    a, b = (p("goldfish", steps=2, num_images=2, seed=seeds) for p in (rounded, halved))
    assert torch.equal(a.latents, b.latents)
    assert b.latents.dtype == torch.float32
    method = mfm.MFMG(num_draws=1), mfm.ODE(steps=2)
    a, b = (p.steer("goldfish", bright_left, *method, seed=seeds[:1]) for p in (rounded, halved))
    assert torch.equal(a.latents, b.latents)
    with pytest.raises(InputError, match="before halve"):
        halved.save_pretrained(tmp_path / "halved")
    with pytest.raises(InputError, match="open the map again"):
        halved.to(dtype=torch.float32)


def test_pixel_models_need_no_autoencoder():
    digits = mfm.Pipeline.from_pretrained("digits")
    digits.progress = False
    out = digits(steps=2, num_images=2, seed=generator())
    assert [image.size for image in out.images] == [(8, 8)] * 2
    draws = digits.posterior(out.images[0], 0.5, 3, generator=generator())
    assert len(draws.images) == 3
    with pytest.raises(InputError, match="knows no classes"):
        digits("seven")
    with pytest.raises(InputError, match="8×8"):
        digits.posterior(Image.new("L", (9, 9)), 0.5)


def test_published_files_open_as_pipelines(interop_files, tmp_path):
    config = {"heads": 4, "encoder_depth": 3}
    path = interop_files / "mfm_weights.safetensors"
    pipe = mfm.Pipeline.from_pretrained(path, config=config, vae=tiny_codec())
    out = pipe(3, steps=2, guidance=2.5, num_images=2, seed=generator())
    assert out.pictures.shape == (2, 3, 64, 64)
    tiny_vae().save_pretrained(tmp_path / "vae")
    local = mfm.Pipeline.from_pretrained(path, config=config, vae=tmp_path / "vae")
    again = local(3, steps=2, guidance=2.5, num_images=2, seed=out.seeds)
    torch.testing.assert_close(again.pictures, out.pictures, rtol=0, atol=0)
    with pytest.raises(InputError, match=r"has latents \(4, h, w\)"):
        mfm.Pipeline(MetaFlowMap.from_pretrained("digits"), tiny_codec())


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_pictures_of_every_kind_are_the_same_tensor():
    whole = torch.randint(0, 256, (2, 5, 7, 3), generator=generator(), dtype=torch.uint8).numpy()
    x = torch.from_numpy(whole).permute(0, 3, 1, 2).float() / 127.5 - 1
    kinds = [
        whole, [*whole], [Image.fromarray(p) for p in whole], whole.astype(np.float32) / 255, x,
        [Image.fromarray(p).convert("RGBA") for p in whole],
    ]  # fmt: skip
    for kind in kinds:
        torch.testing.assert_close(to_tensor(kind), x, rtol=0, atol=1e-6)  # one rounding of a division by 255
    assert to_tensor(Image.fromarray(whole[0])).shape == (1, 3, 5, 7)
    pil = from_tensor(x)
    assert all((np.asarray(p) == q).all() for p, q in zip(pil, whole, strict=True))
    assert from_tensor(torch.full((1, 1, 2, 2), 3.0))[0].getpixel((0, 0)) == 255


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "floats in"),
        (torch.full((1, 3, 4, 4), 2.0), "2 . x - 1"),
        (np.zeros((4, 4, 3), np.int64), "uint8 in"),
        (np.full((4, 4, 3), 7.0), "uint8 in"),
        (np.zeros((4, 4, 2), np.uint8), "an array"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)], "different sizes"),
        ([], "no picture"),
    ],
)
def test_what_is_no_picture_is_refused(bad, message):
    with pytest.raises(InputError, match=message) as error:
        to_tensor(bad)
    assert "\n" not in str(error.value)


# -- what people pass --------------------------------------------------------------------------------------------------


def test_labels_of_tensors_and_arrays(pipe):
    picture = torch.zeros(2, 3, 32, 32)
    for label in (torch.tensor([1, 2]), np.array([1, 2]), (1, 2), [np.int64(1), torch.tensor(2)]):
        assert pipe(label, steps=1).labels.tolist() == [1, 2]
        assert pipe.posterior(picture, 0.5, 1, label=label).labels.tolist() == [1, 2]
    for label in (np.int64(3), torch.tensor(3)):
        assert pipe(label, steps=1).labels.tolist() == [3]
        assert pipe.posterior(picture, 0.5, 1, label=label).labels.tolist() == [3, 3]
    for label in (3.0, [[1]], [None], torch.tensor([1.5])):
        with pytest.raises(InputError, match="class's name or number"):
            pipe(label, steps=1)


@pytest.mark.parametrize("method", [mfm.TDS(), mfm.SMC(num_draws=2)], ids=["tds", "mfm-smc"])
def test_systems_of_particles_are_steered(pipe, method):
    options = {"method": method, "process": mfm.SDE(steps=2)}
    systems = {**options, "method": replace(method, particles=4)}
    out = pipe.steer(1, bright_left, num_images=4, seed=generator(), **options)
    again = pipe.steer(1, bright_left, num_images=4, seed=generator(), **options)
    assert len(out.images) == 4
    assert len(out.seeds.unique()) == 1
    assert torch.equal(out.latents, again.latents)
    by_seed = pipe.steer(1, bright_left, num_images=4, seed=out.seeds[:1], **options)
    assert torch.equal(out.latents, by_seed.latents)
    two = pipe.steer(1, bright_left, num_images=8, seed=generator(), **systems)
    assert len(two.seeds.unique()) == 2
    guess = pipe.estimate(16, bright_left, label=1, method=systems["method"], process=mfm.SDE(steps=4))
    cost = pipe.steer(1, bright_left, num_images=16, **{**systems, "process": mfm.SDE(steps=4)}).cost
    for key in ("forwards", "backwards", "reward_calls", "reward_backwards", "decodes", "nfe"):
        assert guess[key] == pytest.approx(cost[key]), key


def test_the_estimate_counts_every_label(pipe):
    how = {"method": mfm.MFMG(1), "process": mfm.ODE(steps=3)}
    guess = pipe.estimate(2, bright_left, label=[1, 2, 3], **how)
    cost = pipe.steer([1, 2, 3], bright_left, num_images=2, **how).cost
    for key in ("forwards", "reward_calls", "nfe"):
        assert guess[key] == pytest.approx(cost[key]), key
    with pytest.raises(InputError, match="steps must be"):
        pipe.estimate(2, steps="4")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((1, 3, 4, 4), torch.nan), "2 . x - 1"),
        (np.full((4, 4, 3), np.nan), "floats in"),
        (torch.zeros(0, 3, 4, 4), "no picture"),
        (np.zeros((0, 4, 4, 3)), "no picture"),
        (Image.fromarray(np.full((4, 4), 51400, np.uint16)), "convert it to RGB or L"),
        (Image.fromarray(np.full((4, 4), 0.5, np.float32)), "convert it to RGB or L"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)], "different sizes"),
    ],
)
def test_what_would_pass_for_a_picture_is_refused(bad, message):
    with pytest.raises(InputError, match=message):
        to_tensor(bad)


def test_a_list_of_tensors_is_their_stack():
    x = torch.rand(2, 3, 4, 4, generator=generator())
    assert torch.equal(to_tensor([*x]), x)
    assert torch.equal(to_tensor([x[:1], x[1:]]), x)


def test_a_folder_with_a_published_file_opens(interop_files, tmp_path):
    (tmp_path / "mfm_weights.safetensors").symlink_to((interop_files / "mfm_weights.safetensors").resolve())
    pipe = mfm.Pipeline.from_pretrained(tmp_path, config={"heads": 4, "encoder_depth": 3}, vae=tiny_codec())
    assert pipe.num_classes == 10
    assert published(tmp_path)  # where no config says so: the released sizes need none
    pipe.save_pretrained(tmp_path / "ours", "some/vae")
    assert not published(tmp_path / "ours")


@pytest.mark.parametrize(("name", "kept"), [("vae", True), ("../vae", False), ("..", False), ("owner/vae", False)])
def test_a_checkpoint_names_folders_beside_its_map_alone(tmp_path, name, kept):
    for folder in ("vae", "map/vae", "map/owner/vae"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    found = beside(Checkpoint(tmp_path / "map", {}, {}), name)
    assert found == (tmp_path / "map" / "vae" if kept else None)
