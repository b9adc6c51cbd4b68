"""Figures of steering: samples over exact contours, error against cost, what happens along the trajectory."""

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor

from metaflowmaps.lab.figures.plots import MAP, QUIET, mass_contours, new_figure
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.steering import BestOfN, Method, Unsteered
from metaflowmaps.work.choices import choices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# what is no steering method has its look here; any two looks stay apart for red- and green-blind eyes too
SAMPLERS = {"map": (MAP, "o"), "ode": ("#46107f", "D")}


def looks() -> dict[str, tuple[str, str]]:
    """Colour and marker of every sampler and method by name, the same in every figure; those on the map come first."""
    methods = sorted(choices(Method).items(), key=lambda item: not item[0].startswith("mfm"))
    return {**{name: method.look for name, method in methods}, **SAMPLERS}


def base_method(name: str) -> tuple[str | None, bool]:
    """The name of :func:`looks` that a name is or is a variant of (None: of none), and whether it is that name."""
    known = re.sub(r"^best-of-\d+$", BestOfN.name, name.lower())
    base = max((key for key in looks() if known.startswith(key)), key=len, default=None)
    return base, known == base


def style(name: str) -> dict[str, Any]:
    """Colour and marker of a method; variants of it are dashed and hollow. best-of-1000 is best-of-n at n = 1000."""
    base, own = base_method(name)
    color, marker = looks()[base or Unsteered.name]
    return {
        "color": color,
        "marker": marker,
        "markersize": 7 if own else 6,
        "linewidth": 1.8 if own else 1.2,
        "linestyle": "-" if own else "--",
        "markerfacecolor": color if own else "white",
    }


def panels(tilted: GaussianMixture, metrics: dict[str, Any], samples: dict[str, Tensor]) -> "Figure":
    """One panel a method: its samples over contours of the exact tilted law, with error and cost."""
    columns = min(4, len(samples))
    rows = -(-len(samples) // columns)
    figure, axes = new_figure(3.2 * columns, 3.45 * rows + 0.6, rows, columns, sharex=True, sharey=True)
    figure.suptitle("Steered samples over the exact tilted law (contours hold 50, 90, 99 %)", fontsize=13)
    for axis, (cell, points) in zip(axes.flat, samples.items(), strict=False):
        name, key = cell.rsplit(".", 1)
        figures = metrics["methods"][name][key]
        axis.set(xlim=(-5.6, 5.6), ylim=(-5.6, 5.6), aspect="equal")
        mass_contours(axis, tilted, 241)
        axis.scatter(*points[:1500, :2].T.tolist(), s=4, color=MAP, alpha=0.45, linewidths=0)
        draws = "" if key == "0" else f", N = {key}"
        ratio = figures["sw2"] / figures["floor_sw2"]
        shown = f"{ratio:.2f}" if ratio < 100 else "> 100"
        axis.set_title(f"{name}{draws}\nSW2 {shown} × floor, {_short(figures['cost']['nfe'])} NFE", fontsize=10.5)
    for axis in axes.flat[len(samples) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("$x^{(1)}$", fontsize=11)
    for axis in axes[:, 0]:
        axis.set_ylabel("$x^{(2)}$", fontsize=11)
    return figure


def error_against_cost(metrics: dict[str, Any]) -> "Figure":
    """SW2 and mode-weight error as ratios to their floors at that many samples, against NFE and time a sample."""
    figure, axes = new_figure(11.5, 8.2, 2, 2, sharey="row")
    figure.suptitle("Error against cost per returned sample; dashed line: exact samples", fontsize=13)
    for name, by_draws in metrics["methods"].items():
        cells = [by_draws[key] for key in sorted(by_draws, key=int)]
        nfe = [max(cell["cost"]["nfe"], 1) for cell in cells]
        seconds = [1000 * cell["cost"]["seconds"] / (cell["samples"] * cell["seeds"]) for cell in cells]
        sw2 = [min(cell["sw2"] / cell["floor_sw2"], CEILING) for cell in cells]
        mode = [max(cell["mode_l1"] / cell["floor_mode_l1"], 0.3) for cell in cells]
        for axis, x, y in zip(axes.flat, (nfe, seconds, nfe, seconds), (sw2, sw2, mode, mode), strict=True):
            axis.plot(x, y, label=name, **style(name))
    for axis in axes.flat:
        axis.set(xscale="log", yscale="log")
        axis.grid(axis="y", color="#e3e5e8", linewidth=0.8)
        axis.axhline(1.0, color=QUIET, linestyle="--", linewidth=1.3)
    axes[0, 0].set_ylim(0.7, 1.3 * CEILING)
    axes[0, 0].set_ylabel(f"sliced W2 / floor (at most {CEILING} shown)", fontsize=11)
    axes[1, 0].set_ylabel("error of mode weights (L1) / floor", fontsize=11)
    axes[1, 0].set_xlabel("NFE per sample", fontsize=11)
    axes[1, 1].set_xlabel("milliseconds per sample", fontsize=11)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=11
    )
    return figure


CEILING = 100


def reward_against_cost(metrics: dict[str, Any]) -> "Figure":
    """Mean reward against NFE, reward calls and time per returned sample; the tilted law's own mean reward dashed."""
    figure, axes = new_figure(13.0, 4.9, 1, 3, sharey=True)
    figure.suptitle(
        "Mean reward against cost per returned sample; dashed line: the exact tilted law, beyond it over-optimisation",
        fontsize=13,
    )
    for name, by_draws in metrics["methods"].items():
        cells = [by_draws[key] for key in sorted(by_draws, key=int)]
        totals = [cell["samples"] * cell["seeds"] for cell in cells]
        gap = [max(-cell["reward"], 1e-3) for cell in cells]
        for axis, x in zip(
            axes[0],
            (
                [max(cell["cost"]["nfe"], 1) for cell in cells],
                [cell["cost"]["reward_calls"] / n for cell, n in zip(cells, totals, strict=True)],
                [1000 * cell["cost"]["seconds"] / n for cell, n in zip(cells, totals, strict=True)],
            ),
            strict=True,
        ):
            shown = [(a, min(b, 1e3)) for a, b in zip(x, gap, strict=True) if a > 0]
            if shown:
                axis.plot(*zip(*shown, strict=True), label=name, **style(name))
    for axis in axes[0]:
        axis.axhline(-metrics["exact_reward"], color=QUIET, linestyle="--", linewidth=1.3)
        axis.set(xscale="log", yscale="log")
        axis.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    axes[0, 0].invert_yaxis()
    axes[0, 0].set_ylabel("− mean reward (log scale, reversed)", fontsize=11)
    for axis, label in zip(axes[0], ("NFE", "reward calls", "milliseconds"), strict=True):
        axis.set_xlabel(f"{label} per sample", fontsize=11)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=10.5
    )
    return figure


