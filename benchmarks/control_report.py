"""What the navigation benchmark shows: figures, tables, captions and a sentence."""

import itertools
import math
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from torch import Tensor

from benchmarks.control_estimators import GOAL, OBSTACLES, Exact
from metaflowmaps.lab.figures.plots import GLASS, MAP, QUIET, new_figure

INK, FAINT, BAND = "#22262b", "#e3e5e8", "#cfd4da"
FRAME = ((-4.2, 4.2), (-4.2, 4.2))
FAMILIES = {"mfm-ft": "MFM-FT (weighted)", "self-normalised": "self-normalised (weight 1)", "": "other objectives"}
COLOURS = {
    "mfm-ft blend": MAP, "mfm-ft gradient": "#46107f", "mfm-ft gradient-free": "#0b9b80",
    "self-normalised gradient": "#c2185b", "self-normalised gradient-free": "#e3a410",
    "self-normalised blend": "#7a4a2b",
    "adjoint-matching": GLASS, "draft": "#0d5226",
}  # fmt: skip
LINES = {"1": ":", "4": "-", "16": "--", "64": "-."}
QUARTERS = 4  # of the inner time


def _look(name: str) -> tuple[str, str]:
    """Colour by method and form, line by number of draws."""
    base, _, draws = name.rpartition(" ")
    return COLOURS.get(base if draws.isdigit() else name, INK), LINES.get(draws, "-")


