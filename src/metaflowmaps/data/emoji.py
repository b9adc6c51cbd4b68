"""3,388 emoji in colour, 32×32, with their categories and names.

``emoji.npz.xz`` beside this file holds pictures of Microsoft's Fluent Emoji, 3D, on white, and the categories and short
names of emoji-data. Both are under the MIT licence, whose text is in ``emoji-licence.txt``.

An emoji often comes in five tones of skin, so a picture that is held out has near relatives among those trained on.
"""

import io
import lzma
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from metaflowmaps.data.data_source import Parts
from metaflowmaps.data.image_set import ImageSet
from metaflowmaps.data.load import ExampleSource, shuffled_split

EMOJI_FILE = Path(__file__).with_name("emoji.npz.xz")
HELD_OUT_EMOJI = 338
WRITTEN = ("Flags", "Symbols")  # categories that a mirror would spoil


class Emoji(ExampleSource):
    """The 32×32 emoji in colour that come with the package, in nine categories."""

    name: ClassVar[str] = "emoji"

    mirrored: bool = True  # half of what is trained on is shown in a mirror; never flags or symbols

    def read(self) -> Parts:
        """The emoji in two parts."""
        images, labels, names, classes = _arrays()
        kept, held = shuffled_split(len(images), self.held(HELD_OUT_EMOJI, len(images)), self.limit)
        flip = torch.tensor([self.mirrored and name not in WRITTEN for name in classes])[labels]
        return (
            EmojiSet(images[kept], labels[kept], classes, [names[i] for i in kept.tolist()], flip[kept]),
            EmojiSet(images[held], labels[held], classes, [names[i] for i in held.tolist()], torch.zeros(len(held))),
        )


class EmojiSet(ImageSet):
    """Emoji with a name each; what is sampled is mirrored half of the time where ``flip`` says so.

    Args:
        images: (n, 3, H, W) uint8.
        labels: (n,) categories.
        classes: their names.
        names: one a picture.
        flip: (n,) whether a picture may be mirrored.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, classes: tuple[str, ...], names: list[str], flip: Tensor
    ) -> None:
        super().__init__("emoji", images, labels, classes)
        self.names, self.flip = names, flip

    def _drawn(self, index: Tensor, generator: torch.Generator | None) -> Tensor:
        mirror = torch.rand(len(index), generator=generator) < 0.5 * self.flip[index]
        x = self.tensor(index)
        return torch.where(mirror[:, None, None, None], x.flip(3), x)


@cache
def _arrays() -> tuple[Tensor, Tensor, list[str], tuple[str, ...]]:
    """Pictures (n, 3, 32, 32), their categories (n,), their names, and the categories' names."""
    with np.load(io.BytesIO(lzma.decompress(EMOJI_FILE.read_bytes()))) as arrays:
        images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()
        labels = torch.from_numpy(arrays["labels"]).long()
        return images, labels, arrays["names"].tolist(), tuple(arrays["classes"].tolist())
