"""Every family: its unsteered samples are the pipeline's own, and each method steers it at the cost that it says."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.tiny_pipelines import FAMILIES, normal
from torch import Tensor

import metaflowmaps as mfm
from metaflowmaps.interop.autoencoder import Decoded
from metaflowmaps.interop.diffusers.family import Size
from metaflowmaps.interop.diffusers.latent_decoder import LatentDecoder
from metaflowmaps.prompted import PromptedPipeline

# Flow families repeat the pipeline's own operations, multi-step schedulers with another sign: a rounding of 6e-8.
# Diffusion families go through our path and back, three roundings a step that guidance multiplies by 7.5.
OWN = 1e-5
STRENGTH = 60.0
SINGLE = ("AutoencoderDC", "AutoencoderKLQwenImage", "AutoencoderKLWan")  # float32 within
CALLS = [(name, call) for name, tiny in FAMILIES.items() for call in tiny.calls]


@functools.cache
def opened(name: str) -> PromptedPipeline:
    return mfm.from_diffusers(FAMILIES[name].make(), progress=False, batch_size=2, glass_steps=2)


def call_of(name: str, call: str, rows: int = 2) -> dict[str, Any]:
    """The arguments of a call, for the first prompts."""
    tiny = FAMILIES[name]
    given = tiny.embeds | (tiny.negative if call != "plain" else {})
    return {k: v[:rows] for k, v in given.items()} | tiny.calls[call] | tiny.size | {"num_inference_steps": tiny.steps}


def own(name: str, call: str, output_type: str) -> Any:
    """What diffusers' pipeline makes."""
    arguments = call_of(name, call) | {"generator": torch.Generator().manual_seed(3)}
    return opened(name).pipe(**arguments, output_type=output_type, return_dict=False)[0]


def brightness(pictures: Tensor) -> Tensor:
    return STRENGTH * pictures.flatten(1).mean(1)


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_unsteered_samples_are_the_pipelines_own(name, call):
    arguments = call_of(name, call) | {"generator": torch.Generator().manual_seed(3)}
    made, expected = opened(name)(**arguments, output_type="latent"), own(name, call, "latent")
    torch.testing.assert_close(made.latents, expected, rtol=0, atol=OWN * max(1.0, float(expected.abs().max())))
    guided = 1 if call == "plain" else 2
    assert made.cost["forwards"] <= 2 * guided * FAMILIES[name].steps


@pytest.mark.parametrize("name", FAMILIES)
def test_pictures_are_the_pipelines_own(name):
    call = list(FAMILIES[name].calls)[-1]
    arguments = call_of(name, call) | {"generator": torch.Generator().manual_seed(3)}
    expected = torch.as_tensor(own(name, call, "pt"))
    torch.testing.assert_close(opened(name)(**arguments, output_type="pt").images, expected, rtol=0, atol=OWN)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_through_the_decoder_is_the_finite_difference(name):
    pipe = FAMILIES[name].make()
    ours = mfm.from_diffusers(pipe, progress=False)
    size = Size(*FAMILIES[name].size.values())
    pipe.vae.to(torch.float64)
    reward = Decoded(lambda x: x.flatten(1).square().sum(1), LatentDecoder(ours.family, size))
    x = ours.family.noise(1, size, torch.Generator().manual_seed(0)).double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(x).sum(), x)
    single = type(pipe.vae).__name__ in SINGLE
    along, h = normal(*x.shape, seed=9).double(), 2e-4 if single else 1e-6
    difference = (reward(x.detach() + h * along) - reward(x.detach() - h * along)).sum() / (2 * h)
    # central differences err by h² (1e-12) and by rounding/h: 1e-16 · 1e3/1e-6, in float32 6e-8 · 10/2e-4 = 3e-3
    tolerance = 1e-2 if single else 1e-5
    torch.testing.assert_close((gradient * along).sum(), difference, rtol=tolerance, atol=tolerance)


