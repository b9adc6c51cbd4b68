r"""From a :class:`DataConfig` to a part to train on and a part held out.

The split never depends on ``limit``. digits, a user's own images and latents are shuffled once by a fixed seed, and
the first ``hold_out`` of that order are held out. MNIST keeps its files' order: with both files, train on the train
file and hold out the first images of t10k; with one file, hold out its last. ``limit`` then keeps so many of the
images to train on, by a seeded shuffle.

``digits.npz`` beside this file holds 1,797 handwritten digits of 8×8 pixels, each 0 to 16, as scikit-learn 1.x lists
them: the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak, 1998; UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49), licensed under CC BY 4.0.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metaflowmaps.data.config import DataConfig
from metaflowmaps.data.idx import read_mnist
from metaflowmaps.data.image_set import Examples, ImageSet
from metaflowmaps.data.limits import check_memory
from metaflowmaps.errors import InputError
from metaflowmaps.random import stream

Parts = tuple[Examples, Examples]
HELD_OUT_DIGITS = 297
HELD_OUT_MNIST = 1000
HELD_OUT_LATENTS = 10_000  # at most: a tenth of ImageNet would be missed
DIGITS = tuple(map(str, range(10)))
DIGITS_FILE = Path(__file__).with_name("digits.npz")


def load_data(config: DataConfig) -> Parts:
    """(images to train on, images held out). Labels of digits and MNIST are always there, others if asked for."""
    read = {"digits": _digits, "mnist": _mnist, "images": _images, "latents": _latents}[config.name]
    train, held_out = read(config)
    if not train.std > 0:
        raise InputError(f"the {len(train)} images to train on are all one colour: nothing to learn from them")
    return train, held_out


def describe(config: DataConfig, train: Examples, held_out: Examples) -> str:
    """One line for the user: how many images, their size, mean and spread, and their classes."""
    source = f" from {config.path}" if config.path is not None else ""
    names = train.class_names
    shown = ", ".join(names) if len(names) <= 10 else ", ".join((*names[:3], "…", names[-1]))
    use = "conditioned on" if config.labels else "not conditioned on"
    classes = f"{len(names)} classes ({shown}), {use}" if names else "no classes"
    return (
        f"{train.name}{source}: {len(train):,} images to train on and {len(held_out):,} held out, "
        f"{'×'.join(map(str, train.event_shape))}, mean {train.mean:.3f}, spread {train.std:.3f}, {classes}"
    )


def _digits(config: DataConfig) -> Parts:
    with np.load(DIGITS_FILE) as arrays:
        images, labels = torch.from_numpy(arrays["images"])[:, None], torch.from_numpy(arrays["labels"]).long()
    _check_size(config, images)
    kept, held = _shuffled_split(len(images), _held(config, HELD_OUT_DIGITS, len(images)), config.limit)
    return (
        ImageSet("digits", images[kept], labels[kept], DIGITS, top=16.0),
        ImageSet("digits", images[held], labels[held], DIGITS, top=16.0),
    )


def _mnist(config: DataConfig) -> Parts:
    if config.path is None:
        raise InputError("name=mnist needs the folder of its IDX files: --data-dir FOLDER, or --set data.path=FOLDER")
    found = read_mnist(Path(config.path).expanduser())
    if len(found) == 2:
        (images, labels), (others, other_labels) = found["train"], found["t10k"]
        if images.shape[1:] != others.shape[1:]:
            raise InputError(
                f"{config.path}: the train images are {tuple(images.shape[2:])}, t10k's {tuple(others.shape[2:])}: "
                f"they belong to different data sets, --set data.path=FOLDER"
            )
        held = min(HELD_OUT_MNIST, len(others)) if config.hold_out is None else config.hold_out
        if held > len(others):
            raise InputError(f"cannot hold out {held:,} of t10k's {len(others):,} images: lower data.hold_out")
    else:
        ((images, labels),) = found.values()
        held = _held(config, HELD_OUT_MNIST, len(images))
        others, other_labels = images[-held:], labels[-held:]
        images, labels = images[:-held], labels[:-held]
    _check_size(config, images)
    if config.limit is not None:
        kept = torch.randperm(len(images), generator=stream(0, "data-limit"))[: config.limit]
        images, labels = images[kept], labels[kept]
    return ImageSet("mnist", images, labels, DIGITS), ImageSet("mnist", others[:held], other_labels[:held], DIGITS)


def _images(config: DataConfig) -> Parts:
    from metaflowmaps.data.pictures import open_pictures  # brings Pillow

    pictures = open_pictures(config)
    held_out = _held(config, max(1, len(pictures) // 10), len(pictures))
    kept, held = _shuffled_split(len(pictures), held_out, config.limit)
    check_memory(pictures.path, pictures.shape, pictures.dtype.itemsize, len(kept), len(held))

    def part(index: Tensor) -> ImageSet:
        labels = None if pictures.labels is None else pictures.labels[index]
        return ImageSet("images", pictures.read(index), labels, pictures.class_names)

    return part(kept), part(held)


def _latents(config: DataConfig) -> Parts:
    from metaflowmaps.data.latents import LatentSet, Shards

    if config.path is None:
        raise InputError("name=latents needs a directory: --set data.path=DIR, as mfm encode-latents SOURCE wrote it")
    shards = Shards(Path(config.path).expanduser())
    if len(shards) < 2:
        raise InputError(f"{config.path} holds {len(shards)} pictures, at least 2 are needed: encode more")
    if config.labels and not shards.class_names:
        raise InputError(f"{config.path} was encoded without classes: --set data.labels=false")
    held_out = _held(config, max(1, min(HELD_OUT_LATENTS, len(shards) // 10)), len(shards))
    kept, held = _shuffled_split(len(shards), held_out, config.limit)
    return LatentSet("latents", shards, kept), LatentSet("latents", shards, held)


def _shuffled_split(n: int, held: int, limit: int | None) -> tuple[Tensor, Tensor]:
    order = torch.randperm(n, generator=stream(0, "data-split"))
    return order[held:][:limit], order[:held]


def _held(config: DataConfig, default: int, n: int) -> int:
    held = default if config.hold_out is None else config.hold_out
    if held >= n:
        raise InputError(f"cannot hold out {held:,} of {n:,} images: --set data.hold_out=N with N at most {n - 1:,}")
    return held


def _check_size(config: DataConfig, images: Tensor) -> None:
    height, width = images.shape[2:]
    if config.size is not None and (height, width) != (config.size, config.size):
        raise InputError(f"{config.name} images are {height}×{width}, not {config.size}: leave data.size unset")
