"""FLUX.2: patches of 2×2 latents as tokens, whitened by the autoencoder's batch norm; the network is told the scale."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaflowmaps.interop.diffusers.family import Family, Request, Rows, Size


class Flux2(Family):
    """``Flux2Pipeline``, distilled for guidance: there are no negative prompts."""

    pipelines = ("Flux2Pipeline",)
    returns = ("prompt_embeds",)
    encoding = ("max_sequence_length", "text_encoder_out_layers")
    apart = True

    @property
    def channels(self) -> int:
        """Before four neighbours are one token."""
        return super().channels // 4

    def needs_negative(self, options: Mapping[str, Any], has_negative: bool) -> bool:
        """Never."""
        return False

    def state(self, latents: Tensor) -> Tensor:
        """The pipeline's argument is not packed yet: (B, C, h, w)."""
        return latents.flatten(2).transpose(1, 2) if latents.ndim == 4 else latents

    def set_timesteps(self, scheduler: Any, steps: int, event_shape: tuple[int, ...]) -> None:
        """Shifted by the number of tokens and of steps, as the authors fitted it."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        self.set_by_length(scheduler, steps, compute_empirical_mu(image_seq_len=event_shape[0], num_steps=steps))

    def evaluate(self, y: Tensor, clock: Tensor, rows: Rows, request: Request) -> Tensor:
        """The velocity."""
        text, like = rows["prompt_embeds"], self.unpack(y, request.size)
        out: Tensor = self.networks[0](
            hidden_states=y,
            timestep=clock / 1000,
            guidance=torch.full((len(y),), float(request.options["guidance_scale"]), device=y.device),
            encoder_hidden_states=text,
            txt_ids=self.pipe._prepare_text_ids(text).to(y.device),
            img_ids=self.pipe._prepare_latent_ids(like).to(y.device),
            return_dict=False,
        )[0]
        return out

    def unpack(self, latents: Tensor, size: Size) -> Tensor:
        """Tokens as (B, 4C, h, w)."""
        pixels = self.multiple()
        return latents.transpose(1, 2).reshape(len(latents), -1, size.height // pixels, size.width // pixels)

    def decodable(self, latents: Tensor) -> Tensor:
        """Patches taken apart: (B, C, 2h, 2w)."""
        made: Tensor = self.pipe._unpatchify_latents(latents)
        return made
