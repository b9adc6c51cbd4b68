"""The family of data sources whose samples come with a general context."""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from metaflowmaps.data.data_source import DataSource


class Fitted(NamedTuple):
    """What a network that reads observations takes from the data."""

    nodes: Tensor  # (K,) times
    paths: Tensor  # (n, K, *event), paths at the nodes
    least: int  # observations that are trained with
    seen: Tensor | None = None  # (k, *observed) some observations, where they are of another kind than X_r


class ContextSource(DataSource):
    """Samples that come with a general context."""

    observed: ClassVar[bool] = True

    @abstractmethod
    def network_options(self) -> dict[str, Any]:
        """What the data decide of an ``observed`` network: how many observations, nodes, and of what shape."""

    @abstractmethod
    def fit(self, nodes: int) -> Fitted:
        """Paths at so many nodes, for the mean and the covariance that the network keeps."""

    @abstractmethod
    def held_out(self) -> Any:
        """What was not trained on, with ``sample_given(n, generator)``."""
