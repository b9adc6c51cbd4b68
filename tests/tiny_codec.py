"""A tiny autoencoder of the right architecture: eight pixels a side for each coordinate of a latent."""

import torch

from metaflowmaps.interop.autoencoder import AutoencoderCodec


def tiny_vae(seed: int = 0):
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 16, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=32,
        )
        with torch.no_grad():  # as made, log-variances are near 0: those of trained ones are small
            vae.quant_conv.weight[4:] *= 0.3
            vae.quant_conv.bias[4:] -= 6.0
    return vae.eval()


def tiny_codec(seed: int = 0, **options) -> AutoencoderCodec:
    """Latents (4, size/8, size/8)."""
    return AutoencoderCodec(tiny_vae(seed), **options)
