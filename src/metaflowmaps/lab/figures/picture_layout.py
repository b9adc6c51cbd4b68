"""Where things go on the figures of image_figures.py.

Grids of pictures lie in one axes whose unit is the side of a picture, y downwards, with margins measured from the text
they hold: every distance is known before anything is drawn, and nothing can overlap. Plots lie in equal panels over one
legend.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.lab.figures.plots import QUIET, new_figure
from metaflowmaps.lab.figures.steering_figures import base_method, style
from metaflowmaps.lab.figures.steering_figures import looks as known_looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, BAND = "#22262b", "#e3e5e8", "#cfd4da"
CELL, GAP = 0.62, 0.06  # inches a picture; the free strip between two, in pictures
Array = np.ndarray[Any, np.dtype[np.float64]]


def checked(x: Tensor, what: str) -> Tensor:
    """Pictures (n, C, H, W), grey or coloured; anything else is refused."""
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape:
        raise InputError(f"{what} has shape {tuple(x.shape)}: give pictures as (n, C, H, W) with C 1 or 3")
    return x.detach().double().cpu()


def shown(x: Tensor, what: str) -> Array:
    """(n, C, H, W) in [-1, 1] to (n, H, W, 3) in [0, 1]."""
    shown = ((checked(x, what) + 1) / 2).clamp(0, 1)
    return np.asarray(shown.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())


def canvas(
    size: tuple[float, float],
    left: float = 0.0,
    right: float = 0.0,
    top: float = 0.0,
    bottom: float = 0.0,
    least: float = 0.0,
    cell: float = CELL,
) -> tuple["Figure", "Axes"]:
    """One axes of size pictures with margins in inches around it; at least so many inches wide inside the rim."""
    rim = 0.12
    wide, high = size[0] * cell, size[1] * cell
    spare = max(0.0, least - (left + wide + right)) / 2
    width, height = wide + left + right + 2 * (rim + spare), high + top + bottom + 2 * rim
    figure, axes = new_figure(width, height)
    figure.set_layout_engine("none")
    axis: Axes = axes[0, 0]
    axis.set_position(((rim + spare + left) / width, (rim + bottom) / height, wide / width, high / height))
    axis.set_axis_off()
    axis.set(xlim=(0, size[0]), ylim=(size[1], 0))
    axis.set_autoscale_on(False)
    return figure, axis


def tile(axis: "Axes", picture: Array, x: float, y: float) -> None:
    """One picture at (x, y), its side along the longer edge 1, with a hairline around it."""
    from matplotlib.patches import Rectangle

    high, wide = (s / max(picture.shape[:2]) for s in picture.shape[:2])
    x, y = x + (1 - wide) / 2, y + (1 - high) / 2
    # a picture of more pixels than it is drawn with would lose some of them
    how = "nearest" if max(picture.shape[:2]) <= 128 else "antialiased"
    axis.imshow(picture, extent=(x, x + wide, y + high, y), interpolation=how, aspect="auto", clip_on=False)
    axis.add_patch(Rectangle((x, y), wide, high, fill=False, edgecolor="#9aa0a6", linewidth=0.5, clip_on=False))


def heading(axis: "Axes", start: float, stop: float, text: str) -> None:
    """A title over columns start … stop; over several, with a rule."""
    if stop - start > 1.5:
        axis.plot([start, stop], [-0.1, -0.1], color=QUIET, linewidth=1.0, clip_on=False)
    axis.text((start + stop) / 2, -0.2, text, ha="center", va="bottom", fontsize=11)


def arrow(axis: "Axes", start: float, stop: float, y: float, weight: float = 1.6) -> None:
    """An arrow along a row, from start to stop."""
    look = {"arrowstyle": "-|>", "color": QUIET, "linewidth": weight, "mutation_scale": 9 * weight}
    axis.annotate("", (stop, y), (start, y), arrowprops=look, annotation_clip=False)


def colour_bar(
    axis: "Axes", x: float, y: float, height: float, cmap: str, limits: tuple[float, float], label: str
) -> None:
    """A colour bar to the right of the grid, x and y in pictures."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure = cast("Figure", axis.figure)
    corners = axis.transData.transform(((x + 0.15, y + height), (x + 0.35, y)))
    (left, low), (right, high) = figure.transFigure.inverted().transform(corners)
    inset = figure.add_axes((left, low, right - left, high - low))
    bar = figure.colorbar(ScalarMappable(Normalize(*limits), cmap), cax=inset)
    bar.set_label(label, fontsize=10.5)
    bar.ax.tick_params(labelsize=10)
    bar.locator = _few()
    bar.update_ticks()


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4, steps=[1, 2, 5, 10])


def words(figure: "Figure", title: str, note: str) -> None:
    """A title above, and a note below it."""
    width, height = figure.get_size_inches()
    size = 14 if width_of(title, 14) < width - 0.3 else 13
    figure.text(0.5, 1 - 0.1 / height, title, ha="center", va="top", fontsize=size)
    figure.text(0.5, 0.1 / height, note, ha="center", va="bottom", fontsize=10, color="#3b3f45")


def width_of(text: str, size: float) -> float:
    """Inches that the longest line takes."""
    from matplotlib.textpath import TextPath

    return (
        max(
            (TextPath((0, 0), line, size=size).get_extents().width for line in text.splitlines() if line.strip()),
            default=0.0,
        )
        / 72
    )


