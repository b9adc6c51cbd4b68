"""FLUX.1: packed latents with position ids, a scale of guidance that the network is told, true guidance on request."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaflowmaps.interop.diffusers.family import Family, Request, Rows, Size


class Flux(Family):
    """``FluxPipeline``; ``guidance_scale`` is told to networks distilled for it, ``true_cfg_scale`` guides any."""

    pipelines = ("FluxPipeline",)
    embeddings = returns = ("prompt_embeds", "pooled_prompt_embeds")
    apart = True
    options = ("guidance_scale", "true_cfg_scale")

    @property
    def channels(self) -> int:
        """Before four neighbours are packed into one token."""
        return super().channels // 4

    def needs_negative(self, options: Mapping[str, Any], has_negative: bool) -> bool:
        """Only where there are negative prompts, and a scale for them."""
        return has_negative and float(options["true_cfg_scale"]) > 1

    def set_timesteps(self, scheduler: Any, steps: int, event_shape: tuple[int, ...]) -> None:
        """Equal sigmas, shifted by the number of tokens."""
        self.set_by_length(scheduler, steps, self.shifted(scheduler, event_shape[0]))

    def scale(self, request: Request, t: Tensor, clock: Tensor) -> Tensor:
        """That of true guidance."""
        return torch.full_like(t, float(request.options["true_cfg_scale"]))

    def evaluate(self, y: Tensor, clock: Tensor, rows: Rows, request: Request) -> Tensor:
        """The velocity."""
        network, size = self.networks[0], request.size
        told = None
        if network.config.guidance_embeds:
            told = torch.full((len(y),), float(request.options["guidance_scale"]), device=y.device)
        tall, wide = self.grid(size)
        text = rows["prompt_embeds"]
        out: Tensor = network(
            hidden_states=y,
            timestep=clock / 1000,
            guidance=told,
            pooled_projections=rows["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=y.device, dtype=y.dtype),
            img_ids=self.pipe._prepare_latent_image_ids(len(y), tall, wide, y.device, y.dtype),
            return_dict=False,
        )[0]
        return out

    def grid(self, size: Size) -> tuple[int, int]:
        """Tokens down and across."""
        pixels = self.multiple()
        return size.height // pixels, size.width // pixels

    def unpack(self, latents: Tensor, size: Size) -> Tensor:
        """Tokens as (B, C, h, w)."""
        made: Tensor = self.pipe._unpack_latents(latents, size.height, size.width, self.pipe.vae_scale_factor)
        return made
