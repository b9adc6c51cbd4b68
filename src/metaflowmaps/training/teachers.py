"""Teachers: where an exact or a learned auxiliary drift comes from, in chart coordinates.

``teacher.at(chart, t, x_t)`` is a velocity ``(a, z) -> dz/da`` at a batch of contexts.
"""

from typing import Protocol

from torch import Tensor

from metaflowmaps.chart import Chart
from metaflowmaps.glass import Drift, glass_drift
from metaflowmaps.losses import Velocity
from metaflowmaps.mixture import GaussianMixture
from metaflowmaps.path import Path


class Teacher(Protocol):
    """A frozen source of auxiliary drifts."""

    def at(self, chart: Chart, t: Tensor, x_t: Tensor) -> Velocity:
        """The velocity (a, z) -> dz/da at contexts (t, x_t)."""
        ...


class ExactTeacher:
    """A mixture's own posterior, moved into the chart: its drift on the chart's inner path."""

    def __init__(self, path: Path, law: GaussianMixture) -> None:
        self.path, self.law = path, law

    def at(self, chart: Chart, t: Tensor, x_t: Tensor) -> Velocity:
        posterior = self.law.posterior(self.path, t, x_t)
        if isinstance(chart.shift, Tensor) and isinstance(chart.scale, Tensor):
            posterior = posterior.rescaled(chart.shift, chart.scale)
        return lambda a, z: posterior.drift(chart.inner_path, a, z)


class GlassTeacher:
    """GLASS on any drift (t, x) -> b, carried into the chart."""

    def __init__(self, path: Path, drift: Drift) -> None:
        self.path, self.drift = path, drift

    def at(self, chart: Chart, t: Tensor, x_t: Tensor) -> Velocity:
        def velocity(a: Tensor, z: Tensor) -> Tensor:
            s = chart.time_out(a).clamp(0, 1)
            x_s = chart.state_out(s, z)
            return chart.velocity_in(s, x_s, glass_drift(self.path, self.drift, s, x_s, t, x_t))

        return velocity
