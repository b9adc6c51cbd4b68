"""A data source of one's own: a law, whose posteriors are known."""

import math
from typing import ClassVar

import torch

from metaflowmaps.data import DataSource
from metaflowmaps.laws.mixture import GaussianMixture


class Ring(DataSource):
    """Equal Gaussians on a circle."""

    name: ClassVar[str] = "ring"

    modes: int = 5
    radius: float = 2.0

    def law(self):
        angles = torch.arange(self.modes) * 2 * math.pi / self.modes
        return GaussianMixture(self.radius * torch.stack([angles.cos(), angles.sin()], 1), 0.1)
