"""Wan 2.1 and 2.2: videos, a second network for low noise, clocks for every token (2.2's small model)."""

from typing import Any

import torch
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.interop.diffusers.family import Family, Request, Rows, Size


class Wan(Family):
    """``WanPipeline``; ``guidance_scale_2`` is the second network's."""

    pipelines = ("WanPipeline",)
    options = ("guidance_scale", "guidance_scale_2")
    video = True

    @property
    def networks(self) -> tuple[Any, ...]:
        """One, or one for much noise and one for little."""
        return tuple(part for part in (self.pipe.transformer, self.pipe.transformer_2) if part is not None)

    def multiple(self) -> int:
        """Pixels of a token."""
        return int(self.pipe.vae_scale_factor_spatial * self.networks[0].config.patch_size[1])

    def noise(self, n: int, size: Size, generator: Any = None) -> Tensor:
        """(n, C, frames, h, w)."""
        each = self.pipe.vae_scale_factor_temporal
        if size.frames % each != 1 % each:
            raise InputError(f"num_frames must be a multiple of {each} and one more, got {size.frames}")
        made: Tensor = self.pipe.prepare_latents(
            n, self.channels, size.height, size.width, size.frames, torch.float32, self.device, generator, None
        )
        return made

    def _boundary(self) -> float | None:
        """The clock below which the second network answers."""
        ratio = self.pipe.config.boundary_ratio
        return None if ratio is None else float(ratio) * self.pipe.scheduler.config.num_train_timesteps

    def scale(self, request: Request, t: Tensor, clock: Tensor) -> Tensor:
        """Each network's own."""
        first, boundary = super().scale(request, t, clock), self._boundary()
        second = request.options["guidance_scale_2"]
        if boundary is None or second is None:
            return first
        return torch.where(clock >= boundary, first, torch.full_like(first, float(second)))

    def evaluate(self, y: Tensor, clock: Tensor, rows: Rows, request: Request) -> Tensor:
        """The velocity, of each row's own network."""
        boundary = self._boundary()
        if boundary is None:
            return self._of(self.networks[0], y, clock, rows)
        high = clock >= boundary
        if bool((high == high[0]).all()):
            return self._of(self.pipe.transformer if bool(high[0]) else self.pipe.transformer_2, y, clock, rows)
        out = torch.empty_like(y)
        for network, here in ((self.pipe.transformer, high), (self.pipe.transformer_2, ~high)):
            own = {name: value[here] for name, value in rows.items()}
            out = out.index_copy(0, here.nonzero().flatten(), self._of(network, y[here], clock[here], own))
        return out

    def _of(self, network: Any, y: Tensor, clock: Tensor, rows: Rows) -> Tensor:
        if self.pipe.config.expand_timesteps:
            tokens = y[0, 0, :, ::2, ::2].numel()
            clock = clock[:, None].expand(-1, tokens)
        out: Tensor = network(
            hidden_states=y, timestep=clock, encoder_hidden_states=rows["prompt_embeds"], return_dict=False
        )[0]
        return out
