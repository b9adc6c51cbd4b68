"""Stable Diffusion 1.5 and XL: diffusion networks that predict noise or v, true guidance with rescaling."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaflowmaps.interop.diffusers.family import Family, Request, Rows, Size


class StableDiffusion(Family):
    """``StableDiffusionPipeline``: 1.x and 2.x."""

    pipelines = ("StableDiffusionPipeline",)
    network = "unet"
    options: ClassVar[tuple[str, ...]] = ("guidance_scale", "guidance_rescale")
    encoding = ("clip_skip",)

    def needs_negative(self, options: Mapping[str, Any], has_negative: bool) -> bool:
        """Not where the network is told the scale."""
        return float(options["guidance_scale"]) > 1 and self.networks[0].config.time_cond_proj_dim is None

    def multiple(self) -> int:
        """Latents are not packed."""
        return int(self.pipe.vae_scale_factor)

    def usual_size(self) -> Size:
        """From the network's configuration."""
        side = self.networks[0].config.sample_size
        tall, wide = (side, side) if isinstance(side, int) else side
        return Size(tall * self.pipe.vae_scale_factor, wide * self.pipe.vae_scale_factor)

    def noise(self, n: int, size: Size, generator: Any = None) -> Tensor:
        """Standard normals: the pipeline's, before its scheduler scales them."""
        return super().noise(n, size, generator) / float(self.pipe.scheduler.init_noise_sigma)

    def evaluate(self, y: Tensor, clock: Tensor, rows: Rows, request: Request) -> Tensor:
        """The prediction: noise, v or data."""
        network = self.networks[0]
        told = None
        if network.config.time_cond_proj_dim is not None:
            scale = torch.full((len(y),), float(request.options["guidance_scale"]) - 1)
            told = self.pipe.get_guidance_scale_embedding(scale, embedding_dim=network.config.time_cond_proj_dim)
            told = told.to(y)
        out: Tensor = network(
            y,
            clock,
            encoder_hidden_states=rows["prompt_embeds"],
            timestep_cond=told,
            added_cond_kwargs=self.added(y, rows, request),
            return_dict=False,
        )[0]
        return out

    def added(self, y: Tensor, rows: Rows, request: Request) -> dict[str, Tensor] | None:
        """What else the network is told."""
        return None

    def guide(self, given: Tensor, other: Tensor, scale: Tensor, request: Request) -> Tensor:
        """Guided, and brought back towards the spread of the unguided answer by ``guidance_rescale``."""
        guided = super().guide(given, other, scale, request)
        share = float(request.options["guidance_rescale"])
        if share == 0:
            return guided
        each = list(range(1, guided.ndim))
        rescaled = guided * (given.std(dim=each, keepdim=True) / guided.std(dim=each, keepdim=True))
        return share * rescaled + (1 - share) * guided


class StableDiffusionXL(StableDiffusion):
    """``StableDiffusionXLPipeline``: also told sizes, and pooled embeddings."""

    pipelines = ("StableDiffusionXLPipeline",)
    embeddings = ("prompt_embeds", "pooled_prompt_embeds")
    returns = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    options = (*StableDiffusion.options, "original_size", "target_size", "crops_coords_top_left")

    def added(self, y: Tensor, rows: Rows, request: Request) -> dict[str, Tensor] | None:
        """The pooled embeddings; the sizes that the picture is meant to come from."""
        options, own = request.options, (request.size.height, request.size.width)
        sizes = (options["original_size"] or own, options["crops_coords_top_left"], options["target_size"] or own)
        told = torch.tensor([[float(number) for pair in sizes for number in pair]], device=y.device, dtype=y.dtype)
        return {"text_embeds": rows["pooled_prompt_embeds"], "time_ids": told.expand(len(y), -1)}
