"""An average velocity whose two times come as one argument (B, 2), as flow-map adapters of FLUX have them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from metaflowmaps._shapes import positive
from metaflowmaps.interop.flow_maps.convention import Network
from metaflowmaps.interop.flow_maps.mean_flow import AverageVelocity


@dataclass(frozen=True)
class StackedTimes(AverageVelocity):
    """``network(z, timestep=[t, r])``.

    Args:
        scale: multiplies both times.
        argument: the name of the argument.
        end_first: (r, t) in place of (t, r).
    """

    name = "stacked-times"

    scale: float = 1.0
    argument: str = "timestep"
    end_first: bool = False

    def __post_init__(self) -> None:
        positive(self.scale, "scale")

    def average(self, network: Network, y: Tensor, t: Tensor, r: Tensor) -> Tensor:
        times = (r, t) if self.end_first else (t, r)
        return network(y, **{self.argument: self.scale * torch.stack(times, 1)})
