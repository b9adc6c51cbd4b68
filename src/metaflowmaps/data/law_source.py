"""A Gaussian mixture as a source of data."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from metaflowmaps.data.data_source import DataSource, SampleSource
from metaflowmaps.laws.labelled import LabelledLaw
from metaflowmaps.laws.mixture import GaussianMixture


class Mixture(DataSource):
    """A Gaussian mixture, its components labelled with classes or not."""

    name: ClassVar[str] = "mixture"

    means: list[Annotated[list[float], Field(min_length=1)]] = Field(min_length=1)
    covariances: Any = 1.0
    weights: list[float] | None = None
    labels: list[Annotated[int, Field(ge=0)]] | None = None

    @model_validator(mode="after")
    def _possible(self) -> "Mixture":
        if self.labels is not None and len(self.labels) != len(self.means):
            raise ValueError(f"labels needs one class a component: {len(self.means)} of them")
        if self.labels is not None and set(self.labels) != set(range(max(self.labels) + 1)):
            raise ValueError("labels must be 0, 1, … without gaps: the number after the last is the null class")
        return self

    def law(self) -> GaussianMixture:
        """The mixture itself."""
        return GaussianMixture(self.means, self.covariances, self.weights)

    def samples(self) -> SampleSource:
        """The mixture, with labels where its components have them."""
        return self.law() if self.labels is None else LabelledLaw(self.law(), self.labels)

    @property
    def classes(self) -> int:
        """As many as there are labels."""
        return len(set(self.labels or ()))
