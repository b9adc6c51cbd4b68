"""AnyFlow, as diffusers has it: an average velocity by ``timestep`` and ``r_timestep``, in thousandths."""

from dataclasses import dataclass

from torch import Tensor

from metaflowmaps._shapes import positive
from metaflowmaps.interop.flow_maps.convention import Network
from metaflowmaps.interop.flow_maps.mean_flow import AverageVelocity


@dataclass(frozen=True)
class AnyFlow(AverageVelocity):
    """``network(z, timestep=1000 t, r_timestep=1000 r)``.

    Args:
        scale: multiplies both times.
    """

    name = "any-flow"
    arguments = frozenset({"timestep", "r_timestep"})

    scale: float = 1000.0

    def __post_init__(self) -> None:
        positive(self.scale, "scale")

    def average(self, network: Network, y: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return network(y, timestep=self.scale * t, r_timestep=self.scale * r)