METHODS: dict[str, tuple[Callable[[], Any], int]] = {  # and at most how many network calls a step and sample
    "DPS": (mfm.DPS, 2),
    "Glass": (lambda: mfm.Glass(num_draws=2, glass_steps=2), 1 + 2 * 2),
    "SMC": (lambda: mfm.SMC(num_draws=2, particles=2), 1 + 2 * 2),
    "BestOfN": (lambda: mfm.BestOfN(n=3), 3),
}


@functools.cache
def unsteered(name: str) -> Tensor:
    """The rewards of samples that nobody steers."""
    return steered(name, mfm.BestOfN(n=1)).rewards


def steered(name: str, method: Any) -> Any:
    call = next(iter(FAMILIES[name].calls))
    arguments = call_of(name, call, rows=1) | {"num_images_per_prompt": 2}
    return opened(name).steer(reward=brightness, method=method, **arguments, seed=1, output_type="latent")


PAIRS = [  # families and methods take turns; all pairs in `make attack`
    pytest.param(name, method, marks=[] if j == i % len(METHODS) else [pytest.mark.attack])
    for i, name in enumerate(name for name in FAMILIES if name != "Wan 2.2 TI2V")  # as Wan 2.1, but for clocks
    for j, method in enumerate(METHODS)
]


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_methods_steer_every_family(name, method):
    make, calls = METHODS[method]
    made, base = steered(name, make()), unsteered(name)
    assert bool(made.latents.isfinite().all())
    if method in ("DPS", "BestOfN"):  # a gradient, and candidates of which the first is the unsteered sample
        assert bool((made.rewards >= base - 1e-3).all())
        assert method == "BestOfN" or bool((made.rewards > base).all())
    else:  # two draws point into some direction, or choose
        assert bool((made.rewards != base).any())
    guided = 2 if "plain" not in FAMILIES[name].calls else 1
    steps = FAMILIES[name].steps
    assert 0 < made.cost["forwards"] <= 2 * guided * (steps * calls + 1)  # DPS looks a little later at t = 0
    assert made.cost["decodes"] >= made.cost["reward_calls"] > 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("SD1.5", "FLUX.2") else [pytest.mark.attack])
        for name in ("SD3", "SD1.5", "FLUX.1", "FLUX.2", "AuraFlow", "Wan 2.2")
    ],
)
def test_particles_raise_the_reward_by_what_a_choice_among_four_can(name):
    """Held to unsteered samples of the same SDE and noise; the exponent tilts by one standard deviation of theirs."""
    pipe = mfm.from_diffusers(FAMILIES[name].make(), progress=False, batch_size=64, glass_steps=1, decoded_at_a_time=64)
    call = call_of(name, next(iter(FAMILIES[name].calls)), rows=1) | {"num_images_per_prompt": 64, "seed": 5}

    def rewards(strength: float) -> Tensor:
        method = mfm.SMC(num_draws=1, particles=4, guide="none")
        reward = lambda pictures: strength * pictures.flatten(1).mean(1)  # noqa: E731
        return pipe.steer(reward=reward, method=method, **call, output_type="latent").rewards / strength

    base = rewards(1e-4)  # under which none is chosen before another
    gain = (rewards(1 / float(base.std())) - base).mean() / base.std()
    # E Σ w_i z_i of four normal z with weights e^z is .606; a system's mean scatters by .45 about it, of sixteen by .11
    assert float(gain) == pytest.approx(0.606, abs=3 * 0.11)


@pytest.mark.attack
@pytest.mark.parametrize("name", ["SD3", "FLUX.1", "SD1.5", "Wan 2.2"])
def test_draws_raise_the_reward(name):
    arguments = call_of(name, "plain", rows=1) | {"num_images_per_prompt": 8, "seed": 5, "output_type": "latent"}
    base = opened(name).steer(reward=brightness, method=mfm.BestOfN(n=1), **arguments)
    made = opened(name).steer(reward=brightness, method=mfm.Glass(num_draws=16, glass_steps=2), **arguments)
    # every sample moves towards its own better draws: nearly all of eight rise, where chance would lift four
    assert int((made.rewards > base.rewards).sum()) >= 7
