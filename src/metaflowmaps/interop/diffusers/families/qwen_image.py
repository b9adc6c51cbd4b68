"""Qwen-Image: packed latents of a video autoencoder's single frame, true guidance of normalised length."""

from typing import Any

import torch
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.interop.diffusers.families.flux import Flux
from metaflowmaps.interop.diffusers.family import Request, Rows, as_long_as


class QwenImage(Flux):
    """``QwenImagePipeline``: packed, shifted and guided on request as FLUX.1 is."""

    pipelines = ("QwenImagePipeline",)
    embeddings = returns = ("prompt_embeds", "prompt_embeds_mask")

    def evaluate(self, y: Tensor, clock: Tensor, rows: Rows, request: Request) -> Tensor:
        """The velocity."""
        network = self.networks[0]
        told = None
        if network.config.guidance_embeds:
            told = torch.full((len(y),), float(request.options["guidance_scale"]), device=y.device)
        out: Tensor = network(
            hidden_states=y,
            timestep=clock / 1000,
            guidance=told,
            encoder_hidden_states=rows["prompt_embeds"],
            encoder_hidden_states_mask=rows.get("prompt_embeds_mask"),
            img_shapes=[[(1, *self.grid(request.size))]] * len(y),
            return_dict=False,
        )[0]
        return out

    def guide(self, given: Tensor, other: Tensor, scale: Tensor, request: Request) -> Tensor:
        """Guided, each token as long as it was."""
        return as_long_as(given, super().guide(given, other, scale, request))

    def pictures(self, decoded: Tensor) -> Tensor:
        """The only frame."""
        return decoded[:, :, 0]

    def settle(self, given: Any) -> dict[str, Any]:
        """A network that is told the scale needs one."""
        options = super().settle(given)
        if self.networks[0].config.guidance_embeds and options["guidance_scale"] is None:
            raise InputError("this network is told the scale of guidance: give guidance_scale=…")
        return options
