"""Data sources of one's own: a law whose posteriors are known, and points of which there are only examples."""

import math
from typing import ClassVar

import torch

from metaflowmaps.data import DataSource, ImageSet
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.random import stream


class Ring(DataSource):
    """Equal Gaussians on a circle."""

    name: ClassVar[str] = "ring"

    modes: int = 5
    radius: float = 2.0

    def law(self):
        angles = torch.arange(self.modes) * 2 * math.pi / self.modes
        return GaussianMixture(self.radius * torch.stack([angles.cos(), angles.sin()], 1), 0.1)


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
