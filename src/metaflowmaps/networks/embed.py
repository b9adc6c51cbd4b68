"""Embeddings of times and classes."""

import math

import torch
from torch import Tensor, nn


class TimeFeatures(nn.Module):
    """Each time with sines and cosines of πt/2 · (1, 2, 4): smooth, low-frequency, exact under forward-mode AD.

    High-frequency embeddings make losses that differentiate in time diverge (method notes, §10).
    """

    def __init__(self, times: int = 3, frequencies: tuple[float, ...] = (1.0, 2.0, 4.0)) -> None:
        super().__init__()
        self.features = times * (1 + 2 * len(frequencies))
        self.frequencies = [math.pi / 2 * f for f in frequencies]

    def forward(self, times: Tensor) -> Tensor:
        """(B, times) -> (B, features)."""
        phases = torch.cat([times * f for f in self.frequencies], 1)
        return torch.cat([times, phases.sin(), phases.cos()], 1)
