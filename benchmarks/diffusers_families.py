"""Every family of diffusers pipelines on tiny networks: unsteered samples against the pipeline's own, steering, costs.

``own`` is the largest difference of latents from those of diffusers' pipeline on the same noise, over plain and guided
calls, relative to the largest latent (or to 1); ``pictures`` that of decoded pictures. ``gradient`` is the decoder's
directional derivative against a central difference. Methods report by how much the mean reward rises above that of
unsteered samples of the same process and noise, in its standard deviations over them, and network calls a sample.
"""

from typing import Any

import torch
from torch import Tensor

import metaflowmaps as mfm
from benchmarks.common import keep, say
from benchmarks.tiny_pipelines import FAMILIES, normal
from metaflowmaps.interop.autoencoder import Decoded
from metaflowmaps.interop.diffusers.family import Size
from metaflowmaps.interop.diffusers.latent_decoder import LatentDecoder
from metaflowmaps.prompted import PromptedPipeline

SAMPLES, STEPS = 8, 4
UNFELT = 1e-4  # an exponent under which particles all live
METHODS = {
    "DPS": mfm.DPS(),
    "GLASS": mfm.Glass(num_draws=16, glass_steps=2),
    "SMC": mfm.SMC(num_draws=4, particles=SAMPLES, guide="none"),
    "SMC, guided by values": mfm.SMC(num_draws=4, particles=SAMPLES),
    "best of 4": mfm.BestOfN(n=4),
}


def main() -> None:
    """Measure, print and keep the table."""
    torch.set_num_threads(1)
    figures = {}
    for name in FAMILIES:
        say(f"diffusers-families: {name}")
        pipe = mfm.from_diffusers(FAMILIES[name].make(), progress=False, batch_size=SAMPLES, glass_steps=2)
        figures[name] = {**equality(pipe, name), "methods": steered(pipe, name), "gradient": gradient(pipe, name)}
    command = "python -m benchmarks diffusers-families"
    keep("diffusers-families", command, {"samples": SAMPLES, "steps": STEPS, "families": figures})


def equality(pipe: PromptedPipeline, name: str) -> dict[str, float]:
    """Largest differences from the pipeline's own latents and pictures."""
    tiny, worst = FAMILIES[name], {"own": 0.0, "pictures": 0.0}
    for call, options in tiny.calls.items():
        given = tiny.embeds | (tiny.negative if call != "plain" else {})
        arguments = given | options | tiny.size | {"num_inference_steps": tiny.steps}
        for key, output in (("own", "latent"), ("pictures", "pt")):
            draw = {"generator": torch.Generator().manual_seed(3), "output_type": output}
            expected = torch.as_tensor(pipe.pipe(**arguments, **draw, return_dict=False)[0])
            made = pipe(**arguments, **draw | {"generator": torch.Generator().manual_seed(3)}).images
            error = float((made - expected).abs().max()) / max(1.0, float(expected.abs().max()))
            worst[key] = max(worst[key], error)
    return worst


def steered(pipe: PromptedPipeline, name: str) -> dict[str, dict[str, float]]:
    """What methods gain, and what they cost."""
    tiny = FAMILIES[name]
    call, options = next(iter(tiny.calls.items()))
    given = tiny.embeds | (tiny.negative if call != "plain" else {})
    arguments: dict[str, Any] = {key: value[:1] for key, value in given.items()} | options | tiny.size
    arguments |= {"num_images_per_prompt": SAMPLES, "num_inference_steps": STEPS, "seed": 5, "output_type": "latent"}
    rows = {}
    for title, method in METHODS.items():
        alike = method if isinstance(method, mfm.SMC) else mfm.BestOfN(n=1)  # SMC moves by the SDE
        base = pipe.steer(reward=brightness(UNFELT), method=alike, **arguments).rewards / UNFELT
        spread = float(base.std())
        reward = brightness(1 / spread)  # an exponent that tilts by a standard deviation, whatever the decoder's gain
        made = pipe.steer(reward=reward, method=method, **arguments)
        rows[title] = {
            "gain": float(made.rewards.mean() - base.mean() / spread),
            "calls": made.cost["forwards"] / SAMPLES,
            "decodes": made.cost["decodes"] / SAMPLES,
        }
    return rows


def brightness(strength: float) -> Any:
    """The mean of a picture."""
    return lambda pictures: strength * pictures.flatten(1).mean(1)


def gradient(pipe: PromptedPipeline, name: str) -> float:
    """Relative error of the gradient through the decoder, against a central difference."""
    size = Size(*FAMILIES[name].size.values())
    pipe.pipe.vae.to(torch.float64)
    reward = Decoded(squares, LatentDecoder(pipe.family, size))  # type: ignore[arg-type]
    x = pipe.family.noise(1, size, torch.Generator().manual_seed(0)).double().requires_grad_(True)
    (slope,) = torch.autograd.grad(reward(x).sum(), x)
    along, h = normal(*x.shape, seed=9).double(), step_of(pipe.pipe.vae)
    difference = (reward(x.detach() + h * along) - reward(x.detach() - h * along)).sum() / (2 * h)
    return float(((slope * along).sum() - difference).abs() / difference.abs())


def squares(pictures: Tensor) -> Tensor:
    """A reward that is not linear."""
    return pictures.flatten(1).square().sum(1)


def step_of(vae: Any) -> float:
    """Of a central difference: larger for decoders that compute in float32 whatever they are given."""
    single = ("AutoencoderDC", "AutoencoderKLQwenImage", "AutoencoderKLWan")
    return 2e-4 if type(vae).__name__ in single else 1e-6
