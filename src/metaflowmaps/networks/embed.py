"""Embeddings of times, classes, guidance scales and positions.

Times are raw numbers in [0, 1]: high-frequency embeddings make losses that differentiate in time diverge (method
notes, §10). All of them are smooth and exact under forward-mode AD.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import positive
from metaflowmaps.errors import InputError

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def silenced(layer: Layer) -> Layer:
    """The layer, with output 0."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class TimeFeatures(nn.Module):
    """Each time with sines and cosines of πt/2 · (1, 2, 4)."""

    frequencies = tuple(math.pi / 2 * f for f in (1.0, 2.0, 4.0))

    def __init__(self, times: int = 3) -> None:
        super().__init__()
        self.features = times * (1 + 2 * len(self.frequencies))

    def forward(self, times: Tensor) -> Tensor:
        """(B, times) -> (B, features)."""
        phases = torch.cat([times * f for f in self.frequencies], 1)
        return torch.cat([times, phases.sin(), phases.cos()], 1)


class TimeEmbedding(nn.Module):
    """A time through a sinusoid and two layers; ``silent``: 0 at initialisation."""

    def __init__(self, width: int, silent: bool = False, features: int = 256) -> None:
        super().__init__()
        self.features = features
        first, last = nn.Linear(features, width), nn.Linear(width, width)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(first, nn.SiLU(), silenced(last) if silent else last)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        out: Tensor = self.mlp(sinusoid(t, self.features))
        return out


def sinusoid(t: Tensor, features: int, max_period: float = 1e4) -> Tensor:
    """cos(ω_i t), then sin(ω_i t), with ω from 1 down to 1/max_period: (B,) -> (B, features)."""
    half = features // 2
    omega = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=t.dtype, device=t.device))
    phases = t[:, None] * omega
    return torch.cat([phases.cos(), phases.sin()], 1)


class LabelEmbedding(nn.Module):
    """A learned vector for each class and, in the last row, for the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(0.02 * torch.randn(num_classes + 1, width))

    def forward(self, label: Tensor | None) -> Tensor:
        """(B,) -> (B, width), or the null class's (1, width) for None."""
        return self.table[-1:] if label is None else nn.functional.embedding(label, self.table)


class GuidanceEmbedding(nn.Module):
    """A guidance scale w >= 0 as a vector, 0 at initialisation; no scale given means w = 1.

    Continuous: low-frequency features of w/(1 + w), which takes [0, ∞) to [0, 1), through two layers. With ``scales``
    a table with a row for each of them instead, and any other scale is refused.
    """

    def __init__(self, width: int, scales: Sequence[float] | None = None) -> None:
        super().__init__()
        self.scales = scales
        if scales is None:
            features = TimeFeatures(1)
            first, last = nn.Linear(features.features, width), silenced(nn.Linear(width, width))
            self.mlp = nn.Sequential(features, first, nn.SiLU(), last)
        else:
            self.table = nn.Parameter(torch.zeros(len(scales), width))

    def forward(self, w: Tensor | None) -> Tensor:
        """(B,) -> (B, width), or (1, width) for None."""
        like = next(self.parameters())
        w = like.new_ones(1) if w is None else w.to(like)
        if self.scales is None:
            refuse_scales(~(w >= 0), w, "be numbers >= 0")
            out: Tensor = self.mlp((w / (1 + w))[:, None])
            return out
        given = (w[:, None] - w.new_tensor(self.scales)).abs() <= 1e-6  # a scale may have been rounded on its way here
        refuse_scales(~given.any(1), w, f"be among those this network has: {', '.join(f'{s:g}' for s in self.scales)}")
        return given.to(w) @ self.table


def refuse_scales(bad: Tensor, w: Tensor, rule: str) -> None:
    """Refuse the scales that are ``bad``, where values can be seen."""
    try:
        wrong = w[bad].tolist()
    except RuntimeError:  # vmap does not show values
        return
    if wrong:
        raise InputError(f"guidance scales must {rule}; got {wrong[0]:g}")


def make_labels(num_classes: int, width: int) -> LabelEmbedding | None:
    """The table of a network with classes, None for one without."""
    return LabelEmbedding(num_classes, width) if num_classes else None


def make_guidance(guidance: bool | Sequence[float], width: int) -> GuidanceEmbedding | None:
    """What a network's ``guidance`` argument asks for: False none, True continuous, a list of scales a table."""
    if isinstance(guidance, bool):
        return GuidanceEmbedding(width) if guidance else None
    if not isinstance(guidance, list | tuple) or 1.0 not in guidance:
        raise InputError(f"guidance must be true, false or a list of scales with 1.0 among them, got {guidance!r}")
    return GuidanceEmbedding(width, [positive(w, "a guidance scale", or_zero=True) for w in guidance])


def embed_guidance(embedding: GuidanceEmbedding | None, w: Tensor | None) -> Tensor | float:
    """The vector of a guidance scale, 0 for a network without; a scale that nothing reads is refused."""
    if embedding is not None:
        out: Tensor = embedding(w)
        return out
    if w is not None:
        raise InputError("this network takes no guidance scale: leave 'guidance' out, or build it with guidance=True")
    return 0.0


def positions(width: int, side: int) -> Tensor:
    """Fixed positions on a square grid, row by row: (side², width).

    A quarter of the channels each: sin, cos of the column's phases, sin, cos of the row's, at frequencies 1 … 1e-4.
    """
    omega = 1e4 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    phases = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([phases.sin(), phases.cos()], 1)
    columns, rows = line.expand(side, side, -1), line[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], 2).flatten(0, 1).to(torch.get_default_dtype())
