r"""Between pictures and latents: the autoencoder of a latent model, frozen.

An encoder gives each picture x a diagonal Gaussian of latents; models live on those latents, shifted and scaled to
unit size (scale .18215 for ``stabilityai/sd-vae-ft-mse``, shift 0):

    encode(x) = (c (μ(x) − b), c σ(x)),    sample(x) = mean + std ε,    decode(z) = D(z/c + b), clamped to [−1, 1]

A reward on pictures becomes one on latents as ``Decoded(reward, codec)``: r(D(z)). Its gradient goes through the
decoder, whose activations are a thousand times the size of a latent. Therefore rows are decoded ``micro_batch`` at a
time, and under a gradient each such part is checkpointed: only its latents and pictures are kept, and it is decoded
again when the gradient comes back. A reward judges each part before the next is decoded
(:mod:`metaflowmaps.rewards.micro`), with or without a gradient: of a part its values and ∂r/∂z stay, and no picture.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metaflowmaps._shapes import Cond, check_count, check_state
from metaflowmaps.errors import InputError
from metaflowmaps.random import Source, randn
from metaflowmaps.rewards.base import describe, is_differentiable, rows_of
from metaflowmaps.rewards.checked import checked_reward
from metaflowmaps.rewards.micro import Parts

SD_VAE = "stabilityai/sd-vae-ft-mse"
HUB_SECONDS = 10.0  # that the hub has to answer
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Codec(Protocol):
    """Pictures (B, 3, H, W) in [−1, 1] to latents (B, C, h, w) and back."""

    scale: float

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, as the model sees them."""

    def sample(self, images: Tensor, generator: Source | None = None) -> Tensor:
        """One latent a picture."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures in [−1, 1], differentiable in the latents."""

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(C, h, w) of a square picture of that side."""

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(3, H, W) of the picture of such a latent."""


class AutoencoderCodec(nn.Module):
    """diffusers' ``AutoencoderKL`` as a codec: frozen, always in evaluation mode; ``codec(z)`` is ``codec.decode(z)``.

    Args:
        vae: The autoencoder.
        dtype: What it computes in; None leaves it as it is.
        micro_batch: Rows that are encoded or decoded at a time.
        checkpointing: Whether a gradient through the decoder decodes again instead of remembering activations.
        tiling: diffusers' own: tiles bound the memory of pictures larger than the autoencoder was made for, at seams
            that differ a little.
        slicing: diffusers' own: one row at a time.
        clamp: Whether pictures are clamped to [−1, 1]; without it the decoder overshoots, with its gradient.
    """

    def __init__(
        self,
        vae: Any,
        dtype: torch.dtype | None = None,
        *,
        micro_batch: int = 8,
        checkpointing: bool = True,
        tiling: bool = False,
        slicing: bool = False,
        clamp: bool = True,
    ) -> None:
        super().__init__()
        check_count(micro_batch, "micro_batch")
        self.config = dict(vae.config)
        for name in ("latents_mean", "latents_std"):
            if self.config.get(name) is not None:
                raise InputError(f"this autoencoder scales its latents by channel ({name}): give one with one scale")
        self.scale = float(self.config["scaling_factor"])
        self.shift = float(self.config.get("shift_factor") or 0.0)
        self.identity = _identity(vae)
        self.vae = vae.eval().requires_grad_(False)
        if dtype is not None:
            self.to(_usable(dtype))
        self.micro_batch, self.checkpointing, self.clamp = micro_batch, checkpointing, clamp
        if tiling:
            vae.enable_tiling()
        if slicing:
            vae.enable_slicing()

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | FilePath = SD_VAE,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> "AutoencoderCodec":
        """An autoencoder from a folder in diffusers' layout or from the hub.

        Args:
            path_or_hub_id: The folder, or ``owner/name``.
            revision: Of the hub.
            dtype: What it computes in.
            options: As for the class.
        """
        return cls(_load(path_or_hub_id, revision), _usable(dtype), **options)

    def train(self, mode: bool = True) -> "AutoencoderCodec":
        """It stays in evaluation mode."""
        super().train(False)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; inputs are converted, and results come back in the dtype of the input."""
        dtype: torch.dtype = next(self.vae.parameters()).dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """Where it is."""
        device: torch.device = next(self.vae.parameters()).device
        return device

    @property
    def factor(self) -> int:
        """Pixels a side for each coordinate of a latent: one halving a level after the first."""
        return int(2 ** (len(self.config["block_out_channels"]) - 1))

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """(C, h, w) of a square picture of that side."""
        check_count(size, "size")
        if size % self.factor:
            raise InputError(f"size must be a multiple of {self.factor} for this autoencoder, got {size}")
        return int(self.config["latent_channels"]), size // self.factor, size // self.factor

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(3, H, W) of the picture of a latent of shape (C, h, w)."""
        channels = int(self.config["latent_channels"])
        if len(latent_shape) != 3 or latent_shape[0] != channels:
            raise InputError(f"this autoencoder has latents ({channels}, h, w), got {tuple(latent_shape)}")
        return int(self.config["out_channels"]), latent_shape[1] * self.factor, latent_shape[2] * self.factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode pictures.

        Args:
            images: (B, 3, H, W) in [−1, 1].

        Returns:
            Mean and standard deviation of their latents, (B, C, h, w) each.
        """
        check_state(images, "images")
        channels = int(self.config["in_channels"])
        if images.ndim != 4 or images.shape[1] != channels or any(n % self.factor for n in images.shape[2:]):
            raise InputError(
                f"images must have shape (B, {channels}, H, W) with sides that are multiples of {self.factor}, "
                f"got {tuple(images.shape)}"
            )
        means, stds = [], []
        for part in images.to(self.device, self.dtype).split(self.micro_batch):
            law = self.vae.encode(part).latent_dist
            means.append(self.scale * (law.mean - self.shift))
            stds.append(self.scale * law.std)
        return torch.cat(means).to(images.dtype), torch.cat(stds).to(images.dtype)

    def sample(self, images: Tensor, generator: Source | None = None) -> Tensor:
        """mean + std ε: one latent a picture, (B, C, h, w)."""
        mean, std = self.encode(images)
        return mean + std * randn(tuple(mean.shape), generator, mean.dtype, mean.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents, differentiably.

        Args:
            latents: (B, C, h, w).

        Returns:
            Pictures (B, 3, H, W) in [−1, 1].
        """
        pictures: Tensor = self(latents)  # as a call: the meter counts decodes by a hook
        return pictures

    def forward(self, latents: Tensor) -> Tensor:
        """What ``decode`` does."""
        check_state(latents, "latents")
        self.image_shape(tuple(latents.shape[1:]))
        return decoded_in_parts(self._part, latents, self.micro_batch, self.checkpointing)

    def _part(self, latents: Tensor) -> Tensor:
        z = latents.to(self.device, self.dtype) / self.scale + self.shift
        picture: Tensor = self.vae.decode(z).sample.to(latents.dtype)
        return picture.clamp(-1, 1) if self.clamp else picture


