"""What every plot stands on: figures without global state, panels over one legend, whole PNGs; and points of the plane.

A function takes results and returns a matplotlib figure; labels and units are on the picture itself.
"""

import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaflowmaps._files import write_whole
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.path import Path as InterpolantPath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP, GLASS, CONTEXT = "#1f6feb", "#d84a10", "#c2185b"
INK, TEXT, QUIET, FAINT = "#22262b", "#3b3f45", "#7a7f87", "#e3e5e8"
TITLE_POINTS, LABEL_POINTS, TICK_POINTS = 13, 11, 10
DOTS_PER_INCH = 130
LEAST_WIDTH_INCHES = 5.6  # of panels: a legend has to fit under them
LEGEND_LINE_INCHES = 0.23
FRAME = 6.2  # half the side of the plane that is shown


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple["Figure", Any]:
    """A figure of so many inches that needs no display and no global state, with its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from metaflowmaps._figure import ShownFigure

    figure = ShownFigure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=TICK_POINTS, colors=TEXT)
    return figure, axes


def save(figure: "Figure", path: Path) -> Path:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue(), durable=False)
    return path


def width_of(text: str, points: float) -> float:
    """Inches that the longest line takes."""
    from matplotlib.textpath import TextPath

    lines = [line for line in text.splitlines() if line.strip()]
    return max((TextPath((0, 0), line, size=points).get_extents().width for line in lines), default=0.0) / 72


@dataclass(frozen=True)
class Panels:
    """Plots of equal size in rows, under one title and over one legend."""

    figure: "Figure"
    axes: "list[Axes]"
    columns: int

    @classmethod
    def new(cls, count: int, size: tuple[float, float], title: str = "", most: int = 3, **sharing: Any) -> "Panels":
        """So many panels of so many inches each, in rows of at most ``most``."""
        columns = min(most, count)
        rows = -(-count // columns)
        width, height = max(size[0] * columns, LEAST_WIDTH_INCHES), size[1] * rows + (0.4 if title else 0)
        figure, axes = new_figure(width, height, rows, columns, **sharing)
        if title:
            figure.suptitle(title, fontsize=TITLE_POINTS)
        for axis in axes.flat:
            axis.grid(axis="y", color=FAINT, linewidth=0.8)
            axis.set_axisbelow(True)
            axis.xaxis.label.set_fontsize(LABEL_POINTS)
            axis.yaxis.label.set_fontsize(LABEL_POINTS)
        for axis in axes.flat[count:]:
            axis.set_visible(False)
        return cls(figure, list(axes.flat[:count]), columns)

    def rim(self, own_ticks: bool = False) -> None:
        """Labels at the left, and under the lowest panel of each column, alone; ticks too, unless each has its own."""
        for i, axis in enumerate(self.axes):
            lowest, first = i + self.columns >= len(self.axes), i % self.columns == 0
            axis.tick_params(labelbottom=lowest or own_ticks, labelleft=first or own_ticks)
            axis.xaxis.label.set_visible(lowest)
            axis.yaxis.label.set_visible(first)

    def legend(self, order: Iterable[str] = (), note: str = "") -> None:
        """One legend for all panels, below them, in this order or as drawn; the figure grows by what it takes."""
        from matplotlib.lines import Line2D

        found: dict[str, Any] = {}
        for axis in self.axes:
            found.update(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        entries = {label: found[label] for label in order if label in found} or found
        if note:
            entries[note] = Line2D([], [], linestyle="")
        wide, high = self.figure.get_size_inches()
        longest = max(width_of(label, LABEL_POINTS) for label in entries)
        columns = max(1, min(len(entries), int(wide / (longest + 0.75))))
        self.figure.set_size_inches(wide, high + 0.15 + LEGEND_LINE_INCHES * math.ceil(len(entries) / columns))
        made = self.figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=LABEL_POINTS,
        )
        for handle in made.legend_handles:
            if handle is not None:
                handle.set_alpha(1)


def exact_line(axis: "Axes", level: float, label: str | None = None) -> None:
    """The dashed line of what is exact, or of what nothing is expected to pass."""
    axis.axhline(level, color=QUIET, linestyle="--", linewidth=1.3, label=label)


# -- points of the plane -----------------------------------------------------------------------------------------------


def plane(count: int, size: tuple[float, float], title: str, most: int = 3, **sharing: Any) -> Panels:
    """Panels of so many inches, with the coordinates' names, of which both have one scale."""
    panels = Panels.new(count, size, title, most, **sharing)
    for axis in panels.axes:
        axis.grid(visible=False)
        axis.set(xlabel="$x^{(1)}$", ylabel="$x^{(2)}$", aspect="equal")
    return panels


