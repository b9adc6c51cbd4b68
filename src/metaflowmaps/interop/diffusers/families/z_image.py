"""Z-Image: prompts of their own lengths, a clock that runs to the data, guidance beyond the prompt's own answer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import expand_time
from metaflowmaps.interop.diffusers.family import Family, Request, Rows, Size, pad_rows


class ZImage(Family):
    """``ZImagePipeline``; ``guidance_scale`` is added: 0 is none."""

    pipelines = ("ZImagePipeline",)
    options = ("guidance_scale", "cfg_normalization", "cfg_truncation")

    def usual_size(self) -> Size:
        """A square of 1,024."""
        return Size(1024, 1024)

    def needs_negative(self, options: Mapping[str, Any], has_negative: bool) -> bool:
        """At any scale above 0."""
        return float(options["guidance_scale"]) > 0

    def encode(
        self,
        prompts: list[str] | None,
        negative: list[str] | None,
        given: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> tuple[Rows, Rows | None]:
        """Padded, with the lengths."""
        guided = self.needs_negative(options, negative is not None)
        if prompts is None:
            positive, other = given["prompt_embeds"], given.get("negative_prompt_embeds")
        else:
            with torch.no_grad():
                # a copy: the pipeline writes its template into the list
                arguments = self.encoding_arguments(list(prompts), negative and list(negative), given, options, guided)
                positive, other = self.pipe.encode_prompt(**arguments)
        return _padded(positive), _padded(other) if guided else None

    def set_timesteps(self, scheduler: Any, steps: int, event_shape: tuple[int, ...]) -> None:
        """Equal sigmas, shifted by the number of tokens."""
        tokens = (event_shape[1] // 2) * (event_shape[2] // 2)
        self.set_by_length(scheduler, steps, self.shifted(scheduler, tokens))

    def acts(self, request: Request, t: Tensor, clock: Tensor) -> Tensor:
        """Until ``cfg_truncation`` on its own clock."""
        last = request.options["cfg_truncation"]
        acts = super().acts(request, t, clock)
        return acts if last is None or float(last) > 1 else acts & ((1000 - clock) / 1000 <= float(last))

    def evaluate(self, y: Tensor, clock: Tensor, rows: Rows, request: Request) -> Tensor:
        """Its output points to the data: the velocity is the opposite."""
        prompts = [row[own] for row, own in zip(rows["prompt_embeds"], rows["own"], strict=True)]
        made = self.networks[0](list(y.unsqueeze(2).unbind(0)), (1000 - clock) / 1000, prompts, return_dict=False)[0]
        return -torch.stack(made).squeeze(2)

    def guide(self, given: Tensor, other: Tensor, scale: Tensor, request: Request) -> Tensor:
        """c + w (c − u), at most ``cfg_normalization`` times as long as c."""
        guided = given + expand_time(scale, given) * (given - other)
        most = float(request.options["cfg_normalization"] or 0)
        if most <= 0:
            return guided
        longest = most * given.flatten(1).norm(dim=1)
        shrink = (longest / guided.flatten(1).norm(dim=1)).clamp_max(1)
        return guided * expand_time(shrink, guided)


def _padded(rows: Any) -> Rows:
    made, own = pad_rows(rows)
    return {"prompt_embeds": made, "own": own}
