r"""Images in memory, kept as they were stored, given out as float32 in [−1, 1].

Integer images hold 0..top and become ``2 x / top − 1``; float images are kept in [−1, 1]. The sampler is stateless:
what it draws (with replacement) is a function of the generator alone, so a resumed run sees the batches of an
uninterrupted one.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 1024


class Examples(Protocol):
    """What training asks of a data set, whether it lies in memory or not."""

    @property
    def name(self) -> str: ...

    @property
    def top(self) -> float: ...  # the integer that stands for 1; infinite where values have no levels

    @property
    def labels(self) -> Tensor | None: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def event_shape(self) -> tuple[int, ...]: ...

    @property
    def mean(self) -> float: ...

    @property
    def std(self) -> float: ...

    def __len__(self) -> int: ...

    def tensor(self, index: Tensor | slice = ...) -> Tensor: ...

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor: ...

    def sample_labelled(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True, eq=False)
class ImageSet:
    """n images (n, C, H, W) and, where they are known, their classes (n,) int64."""

    name: str
    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    top: float = 255.0  # the integer that stands for 1

    def __len__(self) -> int:
        return len(self.images)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.images.shape[1:])

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 where they are not known."""
        return len(self.class_names)

    def tensor(self, index: Tensor | slice = slice(None)) -> Tensor:
        """The images at index, (k, C, H, W) float32 in [−1, 1]."""
        picked = self.images[index]
        return picked.float() if picked.is_floating_point() else picked.float() / (self.top / 2) - 1

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n images drawn with replacement, (n, C, H, W)."""
        return self.tensor(self._draw(n, generator))

    def sample_labelled(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The images that sample draws from the same generator, with their classes (n,)."""
        assert self.labels is not None, "sources refuse labels=true where there are none"
        index = self._draw(n, generator)
        return self.tensor(index), self.labels[index]

    @property
    def mean(self) -> float:
        """The mean over images and pixels."""
        return self._moments[0]

    @property
    def std(self) -> float:
        """The root of the mean square about that one mean."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[float, float]:
        total = square = 0.0
        for start in range(0, len(self), BLOCK):
            x = self.tensor(slice(start, start + BLOCK)).double()
            total += float(x.sum())
            square += float(x.square().sum())
        mean = total / self.images.numel()
        return mean, math.sqrt(max(0.0, square / self.images.numel() - mean**2))

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return torch.randint(len(self), (n,), generator=generator)
