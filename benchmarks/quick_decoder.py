"""What a quick decoder saves: a picture's reward and its gradient, by SD3's own autoencoder and by AutoencoderTiny.

Both have the sizes of the published ones and random weights: work and memory are those of any weights; pictures are
not, so how near the quick reward comes to the full one is not measured here. Seconds are a core's own time.
"""

import time
from statistics import median
from typing import Any

import diffusers
import torch
from torch import Tensor

import metaflowmaps as mfm
from benchmarks.common import keep, say
from benchmarks.diffusers_memory import LiveTensors, brightness
from benchmarks.tiny_pipelines import FAMILIES, normal
from metaflowmaps.interop.autoencoder import Decoded
from metaflowmaps.interop.diffusers.family import Size
from metaflowmaps.interop.diffusers.latent_decoder import LatentDecoder

PIXELS, CHANNELS, REPEATS = 256, 16, 3


def full() -> Any:
    """The autoencoder of Stable Diffusion 3."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=CHANNELS,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def quick() -> Any:
    """As diffusers has it, for latents of as many channels."""
    return diffusers.AutoencoderTiny(latent_channels=CHANNELS)


def main() -> None:
    """Measure, and keep the table."""
    torch.set_num_threads(1)
    family = mfm.from_diffusers(FAMILIES["SD3"].make(), progress=False).family
    figures = {}
    for make in (full, quick):
        say(f"quick-decoder: {make.__name__}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            vae = make().requires_grad_(False)
        decoder = LatentDecoder(family, Size(PIXELS, PIXELS), vae)
        reward = Decoded(brightness, decoder)  # type: ignore[arg-type]
        weights = sum(p.numel() for p in vae.decoder.parameters())
        figures[make.__name__] = {"kind": type(vae).__name__, "weights": weights} | {
            title: measured(reward, gradient) for title, gradient in (("values", False), ("gradients", True))
        }
    keep("quick-decoder", "python -m benchmarks quick-decoder", {"pixels": PIXELS, "decoders": figures})


def measured(reward: Any, gradient: bool) -> dict[str, float]:
    """Seconds of a picture, the median of some, and the largest sum of live tensors beside the weights."""
    x = normal(1, CHANNELS, PIXELS // 8, PIXELS // 8).requires_grad_(gradient)
    with LiveTensors() as live:
        judge(reward, x)
    seconds = []
    for _ in range(REPEATS):
        began = time.process_time()
        judge(reward, x)
        seconds.append(time.process_time() - began)
    return {"seconds": median(seconds), "bytes": live.peak}


def judge(reward: Any, x: Tensor) -> None:
    """The reward, and its gradient where there is one."""
    r = reward(x)
    if x.requires_grad:
        torch.autograd.grad(r.sum(), x)
