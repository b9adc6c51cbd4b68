"""Grids of pictures, (n, C, H, W) in [-1, 1] with C = 1 or 3. Pure functions of arrays.

Small pictures are drawn as they are: one flat square a pixel (nearest neighbour), values outside [-1, 1] (a noisy
state's) clipped.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.lab.figures import picture_layout as layout
from metaflowmaps.lab.figures.picture_layout import CELL_INCHES, GAP, STEP, Words
from metaflowmaps.lab.figures.plots import LABEL_POINTS, TEXT, width_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPAN_GAP = 0.22  # before a column with a title of its own, in pictures
CAPTION_POINTS = 10.5


def image_grid(
    rows: Sequence[Tensor], row_titles: Sequence[str], column_titles: Sequence[str] | None = None, title: str = ""
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
    titled = [i for i, text in enumerate(column_titles or ()) if text]
    places = np.array([STEP * i + SPAN_GAP * sum(0 < start <= i for start in titled) for i in range(columns)])
    tallest = max((column_titles or ("",)), key=lambda text: len(text.splitlines()))
    words = Words(title, heading=tallest, left=layout.room_for(row_titles))
    figure, axis = layout.canvas((places[-1] + 1, len(rows) * STEP), words, layout.cell_of(pictures[0]))
    for i, (row, name) in enumerate(zip(pictures, row_titles, strict=True)):
        layout.row(axis, row, places.tolist(), i * STEP, name)
    for start, stop in zip(titled, [*titled, columns][1:], strict=True):
        layout.heading(axis, float(places[start]), float(places[stop - 1]) + 1, (column_titles or ())[start])
    return figure


class Noisy(NamedTuple):
    """An image (C, H, W), its noisy version, and draws (n, C, H, W) of what it may be."""

    image: Tensor
    state: Tensor
    draws: Tensor


class SteeredRow(NamedTuple):
    """What a method is called, its samples (m, C, H, W), and what one of them cost."""

    label: str
    samples: Tensor
    cost: str


HEADINGS = ("image", "noisy", "plausible images, one network call each", "steered, and what one sample cost")


def story(noisy: Sequence[Noisy], steered: Sequence[SteeredRow], title: str) -> "Figure":
    """Rows of noisy images and their draws at the left, of steered samples and their costs at the right."""
    if not noisy or not steered:
        raise InputError("story needs at least one (image, noisy, draws) and one (label, samples, cost)")
    draws_at = 2 * STEP + 0.75
    draws_end = draws_at + max(len(row.draws) for row in noisy) * STEP - GAP
    samples_at = draws_end + 1.5 + max(width_of(row.label, LABEL_POINTS) for row in steered) / CELL_INCHES
    end = samples_at + max(len(row.samples) for row in steered) * STEP - GAP
    costs = max(width_of(row.cost, CAPTION_POINTS) for row in steered) + 0.15
    words = Words(title, heading="x", right=costs, title_points=14)
    figure, axis = layout.canvas((end, max(len(noisy), len(steered)) * STEP), words)
    for i, row in enumerate(noisy):
        pictures = layout.shown(torch.cat([row.image[None], row.state[None], row.draws]), f"row {i}")
        layout.row(axis, pictures, [0.0, STEP, *(draws_at + j * STEP for j in range(len(row.draws)))], i * STEP)
        layout.arrow(axis, 2 * STEP + 0.02, draws_at - 0.12, i * STEP + 0.5)
    for i, (label, samples, cost) in enumerate(steered):
        pictures = layout.shown(samples, label)
        layout.row(axis, pictures, [samples_at + j * STEP for j in range(len(samples))], i * STEP, label)
        axis.text(end + 0.15, i * STEP + 0.5, cost, ha="left", va="center", fontsize=CAPTION_POINTS, color=TEXT)
    layout.arrow(axis, draws_end + 0.25, draws_end + 1.1, min(len(noisy), len(steered)) * STEP / 2, 2.6)
    columns = ((0.0, 1.0), (STEP, STEP + 1), (draws_at, draws_end), (samples_at, end))
    for (start, stop), text in zip(columns, HEADINGS, strict=True):
        layout.heading(axis, start, stop, text)
    return figure


def spread_maps(
    samplers: Mapping[str, tuple[Tensor, Tensor]], column_titles: Sequence[str], title: str, noisy: Tensor
) -> "Figure":
    """Noisy states, and per-pixel (mean, standard deviation) of draws, (n, C, H, W) each, with colour bars.

    One scale of deviations for all; of several channels, the root mean square.
    """
    from matplotlib import colormaps

    spreads = {
        name: layout.checked(std, f"std of {name!r}").square().mean(1).sqrt() for name, (_, std) in samplers.items()
    }
    largest = max(float(std.max()) for std in spreads.values()) or 1.0
    rows = {"noisy state": layout.shown(noisy, "noisy")}
    for name, (mean, _) in samplers.items():
        rows[f"{name}: mean"] = layout.shown(mean, f"mean of {name!r}")
        rows[f"{name}: std"] = colormaps["viridis"](spreads[name].numpy() / largest)[..., :3]
    lengths = {len(pictures) for pictures in rows.values()}
    if lengths != {len(column_titles)}:
        raise InputError(f"spread_maps needs {len(column_titles)} pictures a row, one a column title, got {lengths}")
    places = [i * STEP for i in range(len(column_titles))]
    size = (len(places) * STEP, len(rows) * STEP)
    words = Words(title, heading="x", left=layout.room_for([*rows]), right=1.35)
    figure, axis = layout.canvas(size, words, layout.cell_of(rows["noisy state"], 0.8))
    for i, (name, pictures) in enumerate(rows.items()):
        layout.row(axis, pictures, places, i * STEP, name)
    for x, text in zip(places, column_titles, strict=True):
        layout.heading(axis, x, x + 1, text)
    half = size[1] / 2
    for top, scale in (
        (0.15, layout.Scale("gray", (-1.0, 1.0), "pixel value")),
        (half + 0.15, layout.Scale("viridis", (0.0, largest), "standard deviation")),
    ):
        layout.colour_bar(axis, (size[0], top), half - 0.45, scale)
    return figure