def arena(exact: Exact, metrics: dict[str, Any], samples: dict[str, Tensor]) -> Figure:
    """The task, then samples of every method over the exact tilted law."""
    columns = 4  # wide enough for the titles
    rows = -(-(len(samples) + 1) // columns)
    figure, axes = new_figure(3.4 * columns, 3.6 * rows, rows, columns, sharex=True, sharey=True)
    line = torch.linspace(*FRAME[0], 241, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    base = exact.law.log_prob(grid)
    tilted = (base + exact.reward(grid)).exp()
    for axis in axes.flat:
        for x, y, radius in OBSTACLES:
            axis.add_patch(Circle((x, y), 1.5 * radius, facecolor="#d9a09b", edgecolor="none", zorder=0))
    first = axes[0, 0]
    first.contour(line, line, base.exp().reshape(241, 241).T, levels=_levels(base.exp()), colors=QUIET, linewidths=1.0)
    first.contour(line, line, tilted.reshape(241, 241).T, levels=_levels(tilted), colors=MAP, linewidths=1.4)
    first.set_title("the task", fontsize=13)
    marks = [
        Line2D([], [], color=QUIET, label="base law"),
        Line2D([], [], color=MAP, linewidth=1.6, label="tilted law"),
        Line2D([], [], color="#d9a09b", marker="o", markersize=10, linestyle="", label="obstacle"),
        Line2D([], [], color="#e0a800", marker="*", markersize=13, linestyle="", label="goal"),
    ]
    first.legend(handles=marks, loc="lower left", fontsize=10, frameon=False, ncols=2, columnspacing=0.8)
    cells = {"base": metrics["base"], **metrics["methods"]}
    for axis, (name, points) in zip(axes.flat[1:], samples.items(), strict=False):
        chosen = points[torch.linspace(0, len(points) - 1, min(2000, len(points))).long()]
        size = 4 if float(chosen.std(0).max()) > 0.1 else 40  # all in one place: still to be seen
        axis.scatter(*chosen.T.tolist(), s=size, color=_look(name)[0], alpha=0.45, linewidths=0)
        axis.contour(line, line, tilted.reshape(241, 241).T, levels=_levels(tilted), colors=INK, linewidths=0.9)
        ratio = cells[name]["ratio"]
        base_name, _, draws = name.rpartition(" ")
        who, many = (base_name, f"N = {draws}, ") if draws.isdigit() else (name, "")
        axis.set_title(f"{who}\n{many}SW2 {ratio:.{2 if ratio < 10 else 0}f} × floor", fontsize=13)
    for axis in axes.flat:
        axis.plot(*GOAL, "*", color="#e0a800", markersize=13, markeredgecolor="white", zorder=5)
        axis.set(xlim=FRAME[0], ylim=FRAME[1], aspect="equal")
    for axis in axes.flat[len(samples) + 1 :]:
        axis.set_visible(False)
    return figure


def _levels(density: Tensor) -> list[float]:
    ordered = density.sort(descending=True).values
    mass = ordered.cumsum(0) / ordered.sum()
    return sorted({float(ordered[int((mass < q).sum())]) for q in (0.5, 0.9, 0.99)})


def _short(name: str) -> str:
    base, _, draws = name.rpartition(" ")
    return f"{base}, N = {draws}" if draws.isdigit() else name


def error_against_seconds(metrics: dict[str, Any]) -> Figure:
    """Total error against processor time: one panel a family, the best of the others in grey."""
    methods = metrics["methods"]
    families = {key: [n for n in methods if _family(n) == key] for key in FAMILIES}
    families = {key: names for key, names in families.items() if names}
    figure, axes = new_figure(5.0 * len(families), 5.2, 1, len(families), sharex=True, sharey=True)
    best = min(methods, key=lambda n: methods[n]["total"][-1])
    for axis, (key, names) in zip(axes[0], families.items(), strict=True):
        axis.plot(methods[best]["seconds"], methods[best]["total"], color=BAND, linewidth=6, solid_capstyle="round")
        for name in names:
            colour, line = _look(name)
            cell = methods[name]
            label = _short(name).removeprefix(f"{key} ")
            axis.plot(cell["seconds"], cell["total"], line, color=colour, marker="o", markersize=4.5, linewidth=2.0,
                      label=label)  # fmt: skip
        axis.axhline(metrics["base"]["total"], color=QUIET, linestyle="--", linewidth=1.2)
        # what is four times worse than the base leaves the frame
        axis.set(xscale="log", yscale="log", ylim=(0.6 * methods[best]["total"][-1], 4 * metrics["base"]["total"]))
        axis.set_title(FAMILIES[key], fontsize=13.5)
        axis.set_xlabel("seconds on one core", fontsize=12.5)
        axis.grid(color=FAINT, linewidth=0.8)
        axis.tick_params(labelsize=11.5)
        axis.legend(fontsize=11, frameon=False, loc="lower left")
    axes[0, 0].set_ylabel("mean squared error of the drift (F)", fontsize=12.5)
    figure.suptitle(f"Grey: the best, {_short(best)}. Dashed: the base, not tuned", fontsize=12.5)
    return figure


def bias_and_variance(metrics: dict[str, Any]) -> Figure:
    """Squared bias and variance at the end, side by side on a logarithmic scale."""
    methods = metrics["methods"]
    names = sorted(methods, key=lambda n: -methods[n]["total"][-1])
    figure, axes = new_figure(9.0, 0.44 * len(names) + 1.5)
    axis = axes[0, 0]
    parts = (("bias_squared", "bias²", "#c2185b", "o"), ("variance", "variance", MAP, "D"))
    edge = min(cell["variance"][-1] for cell in methods.values()) / 3
    for i, name in enumerate(names):
        values = [max(methods[name][what][-1], edge) for what, *_ in parts]
        axis.plot(values, [i, i], color=BAND, linewidth=3, zorder=1)
        for value, (_, _, colour, marker) in zip(values, parts, strict=True):
            face = "white" if value == edge else colour
            axis.plot(value, i, marker, color=colour, markerfacecolor=face, markersize=10, clip_on=False, zorder=3)
    axis.set(xscale="log", xlim=(edge, None))
    axis.set_yticks(range(len(names)), [_short(n) for n in names], fontsize=12.5)
    axis.tick_params(axis="x", labelsize=12)
    axis.set_xlabel("mean over states, in F", fontsize=12.5)
    axis.grid(color=FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    handles = [Line2D([], [], color=c, marker=m, markersize=10, linestyle="", label=n) for _, n, c, m in parts]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False, fontsize=13)
    return figure


def _family(name: str) -> str:
    return next(key for key in FAMILIES if name.startswith(key))


# -- words ------------------------------------------------------------------------------------------------------------


def reached(seconds: list[float], total: list[float], wanted: float) -> float | None:
    """When the error first falls to ``wanted``, straight lines between looks in logarithms; None if it never does."""
    if total[0] <= wanted:
        return seconds[0]
    for (s, e), (t, f) in itertools.pairwise(zip(seconds, total, strict=True)):
        if f <= wanted:
            share = math.log(e / wanted) / math.log(e / f)
            return s * (t / s) ** share
    return None


LEVELS = (1.2, 2.0, 5.0)


def words(config: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """Tables, captions and a sentence for the report."""
    methods = metrics["methods"]
    best = min(cell["total"][-1] for cell in methods.values())
    head = ["method", "bias²", "variance", "total", "of the tilt", "bias² of D", "variance of D",
            *(f"s to {level:g} × best" for level in LEVELS), "steps", "SW2 / floor", "reward"]  # fmt: skip
    start = metrics["base"]["total"]
    rows: list[list[Any]] = []
    for name, cell in methods.items():
        when = [reached(cell["seconds"], cell["total"], level * best) for level in LEVELS]
        rows.append(
            [name, cell["bias_squared"][-1], cell["variance"][-1], cell["total"][-1],
             f"{100 * cell['total'][-1] / start:.2g} %", cell["shift"]["bias_squared"], cell["shift"]["variance"],
             *("not reached" if s is None else s for s in when), cell["steps"][-1], cell["ratio"], cell["reward"]]
        )  # fmt: skip
    rows.sort(key=lambda row: row[3])
    base, exact = metrics["base"], metrics["exact"]
    rows.append(
        ["base, not tuned", None, None, start, "100 %", None, None, *[None] * len(LEVELS), None, base["ratio"],
         base["reward"]]
    )  # fmt: skip
    rows.append(
        ["exact", 0.0, 0.0, 0.0, "0 %", 0.0, 0.0, *[None] * len(LEVELS), None, exact["ratio"], exact["mean_reward"]]
    )
    tables = {f"Drifts after {config['seconds']:g} s a run": {"head": head, "rows": rows}}
    edges = [config["last"] * i / QUARTERS for i in range(QUARTERS + 1)]
    tables["Bias² / variance by inner time of the state (0: noise, 1: data)"] = {
        "head": ["method", *(f"{low:.2f} to {high:.2f}" for low, high in itertools.pairwise(edges))],
        "rows": [
            [row[0], *(f"{part['bias_squared']:.2g} / {part['variance']:.2g}" for part in methods[row[0]]["by_time"])]
            for row in rows[: len(methods)]
        ],
    }
    rows = []
    for form, by_draws in metrics["targets"].items():
        for n, cell in by_draws.items():
            weighted, plain = cell["weighted"], cell["plain"]
            rows.append(
                [form, int(n), weighted["bias_squared"], weighted["error"], weighted["variance"],
                 plain["bias_squared"], plain["error"], plain["variance"]]
            )  # fmt: skip
    head = ["form", "draws", "weighted: bias²", "±", "variance", "weight 1: bias²", "±", "variance"]
    tables["Targets at the base, without training"] = {"head": head, "rows": rows}
    return {"tables": tables, "captions": _captions(config), "summary": _summary(config, metrics)}


def _captions(config: dict[str, Any]) -> dict[str, str]:
    return {
        "arena.png": f"Samples at the end of the runs, all {config['seeds']} seeds together, over the exact tilted law "
        "(contours hold 50, 90 and 99 % of it). The star is the goal; discs are obstacles, drawn to one and a half of "
        f"their radii. By {config['ode_steps']} steps of the tuned drift's ODE; draft in one step, its own use. Ratios "
        "of exact samples scatter by .07 about 1.",
        "error.png": f"Mean squared error of the averaged model's drift, over states and {config['seeds']} runs, "
        "against processor time; what is made before the first step counts too.",
        "parts.png": "What the error at the end is made of. Hollow: an estimate at the left edge or below, which is "
        "nothing that can be told from 0.",
    }


def _summary(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    methods = metrics["methods"]
    ranked = sorted(methods, key=lambda name: methods[name]["total"][-1])
    first, other = ranked[0], next((n for n in ranked if not n.startswith("mfm-ft")), ranked[-1])

    def said(name: str) -> str:
        cell = methods[name]
        return f"{name} (bias² {cell['bias_squared'][-1]:.2g}, variance {cell['variance'][-1]:.2g})"

    return (
        f"After {config['seconds']:g} s on one core the least error is that of {said(first)}; the best that is not "
        f"MFM-FT is {said(other)}. The base alone is at {metrics['base']['total']:.2g}, its own drift off "
        f"by {metrics['base']['error']:.1g}. Estimates of bias² are unbiased: they can be negative, and scatter by "
        "about a quarter of the variance."
    )
