"""What the drawing commands know of pictures: classes by name, guidance, an autoencoder, PNG files."""

import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._files import write_whole
from metaflowmaps._shapes import Cond
from metaflowmaps.cli.context import IN_SHARDS, OnCheckpoint, Results, say
from metaflowmaps.data.imaging import from_tensor, to_tensor
from metaflowmaps.errors import InputError
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.pipeline import Pipeline

ALL_CLASSES = "all"  # --label: the classes in turn
DECODED = 64  # pictures at a time
SAMPLES = 1024  # where nobody says how many


class DrawingOptions(OnCheckpoint):
    """What sample, posterior and steer have in common."""

    shared = IN_SHARDS

    label: str | None = Field(None, description="Class, by number or name; all: the classes in turn.")
    guidance: float | None = Field(None, description="Scale w of class guidance, of maps that know it.")
    vae: str | None = Field(None, description="Autoencoder of latents: a folder or hub id, where not known.")
    precision: Literal["float32", "bf16"] = Field("float32", description="What the networks compute in.")
    images: bool = Field(False, description="Write every sample as a PNG too.")
    only: tuple[int, ...] = Field((), description="Make the sample with this saved seed again (repeatable).")

    def count(self, num: int | None) -> int:
        """How many samples: ``num``, or as many as ``only`` names."""
        if any(not 0 <= seed < 2**63 for seed in self.only):
            raise InputError(f"--only takes saved seeds, from 0 to {2**63 - 1}, got {min(self.only)}")
        if self.only and num is not None and num != len(self.only):
            raise InputError(f"--only names {len(self.only)} samples and --num asks for {num}: leave --num out")
        return len(self.only) or num or SAMPLES


class PictureWriter:
    """The pictures of a map's samples; the autoencoder is read when it is first needed.

    Args:
        opened: the map.
        options: what is asked of the pictures.
        num: how many samples there are to be.
    """

    def __init__(self, opened: OpenedModel, options: DrawingOptions, num: int) -> None:
        self.opened, self.options, model = opened, options, opened.model
        self.pipe = Pipeline(model, None, opened.class_names, opened.stored.get("guidance"))
        self.pipe.precision = torch.bfloat16 if options.precision == "bf16" else torch.float32
        self.labels = self._labels(num)
        asked = self.labels is not None or options.guidance is not None
        self.cond = self.pipe.condition(self.labels, options.guidance, num) if asked else None
        self.latent = opened.latent or options.vae is not None

    def _labels(self, num: int) -> Tensor | None:
        label, classes, device = self.options.label, self.pipe.num_classes, self.opened.device
        if label is None:
            return None
        if label == ALL_CLASSES and classes:
            return (torch.arange(num) % classes).to(device)
        return torch.full((num,), self.pipe.label(label), device=device)

    def identity(self, **known: Any) -> Results:
        """What tells this request from others: the options, with checkpoint and class as they are resolved."""
        dumped = self.options.model_dump(mode="json")
        if self.labels is not None and self.options.label != ALL_CLASSES:
            dumped["label"] = int(self.labels[0])
        return {**dumped, "checkpoint": self.opened.digest, **known}

    def rows(self, part: slice) -> Cond:
        """The condition of these samples."""
        return None if self.cond is None else {name: value[part] for name, value in self.cond.items()}

    def autocast(self) -> AbstractContextManager[Any]:
        """What the networks compute in."""
        return self.pipe.autocast()

    @cached_property
    def codec(self) -> Any:
        """The autoencoder; None for pixels."""
        return self.opened.codec(self.options.vae) if self.latent else None

    def on_samples(self, reward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A reward of pictures as one of samples."""
        if not self.latent:
            return reward
        self.pipe.codec = self.codec
        return self.pipe.on_latents(reward.to(self.opened.device) if isinstance(reward, torch.nn.Module) else reward)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """PictureWriter of samples, on the CPU."""
        self.pipe.codec = self.codec
        return torch.cat([self.pipe.decode(part.to(self.opened.device)).cpu() for part in x.split(DECODED)])

    def shown(self, x: Tensor) -> Tensor:
        """What a grid shows of samples: their pictures, or themselves where the autoencoder is not to be had."""
        try:
            return self.decode(x)
        except InputError as error:
            if self.options.vae is not None:
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
        """Where they are asked for, every sample as ``images/000000.png``."""
        if not self.options.images:
            return
        folder = out / "images"
        folder.mkdir(parents=True, exist_ok=True)
        for begin in range(0, len(x), DECODED):
            for i, picture in enumerate(from_tensor(self.decode(x[begin : begin + DECODED])), begin):
                encoded = io.BytesIO()
                picture.save(encoded, "png")
                write_whole(folder / f"{i:06d}.png", encoded.getvalue(), durable=False)
