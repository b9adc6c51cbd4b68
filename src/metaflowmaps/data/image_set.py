r"""Examples to train on, and those that lie in memory.

Images are kept as they were stored and given out as float32 in [−1, 1]: integers hold 0..top and become
``2 x / top − 1``, floats are kept. The sampler is stateless: what it draws (with replacement) is a function of the
generator alone, so a resumed run sees the batches of an uninterrupted one.
"""

import math
from abc import ABC, abstractmethod
from functools import cached_property

import torch
from torch import Tensor

BLOCK = 1024


class Examples(ABC):
    """What training asks of a data set, whether it lies in memory or not."""

    name: str
    event_shape: tuple[int, ...]
    labels: Tensor | None  # (n,) int64
    class_names: tuple[str, ...]
    top: float  # the integer that stands for 1; infinite where values have no levels

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def mean(self) -> float:
        """The mean over examples and coordinates."""

    @property
    @abstractmethod
    def std(self) -> float:
        """The root of the mean square about that one mean."""

    @abstractmethod
    def tensor(self, index: Tensor | slice = slice(None)) -> Tensor:
        """The examples at index, (k, *event) float32."""

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 where they are not known."""
        return len(self.class_names)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n examples drawn with replacement, (n, *event)."""
        return self._drawn(torch.randint(len(self), (n,), generator=generator), generator)

    def sample_labelled(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """The examples that sample draws from the same generator, with their classes (n,)."""
        assert self.labels is not None, "sources refuse labels=true where there are none"
        index = torch.randint(len(self), (n,), generator=generator)
        return self._drawn(index, generator), self.labels[index]

    def _drawn(self, index: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.tensor(index)


class ImageSet(Examples):
    """n images, or other tensors, in memory.

    Args:
        name: what they are called.
        images: (n, *event).
        labels: their classes (n,) int64, where they are known.
        class_names: one a class.
        top: the integer that stands for 1.
    """

    def __init__(
        self,
        name: str,
        images: Tensor,
        labels: Tensor | None = None,
        class_names: tuple[str, ...] = (),
        top: float = 255.0,
    ) -> None:
        self.name, self.images, self.labels, self.class_names, self.top = name, images, labels, class_names, top
        self.event_shape = tuple(images.shape[1:])

    def __len__(self) -> int:
        return len(self.images)

    def tensor(self, index: Tensor | slice = slice(None)) -> Tensor:
        """The images at index, (k, C, H, W) float32 in [−1, 1]."""
        picked = self.images[index]
        return picked.float() if picked.is_floating_point() else picked.float() / (self.top / 2) - 1

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
