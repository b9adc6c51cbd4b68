"""Figures of general contexts: the fan of a forecast."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metaflowmaps.context import Context
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.figures.plots import CONTEXT, INK, LABEL_POINTS, MAP, new_figure
from metaflowmaps.random import stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWS = 400
BANDS = ((0.05, 0.95, 0.18, "nine tenths of the draws"), (0.25, 0.75, 0.35, "half of them"))


def fan(model: MetaFlowMap, context: Context, asked: Tensor, truth: tuple[Tensor, Tensor] | None = None) -> "Figure":
    """Bands of one-step draws over time, given what one row of a context holds; the first coordinate of vectors.

    Args:
        model: a map of general contexts.
        context: one row.
        asked: (T,) times that are asked for.
        truth: times and first coordinates, (K,) each, where they are known.
    """
    figure, axes = new_figure(7.2, 3.4)
    axis = axes[0, 0]
    with torch.no_grad():
        many = context.repeated(len(asked)).at(asked.to(context.times))
        draws = model.draw(many, DRAWS, generator=stream(0, "fan"))[..., 0]
    for low, high, alpha, label in BANDS:
        edges = torch.quantile(draws, draws.new_tensor([low, high]), dim=0)
        axis.fill_between(asked, edges[0], edges[1], color=MAP, alpha=alpha, linewidth=0, label=label)
    axis.plot(asked, draws.median(0).values, color=MAP, linewidth=1.4, label="median")
    if truth is not None:
        axis.plot(*truth, color=INK, linewidth=1.0, label="what came")
    seen = context.mask[0]
    axis.plot(context.times[0, seen], context.values[0, seen, 0], "o", color=CONTEXT, markersize=5, label="observed")
    axis.set_xlabel("time", fontsize=LABEL_POINTS)
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.18))
    return figure