def points(axis: "Axes", x: Tensor, most: int, label: str | None = None) -> None:
    """The first samples, as dots."""
    axis.scatter(x[:most, 0].tolist(), x[:most, 1].tolist(), s=4, color=MAP, alpha=0.4, linewidths=0, label=label)


def posterior_panels(
    path: InterpolantPath,
    law: GaussianMixture | None,
    times: Sequence[float],
    contexts: Sequence[Tensor],
    draws: Sequence[Tensor],
    title: str,
) -> "Figure":
    """One panel a time: exact contours of the posterior (where the law is known), draws of the map, the noisy state."""
    panels = plane(len(times), (3.5, 3.5), title)
    for axis, t, x_t, drawn in zip(panels.axes, times, contexts, draws, strict=True):
        points(axis, drawn, 1000, "draws of the map")
        axis.plot(
            *x_t[:2].tolist(), "X", color=CONTEXT, markersize=11, markeredgecolor="white", label="noisy state $x_t$"
        )
        axis.set_title(f"t = {t:g}{_zoom(axis, drawn)}", fontsize=12)
        if law is not None:
            mass_contours(axis, law.posterior(path, t, x_t[None].double()))
            axis.plot([], [], color=INK, linewidth=1.2, label="exact posterior (contours)")
    panels.rim(own_ticks=True)
    panels.legend()
    return panels.figure


def _zoom(axis: "Axes", x: Tensor) -> str:
    """Fix the limits: the common frame, or a closer one where the draws would be a speck in it. Returns what to say."""
    centre, spread = x[:, :2].mean(0), float(x[:, :2].std(0).max())
    zoomed = spread < 0.5
    (x_1, x_2), half = (centre.tolist(), max(6 * spread, 0.05)) if zoomed else ((0.0, 0.0), FRAME)
    axis.set(xlim=(x_1 - half, x_1 + half), ylim=(x_2 - half, x_2 + half))
    return f"  (zoomed, {2 * half:.2g} wide)" if zoomed else ""


def mass_contours(axis: "Axes", law: GaussianMixture, side: int = 161) -> None:
    """Contours that hold 50, 90 and 99 % of a law's mass within the axis's limits, on so many points a side."""
    lines = [torch.linspace(*limits, side, dtype=torch.float64) for limits in (axis.get_xlim(), axis.get_ylim())]
    density = law.log_prob(torch.cartesian_prod(*lines)).exp()
    ordered = density.sort(descending=True).values
    mass = ordered.cumsum(0) / ordered.sum()
    levels = sorted({float(ordered[int((mass < q).sum())]) for q in (0.5, 0.9, 0.99)})
    axis.contour(*lines, density.reshape(side, side).T, levels=levels, colors=INK, linewidths=1.0)


def scatter(x: Tensor, title: str, law: GaussianMixture | None = None) -> "Figure":
    """Two-dimensional samples, over contours of a law."""
    figure, axes = new_figure(4.6, 4.6)
    axis = axes[0, 0]
    points(axis, x, 4000)
    axis.set(xlabel="$x^{(1)}$", ylabel="$x^{(2)}$", aspect="equal")
    if law is not None:
        axis.set(xlim=(-FRAME, FRAME), ylim=(-FRAME, FRAME))
        mass_contours(axis, law, 241)
    figure.suptitle(title, fontsize=LABEL_POINTS)
    return figure


def training_curve(metrics_file: Path) -> "Figure":
    """Mean loss of each logging window against steps."""
    records = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    panels = Panels.new(1, (6.4, 3.4), "Training")
    (axis,) = panels.axes
    axis.plot([r["step"] for r in records], [r["loss"] for r in records], color=MAP, linewidth=1.5)
    above = all(r["loss"] > 0 for r in records)  # a loss that is minus a reward may be anything
    axis.set(yscale="log" if above else "linear", xlabel="training step", ylabel="loss, mean since last record")
    return panels.figure
