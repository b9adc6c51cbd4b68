"""A network of one's own: random waves of everything a network is given, and one layer on them."""

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import nn

from metaflowmaps.networks import NetworkConfig


class WavesConfig(NetworkConfig):
    """How many waves, and how short."""

    name: ClassVar[str] = "waves"

    waves: int = Field(64, ge=1)
    scale: float = Field(1.0, gt=0)

    def build(self, event_shape):
        """The module on samples of this shape."""
        return Waves(event_shape, self.waves, self.scale)


class Waves(nn.Module):
    """Fixed waves, drawn when the module is made: a checkpoint has to keep them."""

    def __init__(self, event_shape, waves, scale):
        super().__init__()
        size = math.prod(event_shape)
        self.register_buffer("frequencies", scale * torch.randn(2 * size + 3, waves))
        self.output = nn.Linear(2 * waves, size)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, z, a, b, context, context_time):
        given = torch.cat([z.flatten(1), context.flatten(1), torch.stack([a, b, context_time], 1)], 1)
        phases = given @ self.frequencies
        return self.output(torch.cat([phases.sin(), phases.cos()], 1)).reshape(z.shape)
