r"""MeanFlow: the average velocity of an interval, noise at t = 1.

``z_t = (1 − t) x_1 + t ε``, and u(z_t, r, t) is the mean of dz/dt over [r, t], r <= t: ``z_r = z_t − (t − r) u``. In
our time, from s = 1 − t to s' = 1 − r, that is ``X_{s,s'}(x) = x − (s' − s) u(x, 1 − s', 1 − s)``, and the drift is
``−u(x, 1 − s, 1 − s)``.
"""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from metaflowmaps._shapes import expand_time, positive
from metaflowmaps.errors import check_one_of
from metaflowmaps.interop.flow_maps.convention import FlowMapConvention, Network

ORDERS = ("rt", "tr", "th", "ht")


@dataclass(frozen=True)
class AverageVelocity(FlowMapConvention):
    """What all of average velocity share; how its two times are passed is each one's own."""

    @abstractmethod
    def average(self, network: Network, y: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """u(y, r, t), the network's."""

    def jump(self, network: Network, y: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """y − (u − s) u(y, 1 − u, 1 − s)."""
        return y - expand_time(u - s, y) * self.average(network, y, 1 - s, 1 - u)

    def velocity(self, network: Network, y: Tensor, s: Tensor) -> Tensor:
        """−u(y, t, t)."""
        return -self.average(network, y, 1 - s, 1 - s)


@dataclass(frozen=True)
class MeanFlow(AverageVelocity):
    """``network(z, r, t)``.

    Args:
        order: of the times after z: "rt", "tr", or with h = t − r in place of r "th" (the first code's) or "ht".
        scale: multiplies all of them.
    """

    name = "mean-flow"
    arguments = frozenset({"r", "t"})

    order: str = "rt"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_one_of("order", self.order, ORDERS)
        positive(self.scale, "scale")

    def average(self, network: Network, y: Tensor, t: Tensor, r: Tensor) -> Tensor:
        times = {"r": r, "t": t, "h": t - r}
        return network(y, *(self.scale * times[name] for name in self.order))
