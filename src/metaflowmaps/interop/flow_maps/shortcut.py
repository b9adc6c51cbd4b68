"""Shortcut models: a step from t by d, data at t = 1, ``x_{t+d} = x_t + d s(x_t, t, d)``; their drift is s at d = 0."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metaflowmaps._shapes import expand_time
from metaflowmaps.errors import InputError
from metaflowmaps.interop.flow_maps.convention import FlowMapConvention, Network


@dataclass(frozen=True)
class Shortcut(FlowMapConvention):
    """``network(x, t, d)``.

    Args:
        finest: None where d is passed as it is; or how many steps the finest level has (128): d is a power of a half
            then, passed as the level log2(1/d), and the finest level is the drift.
    """

    name = "shortcut"

    finest: int | None = None

    def __post_init__(self) -> None:
        if self.finest is not None and (self.finest < 2 or self.finest & (self.finest - 1)):
            raise InputError(f"finest must be a power of 2, such as 128, got {self.finest}")

    def jump(self, network: Network, y: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """y + d s(y, s, d), d = u − s."""
        d = u - s
        return y + expand_time(d, y) * network(y, s, d if self.finest is None else self._level(d))

    def velocity(self, network: Network, y: Tensor, s: Tensor) -> Tensor:
        """s(y, s, 0)."""
        smallest = torch.zeros_like(s)
        return network(y, s, smallest if self.finest is None else self._level(smallest + 1 / self.finest))

    def _level(self, d: Tensor) -> Tensor:
        """log2(1/d), a whole number."""
        assert self.finest is not None
        level = -d.clamp_min(0.5 / self.finest).log2()
        whole = level.round()
        if bool(((level - whole).abs() > 1e-3).any()) or bool((whole > self.finest.bit_length() - 1).any()):
            raise InputError(
                f"this shortcut model steps by powers of a half down to 1/{self.finest}, got steps of "
                f"{float(d.min()):g} to {float(d.max()):g}: generate in 1, 2, 4, … steps, or steer with mfm.Glass()"
            )
        return whole
