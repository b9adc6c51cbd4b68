"""What a kind of diffusers pipeline has of its own, in one object: a family.

A family says how prompts become tensors, how noise is drawn and latents are laid out, how the scheduler is set, what
the network is called with, how guidance combines its answers, and what the autoencoder is given. It uses the
pipeline's own methods wherever they exist (``encode_prompt``, ``prepare_latents``), so a later diffusers is followed.

A new family is one file in ``families/``: a subclass of :class:`Family`, found by the pipelines that it names. One of
your own stands anywhere and is given to ``mfm.from_diffusers(…, family=MyFamily)``.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from metaflowmaps._shapes import expand_time
from metaflowmaps.errors import InputError, unknown

Rows = dict[str, Tensor]


class Size(NamedTuple):
    """Of a picture or a video, in pixels; ``frames`` is 0 for pictures."""

    height: int
    width: int
    frames: int = 0


@dataclass(frozen=True)
class Request:
    """One call: what is asked for, encoded.

    Args:
        positive: tensors of the prompts, a row each.
        negative: those of the negative prompts; None where nothing is guided by them.
        size: of the pictures.
        options: the call's options, with the pipeline's own defaults.
        times: at which the scheduler's steps begin.
        until: the last time at which guidance acts.
    """

    positive: Rows
    negative: Rows | None
    size: Size
    options: Mapping[str, Any] = field(default_factory=dict)
    times: tuple[float, ...] = ()
    until: float = 1.0

    @property
    def prompts(self) -> int:
        """How many prompts there are."""
        return len(next(iter(self.positive.values())))


class Family(ABC):
    """One kind of pipeline; an object of it holds a pipeline of that kind.

    Args:
        pipe: the diffusers pipeline.
    """

    pipelines: ClassVar[tuple[str, ...]]  # the classes of diffusers that it serves
    network: ClassVar[str] = "transformer"  # the pipeline's part that is called at every time
    embeddings: ClassVar[tuple[str, ...]] = ("prompt_embeds",)  # arguments with a row a prompt
    returns: ClassVar[tuple[str, ...]] = ("prompt_embeds", "negative_prompt_embeds")  # of encode_prompt
    options: ClassVar[tuple[str, ...]] = ("guidance_scale",)  # arguments of a call that it heeds
    encoding: ClassVar[tuple[str, ...]] = ("max_sequence_length",)  # those that encode_prompt takes
    apart: ClassVar[bool] = False  # does encode_prompt encode negative prompts in a call of their own?
    video: ClassVar[bool] = False

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(type(pipe).__call__).parameters.items()
            if parameter.default is not parameter.empty
        }

    # -- prompts -----------------------------------------------------------------------------------------------------

    def settle(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a call: those given, and the pipeline's own defaults."""
        known = (*self.options, *self.encoding)
        for name in given:
            if name not in known:
                raise unknown(f"option of a {type(self.pipe).__name__}", name, known)
        return {name: self.defaults[name] for name in known if name in self.defaults} | dict(given)

    def needs_negative(self, options: Mapping[str, Any], has_negative: bool) -> bool:
        """Is the network also called with negative prompts?"""
        return float(options["guidance_scale"]) > 1

    @torch.no_grad()
    def encode(
        self,
        prompts: list[str] | None,
        negative: list[str] | None,
        given: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> tuple[Rows, Rows | None]:
        """Tensors of prompts and of negative prompts, a row each.

        Args:
            prompts: texts, or None where embeddings are given.
            negative: texts, one a prompt, or None.
            given: embeddings by the pipeline's own argument names.
            options: of the call.
        """
        guided = self.needs_negative(options, negative is not None or self.negatives(given))
        if self.apart:
            own = {name: value for name, value in given.items() if not name.startswith("negative_")}
            other = {name.removeprefix("negative_"): value for name, value in given.items() if name not in own}
            positive = self._named(self._returned(self.encoding_arguments(prompts, None, own, options, False)))
            if not guided:
                return positive, None
            return positive, self._named(self._returned(self.encoding_arguments(negative, None, other, options, False)))
        made = self._returned(self.encoding_arguments(prompts, negative, given, options, guided))
        return self._named(made), self._named(made, "negative_") if guided else None

    def _returned(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What encode_prompt returns, by name."""
        return dict(zip(self.returns, self.pipe.encode_prompt(**arguments), strict=False))

    def _named(self, made: Mapping[str, Any], prefix: str = "") -> Rows:
        return {name: made[prefix + name] for name in self.embeddings if made.get(prefix + name) is not None}

    def encoding_arguments(
        self,
        prompts: list[str] | None,
        negative: list[str] | None,
        given: Mapping[str, Any],
        options: Mapping[str, Any],
        guided: bool,
    ) -> dict[str, Any]:
        """What ``encode_prompt`` is called with: as much of this as it takes."""
        arguments = {
            "prompt": prompts,
            "prompt_2": None,
            "prompt_3": None,
            "negative_prompt": negative,
            "do_classifier_free_guidance": guided,
            "device": self.device,
            "num_images_per_prompt": 1,
            **{name: options[name] for name in self.encoding if options.get(name) is not None},
            **given,
        }
        return self.taken(self.pipe.encode_prompt, arguments)

    @staticmethod
    def negatives(given: Mapping[str, Any]) -> bool:
        """Do the given embeddings hold negative ones?"""
        return any(name.startswith("negative_") for name in given)

    @staticmethod
    def taken(function: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that a function has a place for."""
        places = inspect.signature(function).parameters
        return {name: value for name, value in arguments.items() if name in places}

    # -- states ------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, offloaded or not."""
        device: torch.device = self.pipe._execution_device
        return device

    @property
    def networks(self) -> tuple[Any, ...]:
        """What is called at every time."""
        return (getattr(self.pipe, self.network),)

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        dtype: torch.dtype = self.networks[0].dtype
        return dtype

    @property
    def channels(self) -> int:
        """Channels of a latent before it is packed."""
        return int(self.networks[0].config.in_channels)

    def usual_size(self) -> Size:
        """What the pipeline makes where nobody says."""
        height, width = self.defaults.get("height"), self.defaults.get("width")
        if height and width:
            return Size(height, width, self.defaults.get("num_frames") or 0)
        config = self.networks[0].config
        side = getattr(self.pipe, "default_sample_size", None) or config.sample_size
        side = side if isinstance(side, int) else side[0]
        return Size(side * self.pipe.vae_scale_factor, side * self.pipe.vae_scale_factor)

    def multiple(self) -> int:
        """Sides of a picture are multiples of so many pixels."""
        return int(self.pipe.vae_scale_factor) * 2

    def noise(self, n: int, size: Size, generator: Any = None) -> Tensor:
        """The noise that the pipeline itself would begin with: (n, *event)."""
        made = self.pipe.prepare_latents(
            n, self.channels, size.height, size.width, torch.float32, self.device, generator, None
        )
        return self.state(made[0] if isinstance(made, tuple) else made)

    def state(self, latents: Tensor) -> Tensor:
        """The ``latents`` of the pipeline's own argument as states."""
        return latents

    # -- the scheduler -----------------------------------------------------------------------------------------------

    def set_timesteps(self, scheduler: Any, steps: int, event_shape: tuple[int, ...]) -> None:
        """Set a scheduler as the pipeline does."""
        scheduler.set_timesteps(steps, device="cpu")

    @staticmethod
    def shifted(scheduler: Any, tokens: int, largest: float = 1.15) -> float:
        """The shift that goes linearly with the length."""
        config = scheduler.config
        shortest, longest = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", largest)
        slope = (high - low) / (longest - shortest)
        return float(tokens * slope + (low - slope * shortest))

    @staticmethod
    def equal_sigmas(scheduler: Any, steps: int) -> Any:
        """From 1 down in equal steps; None for schedulers that space flow sigmas themselves."""
        return None if scheduler.config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)

    def set_by_length(self, scheduler: Any, steps: int, mu: float) -> None:
        """Equal sigmas, shifted by mu where the scheduler shifts by length."""
        sigmas = self.equal_sigmas(scheduler, steps)
        places = inspect.signature(scheduler.set_timesteps).parameters
        shift = {"mu": mu} if "mu" in places else {}
        if sigmas is not None and "sigmas" in places:
            scheduler.set_timesteps(sigmas=sigmas, device="cpu", **shift)
        else:
            scheduler.set_timesteps(steps, device="cpu", **shift)

    # -- the network and its guidance --------------------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, y: Tensor, clock: Tensor, rows: Rows, request: Request) -> Tensor:
        """The network at y (B, *event), clock (B,), with a row of tensors each: what the scheduler is stepped with."""

    def scale(self, request: Request, t: Tensor, clock: Tensor) -> Tensor:
        """The scale of guidance of each row, (B,)."""
        return torch.full_like(t, float(request.options["guidance_scale"]))

    def acts(self, request: Request, t: Tensor, clock: Tensor) -> Tensor:
        """Whether guidance acts on each row, (B,)."""
        return t <= request.until

    def guide(self, given: Tensor, other: Tensor, scale: Tensor, request: Request) -> Tensor:
        """The guided answer of answers to the prompts and to the negative ones: (B, *event)."""
        return other + expand_time(scale, other) * (given - other)

    # -- the autoencoder ---------------------------------------------------------------------------------------------

    def unpack(self, latents: Tensor, size: Size) -> Tensor:
        """States as the autoencoder lays latents out, not yet rescaled."""
        return latents

    def decodable(self, latents: Tensor) -> Tensor:
        """Rescaled latents as the decoder takes them."""
        return latents

    def pictures(self, decoded: Tensor) -> Tensor:
        """What the autoencoder made, as pictures (B, 3, H, W) or videos (B, 3, F, H, W)."""
        return decoded


def as_long_as(given: Tensor, guided: Tensor) -> Tensor:
    """The guided answer, each of its last lines as long as that of the answer to the prompt."""
    wanted, own = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (given, guided))
    scaled: Tensor = guided * (wanted / own)
    return scaled


def pad_rows(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (L_i, D) of several lengths as one tensor (P, L, D), and which of it is theirs, (P, L)."""
    made = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=made.device)
    return made, torch.arange(made.shape[1], device=made.device) < lengths[:, None]


def check_rows(rows: Rows, what: str) -> int:
    """How many prompts embeddings are for; refused where they disagree."""
    counts = {name: len(value) for name, value in rows.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise InputError(f"{what} must have one row a prompt each, got {told}")
    return next(iter(counts.values()), 0)