def trajectory(curves: dict[str, dict[str, list[float]]]) -> "Figure":
    """ESS of the draws and norm of the value's gradient against time, one line a method."""
    figure, axes = new_figure(11.0, 4.4, 1, 2)
    figure.suptitle("Along the trajectory, mean over samples", fontsize=13)
    for name, kept in curves.items():
        for axis, what in zip(axes[0], ("ess", "gradient_norm"), strict=True):
            if kept.get(what):
                look = {**style(name), "markevery": max(1, len(kept["time"]) // 8), "markersize": 5}
                shown = [(t, v) for t, v in zip(kept["time"], kept[what], strict=True) if v > 0]  # ∇V is 0 at t = 0
                axis.plot(*zip(*(shown or [(0.0, float("nan"))]), strict=True), label=name, **look)
    axes[0, 0].set(xlabel="time t (0: noise, 1: data)", ylabel="effective number of draws (ESS)", ylim=(0, None))
    axes[0, 1].set(xlabel="time t (0: noise, 1: data)", ylabel="norm of the estimated ∇V")
    if any(norm > 0 for kept in curves.values() for norm in kept.get("gradient_norm", ())):
        axes[0, 1].set_yscale("log")
        low, high = axes[0, 1].get_ylim()
        # at t = 0 it vanishes; a method that explodes leaves the frame
        axes[0, 1].set_ylim(max(low, 1e-2), max(min(high, 1e4), 1e-1))
    for axis in axes.flat:
        axis.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    handles, labels = axes[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=10.5)
    return figure


def value_error(metrics: dict[str, Any]) -> "Figure":
    """RMSE and correlation of V̂ against network calls a draw, one panel a time."""
    times = list(next(iter(metrics["by_sampler"].values())))
    figure, axes = new_figure(3.1 * len(times), 6.6, 2, len(times), sharex=True, sharey="row")
    figure.suptitle(f"Value from {metrics['num_draws']} draws against the exact value", fontsize=13)
    for column, t in zip(axes.T, times, strict=True):
        for family, label in (("map", "meta flow map"), ("glass", "GLASS, same drift")):
            names = sorted(
                (n for n in metrics["by_sampler"] if n.startswith(f"{family}-")), key=lambda n: int(n.split("-")[1])
            )
            calls = [metrics["network_calls_per_draw"][n] for n in names]
            look = style("map" if family == "map" else "glass")
            for axis, what in zip(column, ("rmse", "pearson"), strict=True):
                axis.plot(calls, [metrics["by_sampler"][n][t][what] for n in names], label=label, **look)
        for axis, what in zip(column, ("rmse", "pearson"), strict=True):
            exact = metrics["by_sampler"]["exact"][t][what]
            axis.axhline(exact, color=QUIET, linestyle="--", linewidth=1.3, label="exact draws")
            axis.set_xscale("log", base=2)
            axis.grid(axis="y", color="#e3e5e8", linewidth=0.8)
        column[0].set(yscale="log")
        column[0].set_title(f"t = {float(t):g}", fontsize=12)
        column[1].set_xlabel("network calls per draw", fontsize=11)
    axes[0, 0].set_ylabel("RMSE of the value", fontsize=11)
    axes[1, 0].set_ylabel("Pearson r", fontsize=11)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=11
    )
    return figure


def _short(value: float) -> str:
    return f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.3g}"
