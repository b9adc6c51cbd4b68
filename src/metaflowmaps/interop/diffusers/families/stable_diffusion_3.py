"""Stable Diffusion 3 and 3.5: flow matching, true guidance, pooled embeddings beside the tokens."""

from typing import Any

from torch import Tensor

from metaflowmaps.interop.diffusers.family import Family, Request, Rows


class StableDiffusion3(Family):
    """``StableDiffusion3Pipeline``."""

    pipelines = ("StableDiffusion3Pipeline",)
    embeddings = ("prompt_embeds", "pooled_prompt_embeds")
    returns = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    encoding = ("max_sequence_length", "clip_skip")

    def set_timesteps(self, scheduler: Any, steps: int, event_shape: tuple[int, ...]) -> None:
        """Shifted by the number of patches where the scheduler shifts by length (3.5)."""
        if not scheduler.config.get("use_dynamic_shifting"):
            super().set_timesteps(scheduler, steps, event_shape)
            return
        patch = self.networks[0].config.patch_size
        tokens = (event_shape[1] // patch) * (event_shape[2] // patch)
        scheduler.set_timesteps(steps, device="cpu", mu=self.shifted(scheduler, tokens, largest=1.16))

    def evaluate(self, y: Tensor, clock: Tensor, rows: Rows, request: Request) -> Tensor:
        """The velocity."""
        out: Tensor = self.networks[0](
            hidden_states=y,
            timestep=clock,
            encoder_hidden_states=rows["prompt_embeds"],
            pooled_projections=rows["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        return out