def height_of(text: str, size: float) -> float:
    """Inches of the lines with what goes around them; nothing for no text."""
    return (1.25 * size * len(text.splitlines()) + 9) / 72 if text else 0.0


def spans(titles: Sequence[str]) -> list[tuple[int, int, str]]:
    """(first, after the last, title) of each run of columns."""
    starts = [i for i, text in enumerate(titles) if text]
    return [(i, j, titles[i]) for i, j in zip(starts, [*starts, len(titles)][1:], strict=True)]


def plots(
    count: int, width: float, height: float, title: str, most: int = 3, **options: Any
) -> tuple["Figure", list["Axes"]]:
    """Panels in rows of at most ``most``."""
    columns = min(most, count)
    rows = -(-count // columns)
    figure, axes = new_figure(
        max(width * columns, 5.6), height * rows + (0.4 if title else 0), rows, columns, **options
    )
    if title:
        figure.suptitle(title, fontsize=13)
    for axis in axes.flat:
        axis.grid(axis="y", color=FAINT, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.xaxis.label.set_fontsize(11)
        axis.yaxis.label.set_fontsize(11)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def rim(axes: Sequence["Axes"], most: int = 3, ticks_left: bool = False) -> None:
    """Labels of shared axes at the left and under the lowest panel of each column only (y ticks of their own stay)."""
    columns = min(most, len(axes))
    for i, axis in enumerate(axes):
        lowest, first = i + columns >= len(axes), i % columns == 0
        axis.tick_params(labelbottom=lowest, labelleft=first or ticks_left)
        axis.xaxis.label.set_visible(lowest)
        axis.yaxis.label.set_visible(first)


def looks_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A style a name, in the order of the methods: its method's; a free one where it is no method's variant."""
    wanted = list(dict.fromkeys(names))
    free = [key for key in known_looks() if key not in {base_method(name)[0] for name in wanted}]
    looks, variants = {}, dict.fromkeys(known_looks(), 0)
    for name in wanted:
        base, own = base_method(name)
        looks[name] = style(name if base is not None else free.pop(0) if free else "none")
        if base is not None and not own:
            looks[name]["linestyle"] = ("--", ":", "-.")[variants[base] % 3]
            variants[base] += 1
    order = list(known_looks())
    return dict(sorted(looks.items(), key=lambda item: order.index(base_method(item[0])[0] or "none")))


def legend(figure: "Figure", axes: Sequence["Axes"], order: Sequence[str], note: str = "") -> None:
    """One legend for all panels, below them; the figure grows by what it takes."""
    from matplotlib.lines import Line2D

    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    entries = {label: found[label] for label in order if label in found}
    if note:
        entries[note] = Line2D([], [], linestyle="")
    wide, high = figure.get_size_inches()
    columns = max(1, min(len(entries), int(wide / (max(width_of(label, 11) for label in entries) + 0.75))))
    figure.set_size_inches(wide, high + 0.15 + 0.23 * math.ceil(len(entries) / columns))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=11
    )


def strengths(axis: "Axes", methods: Mapping[str, Any], looks: Mapping[str, Any]) -> None:
    """λ beside the ends and the middle of each line, wherever there is room; a label that has none is left out."""
    from matplotlib.patheffects import withStroke

    frame, scale = axis.get_window_extent(), axis.figure.dpi / 72
    points = [axis.transData.transform((x, y)) for line in methods.values() for _, x, y in line if math.isfinite(x + y)]
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in points]
    for turn in (-1, 0, 1):  # the ends of all lines first
        for name, line in methods.items():
            at = {-1: len(line) - 1, 0: 0, 1: len(line) // 2}[turn]
            if (turn and at == 0) or (turn == 1 and len(line) < 4) or not all(map(math.isfinite, line[at][1:])):
                continue
            text, (x, y) = f"{line[at][0]:g}", axis.transData.transform(line[at][1:])
            wide, high = 72 * scale * width_of(text, 9) + 2 * scale, 10 * scale
            for dx, dy in ((0, 9), (0, -9), (10, 0), (-10, 0), (9, 8), (-9, 8), (9, -8), (-9, -8)):
                cx, cy = x + scale * dx + math.copysign(wide / 2, dx) * bool(dx), y + scale * dy
                box = (cx - wide / 2, cy - high / 2, cx + wide / 2, cy + high / 2)
                inside = frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
                if inside and not any(_overlap(box, other) for other in taken):
                    taken.append(box)
                    label = axis.annotate(
                        text,
                        line[at][1:],
                        ((cx - x) / scale, (cy - y) / scale),
                        textcoords="offset points",
                        ha="center",
                        va="center",
                        fontsize=9,
                        color=looks[name]["color"],
                        zorder=5,
                    )
                    label.set_path_effects([withStroke(linewidth=2, foreground="white")])
                    label.set_in_layout(False)
                    break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def thinned(values: Sequence[float]) -> list[float]:
    """Ticks of a log axis that do not run into each other."""
    kept: list[float] = []
    apart = max(1.6, (values[-1] / values[0]) ** (1 / 7)) if values[0] > 0 else 1.6
    for value in values:
        if not kept or value >= apart * kept[-1] * 0.999:
            kept.append(value)
    return kept
