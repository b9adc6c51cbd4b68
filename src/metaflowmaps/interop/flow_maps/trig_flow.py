r"""TrigFlow in two times: angles, ``y = cos τ x_1 + sin τ ε``, from π/2 at the noise to 0 at the data.

The network's F stands where ``dy/dτ`` does along one data point and its noise: with Δ = τ − τ' the state at τ' is ``cos
Δ y − sin Δ F(y, τ, τ')``. States are in units of ``sigma_data``. Our time, on the trigonometric path, is ``1 − 2τ/π``.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from metaflowmaps._shapes import expand_time
from metaflowmaps.interop.flow_maps.convention import FlowMapConvention, Network
from metaflowmaps.path import Path, TrigonometricPath

HALF_PI = math.pi / 2


@dataclass(frozen=True)
class TrigFlow(FlowMapConvention):
    """``network(y, τ, τ')``, angles of where it is and of where it goes."""

    name = "trig-flow"
    path: ClassVar[Path] = TrigonometricPath()

    def jump(self, network: Network, y: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """cos(τ − τ') y − sin(τ − τ') F."""
        here, there = HALF_PI * (1 - s), HALF_PI * (1 - u)
        turn = expand_time(here - there, y)
        return turn.cos() * y - turn.sin() * network(y, here, there)

    def velocity(self, network: Network, y: Tensor, s: Tensor) -> Tensor:
        """−(π/2) F(y, τ, τ)."""
        here = HALF_PI * (1 - s)
        return -HALF_PI * network(y, here, here)