def decoded_in_parts(
    decode: Callable[[Tensor], Tensor], latents: Tensor, rows: int, checkpointing: bool = True
) -> Tensor:
    """``decode(latents)``, so many rows at a time.

    Args:
        decode: rows of latents to as many pictures.
        latents: (B, *event).
        rows: at a time.
        checkpointing: whether a backward pass decodes again instead of remembering.
    """
    again = latents.requires_grad and torch.is_grad_enabled() and checkpointing
    parts = [
        checkpoint(decode, part, use_reentrant=False, preserve_rng_state=False) if again else decode(part)
        for part in latents.split(rows)
    ]
    return torch.cat(parts)


class Decoded:
    """A reward on pictures as one on latents, r(z) = reward(decode(z)), of the codec's ``micro_batch`` rows at a time.

    Its gradient goes to z alone, once.

    Args:
        reward: A reward of (B, 3, H, W).
        codec: Decodes what the model lives on.
    """

    def __init__(self, reward: Callable[..., Any], codec: Codec) -> None:
        self.reward = checked_reward(reward)
        self.codec = codec
        self.differentiable = is_differentiable(reward)
        self.strength = float(getattr(reward, "strength", 1.0))
        self.parts = Parts(getattr(codec, "micro_batch", None))

    def __call__(self, x: Tensor, cond: Cond = None) -> Tensor:
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            return self.parts.judged(self._judge, x, cond, self.rows_for(x))

    def _judge(self, x: Tensor, cond: Cond) -> Tensor:
        return self.reward(self.codec.decode(x), cond)

    def rows_for(self, x: Tensor) -> int | None:
        """How many samples the reward is about, row by row, judged by a blank picture."""
        return rows_of(self.reward, x.new_zeros(1, *self.codec.image_shape(tuple(x.shape[1:]))))

    def __repr__(self) -> str:
        return f"Decoded({describe(self.reward.reward)}, {describe(self.codec)})"


def _usable(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        names = ", ".join(f"torch.{str(d).removeprefix('torch.')}" for d in DTYPES)
        raise InputError(f"dtype must be one of {names}, got {dtype!r}")
    return dtype


def _identity(vae: nn.Module) -> str:
    """sha256 of the weights as float32: names, shapes and values, in the order of the names."""
    hashed = hashlib.sha256()
    for name, weight in sorted(vae.state_dict().items()):
        hashed.update(f"{name} {tuple(weight.shape)} ".encode())
        hashed.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def _ask_hub(place: str, revision: str | None) -> None:
    """Ask once for what is not here yet: each file that the hub is asked for is asked for five times, half a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(place, "config.json", revision=revision), str):
        HfApi().model_info(place, revision=revision, timeout=HUB_SECONDS)


def _load(path_or_hub_id: str | FilePath, revision: str | None) -> Any:
    """The autoencoder, all of its weights from the file and none of them pickled."""
    place = str(path_or_hub_id)
    folder = FilePath(place).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise InputError(
            f"{place} is not an autoencoder in diffusers' layout: give the folder that holds its config.json and "
            f"diffusion_pytorch_model.safetensors, or a hub id such as {SD_VAE}"
        )
    if not folder.exists() and (place.startswith(("/", ".", "~")) or place.count("/") != 1):
        raise InputError(f"there is no {place}: give the folder of an autoencoder, or a hub id such as {SD_VAE}")
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise InputError("latents need diffusers: pip install 'metaflowmaps[latent]'") from None
    try:
        if not folder.exists():
            _ask_hub(place, revision)
        vae, info = AutoencoderKL.from_pretrained(
            str(folder) if folder.exists() else place,
            revision=revision,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # the hub, the disk and the parsers have many kinds
        reason = " ".join(str(error).split())
        raise InputError(
            f"the autoencoder {place} cannot be loaded ({type(error).__name__}: {reason[:160]}): give a folder in "
            f"diffusers' layout with safetensors, or a hub id such as {SD_VAE}"
        ) from error
    # diffusers itself fills gaps with random numbers
    wrong = [*info.get("missing_keys", ()), *info.get("mismatched_keys", ()), *info.get("unexpected_keys", ())]
    if wrong:
        raise InputError(
            f"the weights of {place} do not fit its config.json ({len(wrong)} of them, {wrong[0]} first): "
            "fetch the autoencoder again"
        )
    return vae
