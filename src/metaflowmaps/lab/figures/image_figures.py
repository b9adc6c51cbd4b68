"""Figures of image models. Pure functions of arrays; pictures are (n, C, H, W) in [-1, 1] with C = 1 or 3.

Small pictures are drawn as they are: one flat square a pixel (nearest neighbour), values outside [-1, 1] (a noisy
state's) clipped. A method has the colour and marker of steering_figures.STYLE everywhere.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.lab.figures import picture_layout as layout
from metaflowmaps.lab.figures.picture_layout import BAND, CELL, GAP, INK, Array
from metaflowmaps.lab.figures.plots import MAP, QUIET

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMALL, LARGE = 48, 1.1  # pixels a side, and inches of what has more
Curve = tuple[Sequence[float], Sequence[float], Sequence[float] | None]


# -- grids of pictures ---------------------------------------------------------------------------------


def image_grid(
    rows: Sequence[Tensor],
    row_titles: Sequence[str],
    column_titles: Sequence[str] | None = None,
    title: str = "",
    note: str = "",
) -> "Figure":
    """Rows of n pictures each, (n, C, H, W); an empty column title lets the one before it span this column too."""
    pictures = [layout.shown(row, f"row {name!r}") for row, name in zip(rows, row_titles, strict=False)]
    columns = len(pictures[0]) if pictures else 0
    if not pictures or len(rows) != len(row_titles) or any(len(row) != columns for row in pictures):
        raise InputError(
            f"image_grid needs rows of equal length and a title each, got rows of {[len(r) for r in rows]} "
            f"pictures and {len(row_titles)} titles"
        )
    if column_titles is not None and len(column_titles) != columns:
        raise InputError(f"image_grid needs {columns} column titles, one a column (or ''), got {len(column_titles)}")
    spans = layout.spans(column_titles or [])
    starts = np.array([0.22 * sum(0 < start <= column for start, _, _ in spans) for column in range(columns)])
    left = np.arange(columns) * (1 + GAP) + starts
    figure, axis = layout.canvas(
        (left[-1] + 1, len(rows) * (1 + GAP)),
        left=max(layout.width_of(name, 11) for name in row_titles) + 0.12,
        top=layout.height_of(title, 13) + max([layout.height_of(text, 11) for _, _, text in spans], default=0.0),
        bottom=layout.height_of(note, 10),
        least=max(layout.width_of(title, 13), layout.width_of(note, 10)),
        cell=cell_of(pictures[0]),
    )
    for i, (row, name) in enumerate(zip(pictures, row_titles, strict=True)):
        y = i * (1 + GAP)
        axis.text(-0.12, y + 0.5, name, ha="right", va="center", fontsize=11)
        for x, picture in zip(left, row, strict=True):
            layout.tile(axis, picture, float(x), y)
    for start, stop, text in spans:
        layout.heading(axis, float(left[start]), float(left[stop - 1]) + 1, text)
    layout.words(figure, title, note)
    return figure


def cell_of(pictures: Array, small: float = CELL) -> float:
    """Inches a picture (n, H, W, 3): those of many pixels are larger, and their content still to be seen."""
    return small if max(pictures.shape[1:3]) <= SMALL else LARGE


def story(
    noisy: Sequence[tuple[Tensor, Tensor, Tensor]],
    steered: Sequence[tuple[str, Tensor, str]],
    title: str,
    headings: tuple[str, str, str, str] = (
        "image",
        "noisy",
        "plausible images, one network call each",
        "steered, and what one sample cost",
    ),
) -> "Figure":
    """Left, rows of (image (C,H,W), noisy (C,H,W), draws (n,C,H,W)); right, of (label, samples (m,C,H,W), cost)."""
    if not noisy or not steered:
        raise InputError("story needs at least one (image, noisy, draws) and one (label, samples, caption)")
    left = []
    for k, row in enumerate(noisy):
        parts = (row[0][None], row[1][None], row[2])
        left.append([layout.shown(part, f"{headings[i]} of row {k}") for i, part in enumerate(parts)])
    right = [(label, layout.shown(samples, label), caption) for label, samples, caption in steered]
    draws_at, step = 2 * (1 + GAP) + 0.75, 1 + GAP
    end = draws_at + max(len(draws) for _, _, draws in left) * step - GAP
    labels = max(layout.width_of(label, 11) for label, _, _ in right) / CELL
    samples_at = end + 1.5 + labels
    stop = samples_at + max(len(samples) for _, samples, _ in right) * step - GAP
    height = max(len(left), len(right)) * step
    figure, axis = layout.canvas(
        (stop, height),
        right=max(layout.width_of(caption, 10.5) for _, _, caption in right) + 0.15,
        top=layout.height_of(title, 14) + layout.height_of("x", 11),
        least=layout.width_of(title, 14),
    )
    for i, (image, state, draws) in enumerate(left):
        y = i * step
        layout.tile(axis, image[0], 0.0, y)
        layout.tile(axis, state[0], step, y)
        layout.arrow(axis, 2 * step + 0.02, draws_at - 0.12, y + 0.5)
        for j, picture in enumerate(draws):
            layout.tile(axis, picture, draws_at + j * step, y)
    for i, (label, samples, caption) in enumerate(right):
        y = i * step
        axis.text(samples_at - 0.15, y + 0.5, label, ha="right", va="center", fontsize=11)
        for j, picture in enumerate(samples):
            layout.tile(axis, picture, samples_at + j * step, y)
        axis.text(stop + 0.15, y + 0.5, caption, ha="left", va="center", fontsize=10.5, color="#3b3f45")
    layout.arrow(axis, end + 0.25, end + 1.1, min(len(left), len(right)) * step / 2, 2.6)
    for start, until, text in zip((0.0, step, draws_at, samples_at), (1.0, step + 1, end, stop), headings, strict=True):
        layout.heading(axis, start, until, text)
    layout.words(figure, title, "")
    return figure


def spread_maps(
    samplers: Mapping[str, tuple[Tensor, Tensor]],
    column_titles: Sequence[str],
    title: str,
    noisy: Tensor | None = None,
    note: str = "",
) -> "Figure":
    """Per-pixel (mean, standard deviation) of posterior draws, (n, C, H, W) each, two rows a sampler, with colour bars.

    One scale of deviations for all; of several channels, the root mean square. ``noisy`` (n, C, H, W) goes on top.
    """
    from matplotlib import colormaps

    means = {name: layout.shown(mean, f"mean of {name!r}") for name, (mean, _) in samplers.items()}
    checked = {name: layout.checked(std, f"deviation of {name!r}") for name, (_, std) in samplers.items()}
    spreads = {name: std.square().mean(1).sqrt() for name, std in checked.items()}
    lengths = {len(mean) for mean in means.values()} | {len(std) for std in spreads.values()}
    lengths |= set() if noisy is None else {len(noisy)}
    if lengths != {len(column_titles)}:
        raise InputError(
            f"spread_maps needs {len(column_titles)} pictures a row, one a column title, got {lengths or 0}"
        )
    largest = max(float(std.max()) for std in spreads.values()) or 1.0
    heat = colormaps["viridis"]
    rows: list[tuple[str, Array]] = [] if noisy is None else [("noisy state", layout.shown(noisy, "noisy"))]
    for name, mean in means.items():
        rows.append((f"{name}: mean", mean))
        rows.append((f"{name}: std", heat(spreads[name].numpy() / largest)[..., :3]))
    size = (len(column_titles) * (1 + GAP), len(rows) * (1 + GAP))
    figure, axis = layout.canvas(
        size,
        left=max(layout.width_of(name, 11) for name, _ in rows) + 0.12,
        right=1.35,
        top=layout.height_of(title, 13) + layout.height_of("x", 11),
        bottom=layout.height_of(note, 10),
        least=max(layout.width_of(title, 13), layout.width_of(note, 10)),
        cell=cell_of(rows[0][1], 0.8),
    )
    for i, (name, pictures) in enumerate(rows):
        axis.text(-0.12, i * (1 + GAP) + 0.5, name, ha="right", va="center", fontsize=11)
        for j, picture in enumerate(pictures):
            layout.tile(axis, picture, j * (1 + GAP), i * (1 + GAP))
    for j, text in enumerate(column_titles):
        axis.text(j * (1 + GAP) + 0.5, -0.1, text, ha="center", va="bottom", fontsize=11)
    half = size[1] / 2
    layout.colour_bar(axis, size[0], 0.15, half - 0.45, "gray", (-1.0, 1.0), "pixel value")
    layout.colour_bar(axis, size[0], half + 0.15, half - 0.45, "viridis", (0.0, largest), "standard deviation")
    layout.words(figure, title, note)
    return figure


# -- curves and bars -----------------------------------------------------------------------------------


class Panel(TypedDict):
    """One plot of ``frontier``: methods as name -> [(λ, x, y), …], and points of reference (x, y)."""

    title: str
    xlabel: str
    ylabel: str
    methods: Mapping[str, Sequence[tuple[float, float, float]]]
    base: NotRequired[tuple[float, float]]
    target: NotRequired[tuple[float, float]]
    xscale: NotRequired[str]


def frontier(panels: Sequence[Panel], title: str = "") -> "Figure":
    """Reward against diversity or distance, one line a method along which λ grows; some points carry their λ."""
    if not panels:
        raise InputError("frontier needs at least one panel")
    figure, axes = layout.plots(len(panels), 4.6, 3.9, title)
    looks = layout.looks_of(name for panel in panels for name in panel["methods"])
    marks: dict[str, tuple[str, dict[str, Any]]] = {
        "base": ("base model", {"marker": "s", "color": QUIET, "markersize": 9, "markerfacecolor": "white"}),
        "target": ("data of the target", {"marker": "*", "color": INK, "markersize": 15, "markerfacecolor": "#ffe28a"}),
    }
    for axis, panel in zip(axes, panels, strict=True):
        for name, points in panel["methods"].items():
            if any(len(point) != 3 for point in points):
                raise InputError(f"frontier: points of {name!r} must be (λ, x, y)")
            shown = [point for point in points if all(map(math.isfinite, point[1:]))]
            axis.plot([x for _, x, _ in shown], [y for _, _, y in shown], label=name, **looks[name])
        for key, (label, look) in marks.items():
            if key in panel:
                axis.plot(*panel[key], linestyle="", label=label, markeredgewidth=1.4, zorder=4, **look)  # type: ignore[literal-required]
        axis.set(xlabel=panel["xlabel"], ylabel=panel["ylabel"], xscale=panel.get("xscale", "linear"))
        axis.set_title(panel["title"], fontsize=12)
        axis.margins(0.1)
    layout.legend(figure, axes, [*looks, *(label for label, _ in marks.values())], "numbers along a line: λ, γ or N")
    figure.canvas.draw()  # places are final from here on, and labels can be put where nothing lies
    for axis, panel in zip(axes, panels, strict=True):
        layout.strengths(axis, panel["methods"], looks)
    return figure


def against_calls(
    curves: Mapping[str, Curve] | Mapping[str, Mapping[str, Curve]],
    xlabel: str,
    ylabel: str,
    floor: float | Mapping[str, float] | None = None,
    title: str = "",
    floor_label: str = "floor: two exact samples",
    yscale: str = "log",
) -> "Figure":
    """Lines (x, y, ± or None) against a log axis. Mappings of mappings are one panel each (title -> curves)."""
    many = any(isinstance(curve, Mapping) for curve in curves.values())
    panels = cast("Mapping[str, Mapping[str, Curve]]", curves if many else {"": curves})
    if not curves:
        raise InputError("against_calls needs at least one curve")
    looks = layout.looks_of(name for panel in panels.values() for name in panel)
    figure, axes = layout.plots(len(panels), 3.9, 3.3, title, sharex=True, sharey=True)
    for axis, (name, panel) in zip(axes, panels.items(), strict=True):
        for label, (x, y, error) in panel.items():
            if len(x) != len(y) or (error is not None and len(error) != len(y)):
                raise InputError(f"against_calls: {label!r} has {len(x)} x, {len(y)} y and other numbers of errors")
            axis.errorbar(x, y, yerr=error, label=label, capsize=3, **looks[label])
        level = floor.get(name) if isinstance(floor, Mapping) else floor
        if level is not None:
            axis.axhline(level, color=QUIET, linestyle=(0, (5, 3)), linewidth=1.3, label=floor_label)
        axis.set(xscale="log", yscale=yscale, xlabel=xlabel, ylabel=ylabel)
        axis.set_title(name, fontsize=12)
    ticks = layout.thinned(sorted({float(v) for panel in panels.values() for x, _, _ in panel.values() for v in x}))
    for axis in axes:
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.xaxis.minorticks_off()
    layout.rim(axes)
    layout.legend(figure, axes, [*dict.fromkeys(name for panel in panels.values() for name in panel), floor_label])
    return figure


def frequencies(
    methods: Mapping[str, Sequence[float]], target: Sequence[float], title: str = "", xlabel: str = "class"
) -> "Figure":
    """Class frequencies of each method (bars) over the target's (black marks), L2 distance in each panel's title."""
    if not methods or any(len(values) != len(target) for values in methods.values()):
        raise InputError(f"frequencies needs {len(target)} classes a method, as the target has")
    figure, axes = layout.plots(len(methods), 2.9, 2.2, title, most=4, sharex=True, sharey=True)
    looks = layout.looks_of(methods)
    places = range(len(target))
    highest = max(max(values) for values in (target, *methods.values()))
    for axis, (name, values) in zip(axes, methods.items(), strict=True):
        error = math.dist(values, target)
        axis.bar(places, values, width=0.7, color=looks[name]["color"], alpha=0.75)
        axis.hlines(
            target, [p - 0.45 for p in places], [p + 0.45 for p in places], color=INK, linewidth=2.2, label="target w"
        )
        axis.set_title(f"{name}\nL2 {error:.3f}", fontsize=11)
        axis.set(xlabel=xlabel, ylabel="frequency", ylim=(0, 1.08 * highest))
        axis.set_xticks(places, [str(p) for p in places])
    layout.rim(axes, most=4)
    layout.legend(figure, axes, ["target w"])
    return figure


def rank_histograms(hists: Mapping[str, Any], num_draws: int, title: str = "") -> "Figure":
    """Counts of the truth's rank among its draws (0 … num_draws), or of equal bins of ranks, one panel a name.

    Calibrated draws put every rank at 1/(num_draws + 1); the band holds a bar with 95 % probability, each on its own.
    """
    if not hists:
        raise InputError("rank_histograms needs at least one histogram")
    figure, axes = layout.plots(len(hists), 3.5, 2.7, title, sharex=True)
    for axis, (name, counts) in zip(axes, hists.items(), strict=True):
        counts = np.asarray(counts, dtype=np.float64).reshape(-1)
        bins = len(counts)
        if bins < 2 or (num_draws + 1) % bins or (counts < 0).any() or (counts % 1).any() or not counts.any():
            raise InputError(
                f"rank_histograms: {name!r} has {bins} bins; give whole counts in a number of bins that divides "
                f"num_draws + 1 = {num_draws + 1}"
            )
        total, wide = int(counts.sum()), (num_draws + 1) // bins
        low, high = binomial_band(total, 1 / bins)
        inside = float(((counts >= low) & (counts <= high)).mean())
        centres = np.arange(bins) * wide + (wide - 1) / 2
        axis.axhspan(low, high, color=BAND, linewidth=0, label="95 % of a uniform bar")
        axis.bar(centres, counts, width=0.86 * wide, color=MAP, alpha=0.75)
        axis.axhline(total / bins, color=INK, linewidth=1.4, label="uniform: calibrated")
        axis.set(xlabel=f"rank among {num_draws} draws", ylabel="count", xlim=(-0.5, num_draws + 0.5))
        axis.set_title(f"{name}: {100 * inside:.0f} % of bars inside", fontsize=11)
    layout.rim(axes, ticks_left=True)
    layout.legend(figure, axes, ["uniform: calibrated", "95 % of a uniform bar"])
    return figure


def binomial_band(n: int, p: float, level: float = 0.95) -> tuple[int, int]:
    """The smallest and largest k with P(K < k) and P(K > k) at most (1 - level)/2 for K ~ Binomial(n, p)."""
    k = torch.arange(n + 1, dtype=torch.float64)
    log_choose = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    cdf = (log_choose + k * math.log(p) + (n - k) * math.log1p(-p)).exp().cumsum(0)
    tail = (1 - level) / 2
    return int((cdf <= tail).sum()), int((cdf < 1 - tail).sum())
