"""Teachers: where an exact or a learned auxiliary drift comes from, in chart coordinates.

``teacher.at(chart, t, x_t, cond)`` is a velocity ``(a, z) -> dz/da`` at a batch of contexts. With labels y and guidance
scales w it is the guided one: the marginal drift is guided first, ``b = b_∅ + w (b_y − b_∅)``, and the auxiliary drift,
linear in it, follows (§4). A parent whose labelled drift is guided already says so by its
:class:`~metaflowmaps.guidance.GuidanceLaw`.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, expand_time
from metaflowmaps.errors import InputError
from metaflowmaps.guidance import PLAIN, GuidanceLaw, guided_drift
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.laws.processes import GaussianProcess, ProcessMixture
from metaflowmaps.losses import Velocity
from metaflowmaps.parameterization import Chart
from metaflowmaps.path import Drift, Path, glass_drift


class Teacher(Protocol):
    """A frozen source of auxiliary drifts."""

    def at(self, chart: Chart, t: Tensor, x_t: Tensor, cond: Cond = None) -> Velocity:
        """The velocity (a, z) -> dz/da at contexts (t, x_t)."""
        ...


class ExactTeacher:
    """A mixture's own posterior, moved into the chart: its drift on the chart's inner path.

    ``classes`` are the laws p(x_1 | y), for labelled mixtures.
    """

    def __init__(self, path: Path, law: GaussianMixture, classes: tuple[GaussianMixture, ...] = ()) -> None:
        self.path, self.law, self.classes = path, law, classes

    def at(self, chart: Chart, t: Tensor, x_t: Tensor, cond: Cond = None) -> Velocity:
        free = self._of(self.law, chart, t, x_t)
        label = (cond or {}).get("label")
        if label is None:
            return free
        if not self.classes:
            raise InputError("this teacher knows no classes: give law.labels")
        each = [self._of(law, chart, t, x_t) for law in self.classes]
        scale = (cond or {}).get("guidance", torch.ones_like(t))

        def guided(a: Tensor, z: Tensor) -> Tensor:
            null = free(a, z)
            stacked = torch.stack([*(velocity(a, z) for velocity in each), null])
            chosen = stacked[label, torch.arange(len(z), device=z.device)]
            return null + expand_time(scale, z) * (chosen - null)

        return guided

    def _of(self, law: GaussianMixture, chart: Chart, t: Tensor, x_t: Tensor) -> Velocity:
        return in_chart(law.posterior(self.path, t, x_t), chart)


def in_chart(posterior: GaussianMixture, chart: Chart) -> Velocity:
    """The drift of a posterior, one mixture a row, on the chart's inner path."""
    if isinstance(chart.shift, Tensor) and isinstance(chart.scale, Tensor):
        posterior = posterior.rescaled(chart.shift, chart.scale)
    return lambda a, z: posterior.drift(chart.inner_path, a, z)


class ProcessTeacher:
    """A process's own posteriors given general contexts, moved into the chart."""

    def __init__(self, path: Path, process: GaussianProcess | ProcessMixture) -> None:
        self.path, self.process = path, process

    def at(self, chart: Chart, t: Tensor, x_t: Tensor, cond: Cond = None) -> Velocity:
        return in_chart(self.process.given(cond or {}).posterior(self.path, t, x_t), chart)


class GlassTeacher:
    """GLASS on any drift (t, x) -> b, or (t, x, cond) -> b where there are conditions, carried into the chart.

    ``null_class`` None: the drift knows guidance itself and is given the whole condition. ``law`` is what it gives for
    a label.
    """

    def __init__(self, path: Path, drift: Any, null_class: int | None = 0, law: GuidanceLaw = PLAIN) -> None:
        self.path, self.drift, self.null_class, self.law = path, drift, null_class, law

    def at(self, chart: Chart, t: Tensor, x_t: Tensor, cond: Cond = None) -> Velocity:
        drift = self._conditioned(cond)

        def velocity(a: Tensor, z: Tensor) -> Tensor:
            s = chart.time_out(a).clamp(0, 1)
            x_s = chart.state_out(s, z)
            return chart.velocity_in(s, x_s, glass_drift(self.path, drift, s, x_s, t, x_t))

        return velocity

    def _conditioned(self, cond: Cond) -> Drift:
        if not cond:
            drift: Drift = self.drift
            return drift
        if self.null_class is None:
            return lambda t, x: self.drift(t, x, cond)
        return guided_drift(self.drift, cond, self.null_class, self.law)
