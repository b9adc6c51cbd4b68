"""Where small pictures go: in one axes whose unit is the side of a picture, y downwards.

Margins are measured from the text they hold: every distance is known before anything is drawn, and nothing can overlap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.lab.figures.plots import LABEL_POINTS, QUIET, TEXT, TITLE_POINTS, new_figure, width_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALL_PIXELS = 48  # a side: pictures with more are drawn larger
CELL_INCHES, LARGE_CELL_INCHES = 0.62, 1.1  # a picture
GAP = 0.06  # between two pictures, in sides of one
STEP = 1 + GAP  # from one picture to the next
RIM_INCHES = 0.12
NOTE_POINTS = 10
SHARP_PIXELS = 128  # a side: a picture with more would lose some of them, drawn with the nearest
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


def cell_of(pictures: Array, small: float = CELL_INCHES) -> float:
    """Inches of one of (n, H, W, 3): pictures of many pixels are larger, and their content still to be seen."""
    return small if max(pictures.shape[1:3]) <= SMALL_PIXELS else LARGE_CELL_INCHES


@dataclass(frozen=True)
class Words:
    """What stands around a grid: a title above the line of headings, a note below, and room at its sides."""

    title: str
    note: str = ""
    heading: str = ""  # the tallest
    left: float = 0.0  # inches
    right: float = 0.0  # inches
    title_points: float = TITLE_POINTS


def canvas(size: tuple[float, float], words: Words, cell: float = CELL_INCHES) -> tuple["Figure", "Axes"]:
    """One axes of size pictures, each so many inches, with the words around it."""
    top = height_of(words.title, words.title_points) + height_of(words.heading, LABEL_POINTS)
    bottom = height_of(words.note, NOTE_POINTS)
    wide, high = size[0] * cell, size[1] * cell
    least = max(width_of(words.title, words.title_points), width_of(words.note, NOTE_POINTS))
    spare = max(0.0, least - (words.left + wide + words.right)) / 2
    width = wide + words.left + words.right + 2 * (RIM_INCHES + spare)
    height = high + top + bottom + 2 * RIM_INCHES
    figure, axes = new_figure(width, height)
    figure.set_layout_engine("none")
    axis: Axes = axes[0, 0]
    corner = ((RIM_INCHES + spare + words.left) / width, (RIM_INCHES + bottom) / height)
    axis.set_position((*corner, wide / width, high / height))
    axis.set_axis_off()
    axis.set(xlim=(0, size[0]), ylim=(size[1], 0))
    axis.set_autoscale_on(False)
    figure.text(0.5, 1 - 0.1 / height, words.title, ha="center", va="top", fontsize=words.title_points)
    figure.text(0.5, 0.1 / height, words.note, ha="center", va="bottom", fontsize=NOTE_POINTS, color=TEXT)
    return figure, axis


def height_of(text: str, points: float) -> float:
    """Inches of the lines with what goes around them; nothing for no text."""
    return (1.25 * points * len(text.splitlines()) + 9) / 72 if text else 0.0


def room_for(names: Sequence[str]) -> float:
    """Inches that the names of rows take."""
    return max(width_of(name, LABEL_POINTS) for name in names) + 0.12


def row(axis: "Axes", pictures: Array, places: Sequence[float], y: float, name: str = "") -> None:
    """Pictures at these places, the row's name to the left of the first."""
    axis.text(places[0] - 0.12, y + 0.5, name, ha="right", va="center", fontsize=LABEL_POINTS)
    for picture, x in zip(pictures, places, strict=True):
        _tile(axis, picture, x, y)


def _tile(axis: "Axes", picture: Array, x: float, y: float) -> None:
    """One picture at (x, y), its side along the longer edge 1, with a hairline around it."""
    from matplotlib.patches import Rectangle

    pixels = max(picture.shape[:2])
    high, wide = (side / pixels for side in picture.shape[:2])
    x, y = x + (1 - wide) / 2, y + (1 - high) / 2
    how = "nearest" if pixels <= SHARP_PIXELS else "antialiased"
    axis.imshow(picture, extent=(x, x + wide, y + high, y), interpolation=how, aspect="auto", clip_on=False)
    axis.add_patch(Rectangle((x, y), wide, high, fill=False, edgecolor="#9aa0a6", linewidth=0.5, clip_on=False))


def heading(axis: "Axes", start: float, stop: float, text: str, y: float = 0.0) -> None:
    """A title over columns start … stop of the rows from y down; over several, with a rule."""
    if stop - start > 1.5:
        axis.plot([start, stop], [y - 0.1, y - 0.1], color=QUIET, linewidth=1.0, clip_on=False)
    axis.text((start + stop) / 2, y - 0.2, text, ha="center", va="bottom", fontsize=LABEL_POINTS)


def arrow(axis: "Axes", start: float, stop: float, y: float, weight: float = 1.6) -> None:
    """An arrow along a row, from start to stop."""
    look = {"arrowstyle": "-|>", "color": QUIET, "linewidth": weight, "mutation_scale": 9 * weight}
    axis.annotate("", (stop, y), (start, y), arrowprops=look, annotation_clip=False)


@dataclass(frozen=True)
class Scale:
    """What a colour bar says: its colours, their limits, and what they measure."""

    colours: str
    limits: tuple[float, float]
    label: str


def colour_bar(axis: "Axes", corner: tuple[float, float], height: float, scale: Scale) -> None:
    """A colour bar to the right of the grid; corner and height in pictures."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    figure, (x, y) = cast("Figure", axis.figure), corner
    corners = axis.transData.transform(((x + 0.15, y + height), (x + 0.35, y)))
    (left, low), (right, high) = figure.transFigure.inverted().transform(corners)
    inset = figure.add_axes((left, low, right - left, high - low))
    bar = figure.colorbar(ScalarMappable(Normalize(*scale.limits), scale.colours), cax=inset)
    bar.set_label(scale.label, fontsize=10.5)
    bar.ax.tick_params(labelsize=NOTE_POINTS)
    bar.locator = MaxNLocator(4, steps=[1, 2, 5, 10])
    bar.update_ticks()
