"""The pictures of a map's samples: classes by name, guidance, an autoencoder, PNG files."""

import io
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._files import read_regular, write_whole
from metaflowmaps._shapes import Cond
from metaflowmaps.context import Context
from metaflowmaps.data.imaging import from_tensor, to_tensor
from metaflowmaps.errors import InputError
from metaflowmaps.lab.figures import plots, result_figures
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.networks.compiling import Compile
from metaflowmaps.pipeline import Pipeline

ALL_CLASSES = "all"  # as a label: the classes in turn
DECODED = 64  # pictures at a time


@dataclass(frozen=True)
class PictureOptions:
    """What is asked of samples and of their pictures.

    Args:
        label: a class, by number or name, or ``all``; None for no class.
        guidance: its scale; None for the usual one.
        vae: the autoencoder of latents; None where the checkpoint names it.
        half: whether the networks compute in bfloat16.
        compile: whether they are compiled: auto, true or false.
        each: whether every sample is written as a picture of its own.
    """

    label: str | None = None
    guidance: float | None = None
    vae: str | None = None
    half: bool = False
    compile: Compile = "auto"
    each: bool = False


class SamplePictures:
    """What ``num`` samples of a map are told, and their pictures; the autoencoder is read when it is first needed."""

    def __init__(self, opened: OpenedModel, options: PictureOptions, num: int) -> None:
        self.opened, self.options, self.num = opened, options, num
        guidance = opened.stored.get("guidance")
        self.pipe = Pipeline(opened.model, None, opened.class_names, guidance, compile=options.compile)
        self.pipe.precision = torch.bfloat16 if options.half else torch.float32
        self.labels = self._labels()
        asked = self.labels is not None or options.guidance is not None
        self.cond = self.pipe.condition(self.labels, options.guidance, num) if asked else None
        self.latent = opened.latent or options.vae is not None
        self.decodes = True  # until settle() finds otherwise

    def _labels(self) -> Tensor | None:
        label, classes, device = self.options.label, self.pipe.num_classes, self.opened.device
        if label is None:
            return None
        if label == ALL_CLASSES and classes:
            return (torch.arange(self.num) % classes).to(device)
        return torch.full((self.num,), self.pipe.label(label), device=device)

    def observe(self, context: Context) -> None:
        """Let all samples be given what one row of a general context holds; it is read once."""
        model = self.opened.model
        known = dict(model.encode(model.conditions_of(context)) or {})
        if bool((known["prior_std"] == 0).all()):
            raise InputError("X was observed at the very time that is asked for: there is nothing to steer")
        self.cond = {name: value.expand(self.num, *value.shape[1:]) for name, value in known.items()}

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

    def settle(self) -> None:
        """Before the work: read the autoencoder; where the checkpoint's is not to be had, samples stay latents."""
        if not self.opened.is_pictorial:
            return
        try:
            self.decodes = not self.latent or self.codec is not None
        except InputError as error:
            if self.options.vae is not None or self.options.each:
                raise
            self.decodes = False
            warnings.warn(f"the samples are kept, and shown as latents: {error}", stacklevel=2)

    def on_samples(self, reward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A reward of pictures as one of samples."""
        if not self.latent:
            return reward
        self.pipe.codec = self.codec
        return self.pipe.on_latents(reward.to(self.opened.device) if isinstance(reward, torch.nn.Module) else reward)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """The pictures of samples, on the CPU."""
        self.pipe.codec = self.codec
        return torch.cat([self.pipe.decode(part.to(self.opened.device)).cpu() for part in x.split(DECODED)])

    def encode(self, file: str) -> Tensor:
        """A picture's file as a sample, (1, *event)."""
        from PIL import Image, UnidentifiedImageError

        self.pipe.codec = self.codec
        try:
            with Image.open(io.BytesIO(read_regular(Path(file)))) as picture:
                x = to_tensor(picture, self.pipe.image_shape[0])
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"--image {file} cannot be read ({type(error).__name__}): give a picture") from None
        return self.pipe.encode(x)

    # -- files -------------------------------------------------------------------------------------------------------

    def save(self, x: Tensor, title: str, law: GaussianMixture | None, out: Path) -> None:
        """``samples.png``: points of the plane, with their law, or a grid of pictures; vectors have none."""
        if self.opened.is_planar:
            plots.save(plots.scatter(x, title, law), out / "samples.png")
        elif self.opened.is_pictorial:
            result_figures.samples_grid(self.shown(x[: result_figures.GRID]), title, out / "samples.png")
            self.write(x, out)

    def shown(self, x: Tensor) -> Tensor:
        """What a grid shows of samples: their pictures, or themselves where the autoencoder is not to be had."""
        return self.decode(x) if self.decodes else x

    def write(self, x: Tensor, out: Path) -> None:
        """Where they are asked for, every sample as ``images/000000.png``."""
        if not self.options.each:
            return
        folder = out / "images"
        folder.mkdir(parents=True, exist_ok=True)
        for begin in range(0, len(x), DECODED):
            for i, picture in enumerate(from_tensor(self.decode(x[begin : begin + DECODED])), begin):
                encoded = io.BytesIO()
                picture.save(encoded, "png")
                write_whole(folder / f"{i:06d}.png", encoded.getvalue(), durable=False)
