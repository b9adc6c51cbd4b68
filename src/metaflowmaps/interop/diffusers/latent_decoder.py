"""Between the states of a pipeline and its pictures: its autoencoder, whichever of diffusers' kinds it is.

Autoencoders differ in what the models that live on them call a latent z. Read off the autoencoder itself,

    one scale and shift      w = z/c + b                  AutoencoderKL, AutoencoderDC, AutoencoderTiny
    one a channel            w = z σ_k/c + μ_k            latents_std, latents_mean: SDXL's variants, Qwen-Image, Wan
    a batch norm's           w = z √(v_k + e) + m_k       vae.bn, on patches of 2×2: FLUX.2

and a picture is D(w), clamped to [−1, 1]. Rows are decoded ``micro_batch`` at a time, and under a gradient once more
when it comes back (as in :mod:`metaflowmaps.interop.autoencoder`): memory does not grow with the rows.
"""

from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import check_count, check_state
from metaflowmaps.interop.autoencoder import decoded_in_parts
from metaflowmaps.interop.diffusers.family import Family, Size


def unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Latents of a model as the decoder takes them: (B, C, …)."""
    config = vae.config
    norm = getattr(vae, "bn", None)
    if norm is not None:
        std = (norm.running_var + config.batch_norm_eps).sqrt()
        return latents * _per_channel(std, latents) + _per_channel(norm.running_mean, latents)
    scale = float(config.get("scaling_factor") or 1.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return latents * _per_channel(std, latents) / scale + _per_channel(mean, latents)
    return latents / scale + float(config.get("shift_factor") or 0.0)


def _per_channel(values: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(values).to(like).reshape(1, -1, *([1] * (like.ndim - 2)))


class LatentDecoder(nn.Module):
    """States to pictures: ``decoder(x)``.

    Args:
        family: of the pipeline; it says how states become latents.
        size: of the pictures.
        vae: another autoencoder for the same latents, such as an ``AutoencoderTiny``; None: the pipeline's.
        micro_batch: rows that are decoded at a time.
        checkpointing: whether a gradient decodes again instead of remembering activations.
    """

    def __init__(
        self, family: Family, size: Size, vae: Any = None, *, micro_batch: int = 1, checkpointing: bool = True
    ) -> None:
        super().__init__()
        check_count(micro_batch, "micro_batch")
        self.family, self.size = family, size
        self.vae = (family.pipe.vae if vae is None else vae).eval()
        self.micro_batch, self.checkpointing = micro_batch, checkpointing

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) or videos (B, 3, F, H, W) in [−1, 1], differentiable in the states (B, *event)."""
        pictures: Tensor = self(latents)  # as a call: the meter counts decodes by a hook
        return pictures

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a picture."""
        frames = (self.size.frames,) if self.size.frames else ()
        return (3, *frames, self.size.height, self.size.width)

    def forward(self, latents: Tensor) -> Tensor:
        """What ``decode`` does."""
        check_state(latents, "latents")
        return decoded_in_parts(self._part, latents, self.micro_batch, self.checkpointing)

    def _part(self, latents: Tensor) -> Tensor:
        z = unscaled(self.vae, self.family.unpack(latents, self.size))
        made = self.vae.decode(self.family.decodable(z).to(self.vae.dtype), return_dict=False)[0]
        return self.family.pictures(made).to(latents.dtype).clamp(-1, 1)
