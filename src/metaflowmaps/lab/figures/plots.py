"""Figures. Each function takes results and returns a matplotlib figure; labels and units are on the picture itself."""

import io
import json
from collections.abc import Sequence
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

MAP, GLASS, CONTEXT, QUIET = "#1f6feb", "#d84a10", "#c2185b", "#7a7f87"


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple["Figure", Any]:
    """A figure that needs no display and no global state, with its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=10, colors="#3b3f45")
    return figure, axes


def save(figure: "Figure", path: Path) -> Path:
    """Write a PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(path, picture.getvalue(), durable=False)
    return path


def posterior_panels(
    path: InterpolantPath,
    law: GaussianMixture | None,
    times: Sequence[float],
    contexts: Sequence[Tensor],
    draws: Sequence[Tensor],
    title: str,
) -> "Figure":
    """One panel a time: exact contours of the posterior (where the law is known), draws of the map, the noisy state."""
    columns = min(3, len(times))
    rows = -(-len(times) // columns)
    figure, axes = new_figure(3.5 * columns, 3.5 * rows + 0.7, rows, columns)
    figure.suptitle(title, fontsize=13)
    for axis, t, x_t, points in zip(axes.flat, times, contexts, draws, strict=False):
        axis.scatter(*points[:1000, :2].T.tolist(), s=5, color=MAP, alpha=0.35, linewidths=0, label="draws of the map")
        axis.plot(
            *x_t[:2].tolist(),
            "X",
            color=CONTEXT,
            markersize=11,
            markeredgecolor="white",
            label="noisy state $x_t$",
        )
        zoom = _frame(axis, points)
        axis.set_title(f"t = {t:g}{zoom}", fontsize=12)
        if law is not None:
            mass_contours(axis, law.posterior(path, t, x_t[None].double()))
    for axis in axes[-1]:
        axis.set_xlabel("$x^{(1)}$", fontsize=11)
    for axis in axes[:, 0]:
        axis.set_ylabel("$x^{(2)}$", fontsize=11)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if law is not None:
        from matplotlib.lines import Line2D

        handles, labels = (
            [*handles, Line2D([], [], color="#22262b", linewidth=1.2)],
            [*labels, "exact posterior (contours)"],
        )
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return figure


def _frame(axis: "Axes", points: Tensor) -> str:
    """Fix the limits: the common frame, or a closer one where the draws would be a speck in it. Returns what to say."""
    centre, spread = points[:, :2].mean(0), float(points[:, :2].std(0).max())
    zoomed = spread < 0.5
    (x, y), half = (centre.tolist(), max(6 * spread, 0.05)) if zoomed else ((0.0, 0.0), 6.2)
    axis.set(xlim=(x - half, x + half), ylim=(y - half, y + half), aspect="equal")
    return f"  (zoomed, {2 * half:.2g} wide)" if zoomed else ""


def mass_contours(axis: "Axes", law: GaussianMixture, points: int = 161) -> None:
    """Contours that hold 50, 90 and 99 % of a law's mass within the axis's limits."""
    lines = [torch.linspace(*limits, points, dtype=torch.float64) for limits in (axis.get_xlim(), axis.get_ylim())]
    density = law.log_prob(torch.cartesian_prod(*lines)).exp()
    ordered = density.sort(descending=True).values
    mass = ordered.cumsum(0) / ordered.sum()
    levels = sorted({float(ordered[int((mass < q).sum())]) for q in (0.5, 0.9, 0.99)})
    axis.contour(*lines, density.reshape(points, points).T, levels=levels, colors="#22262b", linewidths=1.0)


def error_against_calls(metrics: dict[str, Any]) -> "Figure":
    """Relative SW2 against network calls a draw: map and GLASS, one panel a time, the floor dashed."""
    times = list(metrics["relative_sw2"])
    columns = min(3, len(times))
    rows = -(-len(times) // columns)
    figure, axes = new_figure(3.5 * columns, 2.9 * rows + 0.7, rows, columns, sharex=True, sharey=True)
    figure.suptitle("Error of posterior draws against network calls", fontsize=13)
    for axis, t in zip(axes.flat, times, strict=False):
        for family, color, marker in (("map", MAP, "o"), ("glass", GLASS, "s")):
            names = sorted(
                (n for n in metrics["by_sampler"] if n.startswith(f"{family}-")),
                key=lambda n: int(n.split("-")[1]),
            )
            calls = [metrics["network_calls_per_draw"][n] for n in names]
            error = [metrics["by_sampler"][n][t] for n in names]
            label = "meta flow map" if family == "map" else "GLASS, same drift"
            axis.plot(calls, error, marker=marker, color=color, markersize=5, linewidth=1.8, label=label)
        axis.axhline(metrics["floor"][t], color=QUIET, linestyle="--", linewidth=1.3, label="floor: two exact samples")
        axis.set(xscale="log", yscale="log")
        axis.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        axis.minorticks_off()
        axis.set_title(f"t = {float(t):g}", fontsize=12)
        axis.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    for axis in axes[-1]:
        axis.set_xlabel("network calls per draw", fontsize=11)
    for axis in axes[:, 0]:
        axis.set_ylabel("sliced W2 / posterior std", fontsize=11)
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=11,
    )
    return figure


def training_curve(metrics_file: Path) -> "Figure":
    """Mean loss of each logging window against steps."""
    records = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    figure, axes = new_figure(6.4, 3.4)
    axis = axes[0, 0]
    axis.plot([r["step"] for r in records], [r["loss"] for r in records], color=MAP, linewidth=1.5)
    above = all(r["loss"] > 0 for r in records)  # a loss that is minus a reward may be anything
    axis.set(yscale="log" if above else "linear", xlabel="training step", ylabel="loss, mean since last record")
    axis.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    axis.set_title("Training", fontsize=13)
    return figure


def scatter(points: Tensor, title: str, contours: GaussianMixture | None = None) -> "Figure":
    """Two-dimensional samples."""
    figure, axes = new_figure(4.6, 4.6)
    axis = axes[0, 0]
    axis.scatter(*points[:4000, :2].T.tolist(), s=4, color=MAP, alpha=0.4, linewidths=0)
    axis.set(xlabel="$x^{(1)}$", ylabel="$x^{(2)}$", aspect="equal")
    if contours is not None:
        axis.set(xlim=(-6.2, 6.2), ylim=(-6.2, 6.2))
        mass_contours(axis, contours, 241)
    figure.suptitle(title, fontsize=11)
    return figure
