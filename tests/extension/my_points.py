"""A data source of one's own: points of which there are only examples."""

import math
from typing import ClassVar

import torch

from metaflowmaps.data import DataSource, ImageSet
from metaflowmaps.random import stream


class Spiral(DataSource):
    """Noisy points of a spiral in three dimensions; the turns beyond the second are a class of their own."""

    name: ClassVar[str] = "spiral"

    points: int = 512
    labelled: bool = False

    @property
    def classes(self):
        return 2 if self.labelled else 0

    def load(self):
        return self._part("train"), self._part("held out")

    def _part(self, part):
        g = stream(0, "spiral", part)
        u = torch.rand(self.points, generator=g)
        turn = 4 * math.pi * u
        x = torch.stack([u * turn.cos(), u * turn.sin(), 2 * u - 1], 1)
        return ImageSet("spiral", x + 0.02 * torch.randn(self.points, 3, generator=g), (u > 0.5).long(), ("in", "out"))
