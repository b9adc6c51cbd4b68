"""What the drawing commands know of pictures: classes by name, guidance, an autoencoder, PNG files."""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps._files import write_whole
from metaflowmaps._shapes import Cond
from metaflowmaps.checkpoint import Checkpoint
from metaflowmaps.commands.shared import Say
from metaflowmaps.data.imaging import from_tensor, to_tensor
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.interop.opening import codec_of, is_latent, names_of, stored
from metaflowmaps.pipeline import Pipeline

EVERY = "all"  # --label: the classes in turn
PART = 64  # pictures decoded at a time


class Wish(NamedTuple):
    """What a user asks of the pictures; what is not asked for leaves no trace in a run's settings."""

    label: str | None = None
    guidance: float | None = None
    vae: str | None = None
    precision: str = "float32"
    images: bool = False


class Scene:
    """A map with the pictures of its samples; the autoencoder is read when it is first needed."""

    def __init__(self, model: MetaFlowMap, found: Checkpoint, wish: Wish, num: int) -> None:
        if wish.precision not in ("float32", "bf16"):
            raise InputError(f"--precision must be float32 or bf16, got {wish.precision!r}")
        self.model, self.found, self.wish = model, found, wish
        self.pipe = Pipeline(model, None, names_of(model, found), stored(found).get("guidance"))
        self.pipe.precision = torch.bfloat16 if wish.precision == "bf16" else torch.float32
        self.labels = self._labels(num)
        asked = self.labels is not None or wish.guidance is not None
        self.cond = self.pipe.condition(self.labels, wish.guidance, num) if asked else None
        self.latent = is_latent(model) or "vae" in stored(found) or wish.vae is not None

    def _labels(self, num: int) -> Tensor | None:
        label, classes = self.wish.label, self.pipe.num_classes
        if label is None:
            return None
        if label == EVERY and classes:
            return (torch.arange(num) % classes).to(self.model.device)
        return torch.full((num,), self.pipe.label(label), device=self.model.device)

    @property
    def settings(self) -> dict[str, Any]:
        """What a run of these wishes is told from others by."""
        asked = {k: v for k, v in self.wish._asdict().items() if v not in (None, False, "float32")}
        if self.labels is not None and self.wish.label != EVERY:
            asked["label"] = int(self.labels[0])
        return asked

    def part(self, part: slice) -> Cond:
        """The condition of these samples."""
        return None if self.cond is None else {name: value[part] for name, value in self.cond.items()}

    def autocast(self) -> AbstractContextManager[Any]:
        """What the networks compute in."""
        return self.pipe.autocast()

    @cached_property
    def codec(self) -> Any:
        """The autoencoder; None for pixels."""
        if not self.latent:
            return None
        codec = codec_of(self.model, self.found, self.wish.vae)
        return codec if codec is None else codec.to(self.model.device)

    def on_samples(self, reward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A reward of pictures as one of samples."""
        self.pipe.codec = self.codec
        return self.pipe.on_latents(reward)

    @torch.no_grad()
    def pictures(self, x: Tensor) -> Tensor:
        """Pictures of samples, on the CPU."""
        self.pipe.codec = self.codec
        return torch.cat([self.pipe.decode(part.to(self.model.device)).cpu() for part in x.split(PART)])

    def shown(self, x: Tensor, say: Say) -> Tensor:
        """What a grid shows of samples: their pictures, or themselves where the autoencoder is not to be had."""
        try:
            return self.pictures(x)
        except InputError as error:
            if self.wish.vae is not None:
                raise
            say(f"the samples are kept, and shown as latents: {error}")
            return x

    def encode(self, file: str) -> Tensor:
        """A picture's file as a sample, (1, *event)."""
        from PIL import Image, UnidentifiedImageError

        self.pipe.codec = self.codec
        try:
            with Image.open(file) as picture:
                x = to_tensor(picture, self.pipe.image_shape[0])
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"--image {file} cannot be read ({type(error).__name__}): give a picture") from None
        return self.pipe.encode(x)

    def write(self, x: Tensor, out: Path) -> None:
        """Every sample as ``images/000000.png``, whole or not at all."""
        if not self.wish.images:
            return
        folder = out / "images"
        folder.mkdir(parents=True, exist_ok=True)
        for begin in range(0, len(x), PART):
            for i, picture in enumerate(from_tensor(self.pictures(x[begin : begin + PART])), begin):
                encoded = io.BytesIO()
                picture.save(encoded, "png")
                write_whole(folder / f"{i:06d}.png", encoded.getvalue(), durable=False)
