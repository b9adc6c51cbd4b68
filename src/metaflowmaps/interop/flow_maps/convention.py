"""What a convention of flow maps is: which path its states are on, and how a network's answer moves them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from metaflowmaps.path import LinearPath, Path
from metaflowmaps.work.choices import Choice

Network = Callable[..., Tensor]
"""``network(y, *clocks, **clocks)``, its labels and fixed arguments bound: (B, *event), one evaluation."""


@dataclass(frozen=True)
class FlowMapConvention(Choice, ABC):
    """How a two-time network moves states; times s <= u are ours, on its ``path``: noise at 0, data at 1."""

    kind: ClassVar[str] = "convention of flow maps"
    path: ClassVar[Path] = LinearPath()
    to_data: ClassVar[bool] = False  # its jumps end at the data alone, and it has no drift
    arguments: ClassVar[frozenset[str]] = frozenset()  # of a network, by which it is told; none: not told by them

    @abstractmethod
    def jump(self, network: Network, y: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """Y_{s,u}(y), s and u (B,): (B, *event)."""

    @abstractmethod
    def velocity(self, network: Network, y: Tensor, s: Tensor) -> Tensor:
        """∂_u Y_{s,u}(y) at u = s, by our time: (B, *event)."""
