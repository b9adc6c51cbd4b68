"""Lumina 2: a clock that runs to the data, guidance whose length is normalised and that may stop early."""

from typing import Any

import torch
from torch import Tensor

from metaflowmaps.interop.diffusers.families.sana import MASKED, MASKED_RETURNS
from metaflowmaps.interop.diffusers.family import Family, Request, Rows, as_long_as


class Lumina2(Family):
    """``Lumina2Pipeline``."""

    pipelines = ("Lumina2Pipeline",)
    embeddings, returns = MASKED, MASKED_RETURNS
    options = ("guidance_scale", "cfg_trunc_ratio", "cfg_normalization")
    encoding = ("max_sequence_length", "system_prompt")

    def set_timesteps(self, scheduler: Any, steps: int, event_shape: tuple[int, ...]) -> None:
        """Shifted by what the pipeline takes for the length: the first dimension of a latent, its channels."""
        self.set_by_length(scheduler, steps, self.shifted(scheduler, event_shape[0]))

    def evaluate(self, y: Tensor, clock: Tensor, rows: Rows, request: Request) -> Tensor:
        """Its output points to the data: the velocity is the opposite."""
        out: Tensor = self.networks[0](
            hidden_states=y,
            timestep=1 - clock / self.pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=rows["prompt_embeds"],
            encoder_attention_mask=rows["prompt_attention_mask"],
            return_dict=False,
        )[0]
        return -out

    def acts(self, request: Request, t: Tensor, clock: Tensor) -> Tensor:
        """In the first ``cfg_trunc_ratio`` of the steps."""
        steps = len(request.times)
        begun = torch.tensor(request.times, device=t.device, dtype=t.dtype)
        done = torch.searchsorted(begun, t.contiguous(), right=True)  # steps begun, this one included
        return super().acts(request, t, clock) & (done / steps <= float(request.options["cfg_trunc_ratio"]))

    def guide(self, given: Tensor, other: Tensor, scale: Tensor, request: Request) -> Tensor:
        """Guided, each line of pixels as long as it was."""
        guided = super().guide(given, other, scale, request)
        return as_long_as(given, guided) if request.options["cfg_normalization"] else guided
