r"""Two of MNIST's digits that bounce in a square: sequences of frames whose future is as certain as the past is seen.

A digit of side ℓ = 7/16 of the frame's starts anywhere and moves straight, with a speed and a direction of its own; at
a wall it turns back. Its corner is at

    p(k) = L − |(p_0 + v k mod 2L) − L|,    L = size − ℓ, in each coordinate,

drawn between pixels linearly; where digits overlap the brighter pixel is seen. Of one frame the next is open by the
directions of both, of two it is known but for what overlaps.
"""

import math
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from metaflowmaps.data.limits import MAX_BYTES
from metaflowmaps.data.load import Mnist
from metaflowmaps.data.paths import ContextLaw, Paths
from metaflowmaps.data.sequences import PathSource
from metaflowmaps.errors import InputError
from metaflowmaps.random import stream

DIGITS, SIDE = 2, 28  # in a sequence; of MNIST's images
DRAWN_AT_ONCE = 256  # paths


class MovingDigits(PathSource):
    """Digits of MNIST's files on the move; images of the held-out part move in the sequences held out."""

    name: ClassVar[str] = "moving-digits"

    contexts: ContextLaw = ContextLaw(place="latest", least=1, most=4, window=5)
    stationary: bool = True

    path: str | None = None  # the folder of MNIST's IDX files
    size: Literal[16, 32] = 32
    length: int = Field(10, ge=2, le=1000)  # frames of a sequence
    speed: tuple[float, float] = (0.03, 0.09)  # sides of the frame per frame, uniform between them
    num: int = Field(4_000, ge=2, le=100_000)  # sequences to train on; a tenth as many are held out

    def paths(self) -> tuple[Paths, Paths]:
        """Sequences made by a fixed seed."""
        if self.path is None:
            raise InputError("moving digits need the folder of MNIST's IDX files: --data FOLDER")
        if 4 * self.num * self.length * self.size**2 > MAX_BYTES:
            raise InputError(
                f"{self.num:,} sequences of {self.length} frames take more than {MAX_BYTES / 2**30:.3g} GiB of memory: "
                "lower data.num or data.length"
            )
        return _moved(self.model_dump_json())

    def describe(self) -> str:
        """How many sequences, of what."""
        return f"{self.num:,} sequences of {self.length} frames of {self.size}×{self.size}, two digits moving in each"

    def frames(self, images: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """n sequences (n, length, 1, size, size) of images (k, 1, 28, 28), all in [−1, 1]."""
        side = 7 * self.size // 16
        small = functional.avg_pool2d(images, SIDE // side)
        chosen = small[torch.randint(len(small), (n, DIGITS), generator=generator)]
        room, lowest, highest = self.size - side, *self.speed
        angle = 2 * math.pi * torch.rand(n, DIGITS, generator=generator)
        speed = self.size * (lowest + (highest - lowest) * torch.rand(n, DIGITS, generator=generator))
        step = speed[..., None] * torch.stack([angle.cos(), angle.sin()], -1)
        start = room * torch.rand(n, DIGITS, 2, generator=generator)
        way = start[:, None] + step[:, None] * torch.arange(self.length)[:, None, None]  # (n, length, DIGITS, 2)
        corner = room - (way.remainder(2 * room) - room).abs()
        parts = zip(chosen.split(DRAWN_AT_ONCE), corner.split(DRAWN_AT_ONCE), strict=True)
        return torch.cat([drawn(digits, at, self.size) for digits, at in parts])


def drawn(digits: Tensor, corner: Tensor, size: int) -> Tensor:
    """Frames (n, T, 1, size, size) of digits (n, D, 1, ℓ, ℓ) whose corners lie at (n, T, D, 2), in pixels."""
    n, length, count = corner.shape[:3]
    side = digits.shape[-1]
    pixel = torch.arange(size) + 0.5
    # where each pixel of the frame lies in the digit, from −1 to 1 between its edges
    x, y = (2 * (pixel - corner[..., axis, None]) / side - 1 for axis in range(2))  # (n, T, D, size)
    grid = torch.stack(torch.broadcast_tensors(x[..., None, :], y[..., :, None]), -1).flatten(0, 2)
    ink = (digits + 1).expand(n, count, 1, side, side)[:, None].expand(-1, length, -1, -1, -1, -1).flatten(0, 2)
    seen: Tensor = functional.grid_sample(ink, grid, align_corners=False).unflatten(0, (n, length, count))
    return seen.amax(2) - 1


@lru_cache(maxsize=1)
def _moved(described: str) -> tuple[Paths, Paths]:
    source = MovingDigits.model_validate_json(described)
    times, parts = torch.arange(float(source.length)), []
    for part, images in enumerate(Mnist(path=source.path).load()):
        n = max(1, source.num // 10) if part else source.num
        if images.event_shape != (1, SIDE, SIDE):
            raise InputError(f"{source.path} holds images of {images.event_shape[1:]}: digits of 28×28 are needed")
        frames = source.frames(images.tensor(), n, stream(0, "moving-digits", part))
        parts.append(Paths(frames, times, source.contexts))
    return parts[0], parts[1]
