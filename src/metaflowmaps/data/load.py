r"""Examples on disk: a part to train on and a part held out.

The split never depends on ``limit``. digits, a user's own images and latents are shuffled once by a fixed seed, and
the first ``hold_out`` of that order are held out. MNIST keeps its files' order: with both files, train on the train
file and hold out the first images of t10k; with one file, hold out its last. ``limit`` then keeps so many of the
images to train on, by a seeded shuffle.

``digits.npz`` beside this file holds 1,797 handwritten digits of 8×8 pixels, each 0 to 16, as scikit-learn 1.x lists
them: the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998; UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49), licensed under CC BY 4.0.
"""

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps.data.data_source import DataSource, Parts
from metaflowmaps.data.idx import read_mnist
from metaflowmaps.data.image_set import Examples, ImageSet
from metaflowmaps.data.limits import check_memory
from metaflowmaps.errors import InputError
from metaflowmaps.random import stream

HELD_OUT_DIGITS = 297
HELD_OUT_MNIST = 1000
HELD_OUT_LATENTS = 10_000  # at most: a tenth of ImageNet would be missed
DIGITS = tuple(map(str, range(10)))
DIGITS_FILE = Path(__file__).with_name("digits.npz")


class ExampleSource(DataSource):
    """Examples in two parts; labels of digits and MNIST are always there, others if asked for."""

    limit: int | None = Field(None, ge=1)  # examples to train on, at most; the held-out part does not depend on it
    hold_out: int | None = Field(None, ge=1)  # None: digits 297, mnist 1,000, images a tenth, latents at most 10,000
    labels: bool = False  # condition on classes

    @property
    def classes(self) -> int | None:
        """Counted in the examples, where they are asked for."""
        return None if self.labels else 0

    def load(self) -> Parts:
        """Examples to train on, and examples held out."""
        train, held_out = self.read()
        if not train.std > 0:
            raise InputError(f"the {len(train)} images to train on are all one colour: nothing to learn from them")
        return train, held_out

    @abstractmethod
    def read(self) -> Parts:
        """The files in two parts."""

    def held(self, default: int, n: int) -> int:
        """How many of n are held out."""
        held = default if self.hold_out is None else self.hold_out
        if held >= n:
            raise InputError(
                f"cannot hold out {held:,} of {n:,} images: --set data.hold_out=N with N at most {n - 1:,}"
            )
        return held


class Digits(ExampleSource):
    """The 8×8 digits that come with the package."""

    name: ClassVar[str] = "digits"

    def read(self) -> Parts:
        """The digits in two parts."""
        with np.load(DIGITS_FILE) as arrays:
            images, labels = torch.from_numpy(arrays["images"])[:, None], torch.from_numpy(arrays["labels"]).long()
        kept, held = shuffled_split(len(images), self.held(HELD_OUT_DIGITS, len(images)), self.limit)
        return (
            ImageSet("digits", images[kept], labels[kept], DIGITS, top=16.0),
            ImageSet("digits", images[held], labels[held], DIGITS, top=16.0),
        )


class Mnist(ExampleSource):
    """MNIST from its IDX files."""

    name: ClassVar[str] = "mnist"

    path: str | None = None  # the folder of the IDX files

    def read(self) -> Parts:
        """The train file, and the first images of t10k; of one file alone, its last."""
        if self.path is None:
            raise InputError("mnist needs the folder of its IDX files: --data-dir FOLDER, or --set data.path=FOLDER")
        files = read_mnist(Path(self.path).expanduser())
        if len(files) == 2:
            (images, labels), (others, other_labels) = files["train"], files["t10k"]
            if images.shape[1:] != others.shape[1:]:
                raise InputError(
                    f"{self.path}: the train images are {tuple(images.shape[2:])}, t10k's {tuple(others.shape[2:])}: "
                    f"they belong to different data sets, --set data.path=FOLDER"
                )
            held = min(HELD_OUT_MNIST, len(others)) if self.hold_out is None else self.hold_out
            if held > len(others):
                raise InputError(f"cannot hold out {held:,} of t10k's {len(others):,} images: lower data.hold_out")
        else:
            ((images, labels),) = files.values()
            held = self.held(HELD_OUT_MNIST, len(images))
            others, other_labels = images[-held:], labels[-held:]
            images, labels = images[:-held], labels[:-held]
        if self.limit is not None:
            kept = torch.randperm(len(images), generator=stream(0, "data-limit"))[: self.limit]
            images, labels = images[kept], labels[kept]
        return ImageSet("mnist", images, labels, DIGITS), ImageSet("mnist", others[:held], other_labels[:held], DIGITS)


class Images(ExampleSource):
    """A user's own images."""

    name: ClassVar[str] = "images"

    path: str | None = None  # a folder, or an .npy or .npz file
    size: int | None = Field(None, ge=1, le=1024)  # side of the square; None: the most common one, at most 64
    channels: Literal[1, 3] | None = None  # None: 1 if all are grey, else 3

    @property
    def open(self) -> bool:
        """Size and channels are read off the images where they are not said."""
        return self.size is None or self.channels is None

    def settled(self, examples: Examples) -> Self:
        """Of the images' own size and channels."""
        channels, size, _ = examples.event_shape
        return self.model_copy(update={"size": size, "channels": channels})

    def read(self) -> Parts:
        """The pictures, shuffled once."""
        from metaflowmaps.data.pictures import open_pictures  # brings Pillow

        pictures = open_pictures(self)
        held_out = self.held(max(1, len(pictures) // 10), len(pictures))
        kept, held = shuffled_split(len(pictures), held_out, self.limit)
        check_memory(pictures.path, pictures.shape, pictures.dtype.itemsize, len(kept), len(held))

        def part(index: Tensor) -> ImageSet:
            labels = None if pictures.labels is None else pictures.labels[index]
            return ImageSet("images", pictures.read(index), labels, pictures.class_names)

        return part(kept), part(held)


class Latents(ExampleSource):
    """Latents as ``mfm encode-latents`` writes them."""

    name: ClassVar[str] = "latents"
    latent: ClassVar[bool] = True

    path: str | None = None  # the directory

    def read(self) -> Parts:
        """The latents, shuffled once."""
        from metaflowmaps.data.latents import LatentSet, LatentShards

        if self.path is None:
            raise InputError("latents need their directory: --set data.path=DIR, as mfm encode-latents SOURCE wrote it")
        shards = LatentShards(Path(self.path).expanduser())
        if len(shards) < 2:
            raise InputError(f"{self.path} holds {len(shards)} pictures, at least 2 are needed: encode more")
        if self.labels and not shards.class_names:
            raise InputError(f"{self.path} was encoded without classes: --set data.labels=false")
        held_out = self.held(max(1, min(HELD_OUT_LATENTS, len(shards) // 10)), len(shards))
        kept, held = shuffled_split(len(shards), held_out, self.limit)
        return LatentSet(shards, kept), LatentSet(shards, held)


def shuffled_split(n: int, held: int, limit: int | None) -> tuple[Tensor, Tensor]:
    """The indices kept, at most ``limit``, and held out, of n in an order that never changes."""
    order = torch.randperm(n, generator=stream(0, "data-split"))
    return order[held:][:limit], order[:held]
