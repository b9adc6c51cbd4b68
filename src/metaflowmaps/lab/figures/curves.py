"""Curves and bars of results: anything against network calls, reward against distance, shares of classes, ranks.

A method has the colour and marker of :mod:`looks` everywhere.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from metaflowmaps.errors import InputError
from metaflowmaps.lab.figures.looks import Style, looks_of
from metaflowmaps.lab.figures.plots import INK, LABEL_POINTS, MAP, Panels, exact_line, width_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

Curve = list[tuple[float, float]]  # (x, y)
BAND = "#cfd4da"
MOST_TICKS = 7  # of a log axis
STRENGTH_POINTS = 9  # letters of the numbers along a line


def by_calls(
    cells: Mapping[str, float], titles: Mapping[str, str], calls: Mapping[str, float] | None = None
) -> dict[str, Curve]:
    """Curves of samplers that are called kind-steps, by the kind's title: values against calls, which steps may be.

    Args:
        cells: values by sampler.
        titles: of the kinds that are shown.
        calls: by sampler; None: the steps in its name.
    """
    curves: dict[str, Curve] = {title: [] for title in titles.values()}
    for name, value in cells.items():
        kind, _, steps = name.rpartition("-")
        if kind in titles:
            curves[titles[kind]].append((calls[name] if calls else int(steps), value))
    return {title: sorted(curve) for title, curve in curves.items() if curve}


@dataclass(frozen=True)
class Floor:
    """A dashed line that nothing is expected to pass: its level by panel, and what it is called."""

    levels: Mapping[str, float]
    label: str = "floor: two exact samples"


def against_calls(
    panels: Mapping[str, Mapping[str, Curve]],
    xlabel: str,
    ylabel: str,
    floor: Floor | None = None,
    title: str = "",
    yscale: str = "log",
) -> "Figure":
    """Curves against a log axis of calls, one panel a title."""
    if not any(panels.values()):
        raise InputError("against_calls needs at least one curve")
    looks = looks_of(name for curves in panels.values() for name in curves)
    drawn = Panels.new(len(panels), (3.9, 3.3), title, sharex=True, sharey=True)
    for axis, (name, curves) in zip(drawn.axes, panels.items(), strict=True):
        for label, curve in curves.items():
            axis.plot(*zip(*curve, strict=True), label=label, **looks[label])
        if floor is not None and name in floor.levels:
            exact_line(axis, floor.levels[name], floor.label)
        axis.set(xscale="log", yscale=yscale, xlabel=xlabel, ylabel=ylabel)
        axis.set_title(name, fontsize=12)
    calls_axis(drawn.axes, {x for curves in panels.values() for curve in curves.values() for x, _ in curve})
    drawn.rim()
    drawn.legend()
    return drawn.figure


def calls_axis(axes: "Sequence[Axes]", calls: set[float]) -> None:
    """Ticks of a log axis at the calls themselves."""
    ticks = thinned(sorted(calls))
    for axis in axes:
        axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axis.xaxis.minorticks_off()


def thinned(values: Sequence[float]) -> list[float]:
    """Ticks of a log axis that do not run into each other."""
    kept: list[float] = []
    apart = max(1.6, (values[-1] / values[0]) ** (1 / MOST_TICKS)) if values[0] > 0 else 1.6
    for value in values:
        if not kept or value >= apart * kept[-1] * 0.999:
            kept.append(value)
    return kept


# -- reward against distance -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frontier:
    """One plot of :func:`frontier`: methods as name -> [(λ, x, y), …], and the data that are aimed at as (x, y)."""

    title: str
    xlabel: str
    ylabel: str
    methods: Mapping[str, Sequence[tuple[float, float, float]]]
    target: tuple[float, float] | None = None


def frontier(panels: Sequence[Frontier], title: str = "") -> "Figure":
    """Reward against diversity or distance, one line a method along which λ grows; some points carry their λ."""
    if not panels or any(len(point) != 3 for panel in panels for line in panel.methods.values() for point in line):
        raise InputError("frontier needs at least one panel, and points (λ, x, y)")
    drawn = Panels.new(len(panels), (4.6, 3.9), title)
    looks = looks_of(name for panel in panels for name in panel.methods)
    star = {"marker": "*", "color": INK, "markersize": 15, "markerfacecolor": "#ffe28a", "markeredgewidth": 1.4}
    for axis, panel in zip(drawn.axes, panels, strict=True):
        for name, line in panel.methods.items():
            shown = [point[1:] for point in line if all(map(math.isfinite, point[1:]))]
            axis.plot([x for x, _ in shown], [y for _, y in shown], label=name, **looks[name])
        if panel.target is not None:
            axis.plot(*panel.target, linestyle="", label="data of the target", zorder=4, **star)  # type: ignore[arg-type]
        axis.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        axis.set_title(panel.title, fontsize=12)
        axis.margins(0.1)
    drawn.legend([*looks, "data of the target"], "numbers along a line: λ, γ or N")
    drawn.figure.canvas.draw()  # places are final from here on, and labels can be put where nothing lies
    for axis, panel in zip(drawn.axes, panels, strict=True):
        _strengths(axis, panel, looks)
    return drawn.figure


Box = tuple[float, float, float, float]  # left, low, right, high


def _strengths(axis: "Axes", panel: Frontier, looks: Mapping[str, Style]) -> None:
    """λ beside the ends and the middle of each line, wherever there is room; a label that has none is left out."""
    lines = {name: [p for p in line if all(map(math.isfinite, p[1:]))] for name, line in panel.methods.items() if line}
    ends = [(name, line[-1]) for name, line in lines.items() if len(line) > 1]
    starts = [(name, line[0]) for name, line in lines.items() if line]
    middles = [(name, line[len(line) // 2]) for name, line in lines.items() if len(line) >= 4]
    dots = axis.figure.dpi / 72  # a point
    places = [axis.transData.transform(point[1:]) for line in lines.values() for point in line]
    taken: list[Box] = [(x - 4 * dots, y - 4 * dots, x + 4 * dots, y + 4 * dots) for x, y in places]
    frame = axis.get_window_extent()
    for name, (strength, *point) in [*ends, *starts, *middles]:  # the ends of all lines first
        text, (x, y) = f"{strength:g}", axis.transData.transform(point)
        size = (72 * dots * width_of(text, STRENGTH_POINTS) + 2 * dots, 10 * dots)
        for shift in ((0, 9), (0, -9), (10, 0), (-10, 0), (9, 8), (-9, 8), (9, -8), (-9, -8)):
            box = _box_beside(x, y, size, (shift[0] * dots, shift[1] * dots))
            inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                offset = (((box[0] + box[2]) / 2 - x) / dots, ((box[1] + box[3]) / 2 - y) / dots)
                _label(axis, text, (point[0], point[1]), offset, looks[name]["color"])
                break


def _box_beside(x: float, y: float, size: tuple[float, float], shift: tuple[float, float]) -> Box:
    """The box of a text that is shifted from a point, and to the side by half its own width as well."""
    (wide, high), (dx, dy) = size, shift
    cx, cy = x + dx + math.copysign(wide / 2, dx) * bool(dx), y + dy
    return cx - wide / 2, cy - high / 2, cx + wide / 2, cy + high / 2


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _label(axis: "Axes", text: str, point: tuple[float, float], offset: tuple[float, float], color: str) -> None:
    """A small text, so many points from a point."""
    from matplotlib.patheffects import withStroke

    look = {"ha": "center", "va": "center", "fontsize": STRENGTH_POINTS, "color": color, "zorder": 5}
    label = axis.annotate(text, point, offset, textcoords="offset points", **look)  # type: ignore[arg-type]
    label.set_path_effects([withStroke(linewidth=2, foreground="white")])
    label.set_in_layout(False)


# -- bars --------------------------------------------------------------------------------------------------------------


def frequencies(methods: Mapping[str, Sequence[float]], target: Sequence[float], title: str = "") -> "Figure":
    """Class frequencies of each method (bars) over the target's (black marks), L2 distance in each panel's title."""
    if not methods or any(len(values) != len(target) for values in methods.values()):
        raise InputError(f"frequencies needs {len(target)} classes a method, as the target has")
    panels = Panels.new(len(methods), (2.9, 2.2), title, most=4, sharex=True, sharey=True)
    looks = looks_of(methods)
    places = range(len(target))
    marks = [p - 0.45 for p in places], [p + 0.45 for p in places]
    highest = max(max(values) for values in (target, *methods.values()))
    for axis, (name, values) in zip(panels.axes, methods.items(), strict=True):
        axis.bar(places, values, width=0.7, color=looks[name]["color"], alpha=0.75)
        axis.hlines(target, *marks, color=INK, linewidth=2.2, label="target w")
        axis.set_title(f"{name}\nL2 {math.dist(values, target):.3f}", fontsize=LABEL_POINTS)
        axis.set(xlabel="class", ylabel="frequency", ylim=(0, 1.08 * highest))
        axis.set_xticks(places, [str(p) for p in places])
    panels.rim()
    panels.legend()
    return panels.figure


def rank_histograms(histograms: "Mapping[str, Tensor]", num_draws: int, title: str = "") -> "Figure":
    """Counts of the truth's rank among its draws (0 … num_draws), or of equal bins of ranks, one panel a name.

    Calibrated draws put every rank at 1/(num_draws + 1); the band holds a bar with 95 % probability, each on its own.
    """
    if not histograms:
        raise InputError("rank_histograms needs at least one histogram")
    panels = Panels.new(len(histograms), (3.5, 2.7), title, sharex=True)
    for axis, (name, histogram) in zip(panels.axes, histograms.items(), strict=True):
        counts = np.asarray(histogram, dtype=np.float64).reshape(-1)
        bins = len(counts)
        if bins < 2 or (num_draws + 1) % bins or (counts < 0).any() or (counts % 1).any() or not counts.any():
            raise InputError(
                f"rank_histograms: {name!r} has {bins} bins; give whole counts in a number of bins that divides "
                f"num_draws + 1 = {num_draws + 1}"
            )
        total, wide = int(counts.sum()), (num_draws + 1) // bins
        low, high = binomial_band(total, 1 / bins)
        inside = float(((counts >= low) & (counts <= high)).mean())
        axis.axhspan(low, high, color=BAND, linewidth=0, label="95 % of a uniform bar")
        axis.bar(np.arange(bins) * wide + (wide - 1) / 2, counts, width=0.86 * wide, color=MAP, alpha=0.75)
        axis.axhline(total / bins, color=INK, linewidth=1.4, label="uniform: calibrated")
        axis.set(xlabel=f"rank among {num_draws} draws", ylabel="count", xlim=(-0.5, num_draws + 0.5))
        axis.set_title(f"{name}: {100 * inside:.0f} % of bars inside", fontsize=LABEL_POINTS)
    panels.rim(own_ticks=True)
    panels.legend(["uniform: calibrated", "95 % of a uniform bar"])
    return panels.figure


def binomial_band(n: int, p: float, level: float = 0.95) -> tuple[int, int]:
    """The smallest and largest k with P(K < k) and P(K > k) at most (1 - level)/2 for K ~ Binomial(n, p)."""
    k = torch.arange(n + 1, dtype=torch.float64)
    log_choose = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    cdf = (log_choose + k * math.log(p) + (n - k) * math.log1p(-p)).exp().cumsum(0)
    tail = (1 - level) / 2
    return int((cdf <= tail).sum()), int((cdf < 1 - tail).sum())
