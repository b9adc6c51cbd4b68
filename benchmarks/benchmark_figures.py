"""Figures that a benchmark alone shows: reward against cost, sharper rewards, and when tuning pays."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metaflowmaps.lab.figures.looks import base_method, looks_of, style
from metaflowmaps.lab.figures.plots import CONTEXT, GLASS, INK, MAP, QUIET, Panels, exact_line
from metaflowmaps.lab.results import Metrics, Steering

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_RATIO, MOST_RATIO = 0.7, 100.0  # of a method's error to the floor, as far as it is drawn
LEAST_GAP, MOST_GAP = 1e-3, 1e3  # − mean reward, as far as it is drawn
LOOKS = (
    (MAP, "o", "-"), (MAP, "s", "--"), (GLASS, "D", "-"), (CONTEXT, "^", "-"), ("#2e7d32", "v", "-"),
    ("#7b4fb5", "P", "-"), ("#b8860b", "X", "-"), (QUIET, "*", "--"),
)  # fmt: skip
SHADES = ("#8ec5ff", "#4d9ef0", MAP, "#1747a0", "#0a1f4f")  # of one quantity, as a parameter shrinks
ESTIMATORS = {
    "gradient-free": ("#0fc3a0", "s", "-"),
    "gradient, GLASS 4": (MAP, "o", "--"), "gradient, GLASS 16": (MAP, "o", "-"),
    "blend": (GLASS, "^", "-"), "plug-in": ("#8c4480", "X", "-"),
}  # fmt: skip
TUNED_LOOKS = {
    name: {"color": colour, "marker": marker, "linestyle": "-.", "markersize": 8, "markerfacecolor": "white"}
    for name, colour, marker in (
        ("MFM-FT", "#2e7d32", "o"), ("MFM-FT without reward gradients", "#2e7d32", "s"),
        ("adjoint matching", "#7b4fb5", "P"), ("MFM-FT, one step", "#2e7d32", "^"), ("DRaFT, one step", "#b8860b", "X"),
    )
}  # fmt: skip
POINTS = (
    (INK, "*"), (QUIET, "h"), (MAP, "o"), ("#0fc3a0", "s"), ("#46107f", "D"), ("#5a0f4b", ">"), ("#8c4480", "X"),
    (GLASS, "v"), (GLASS, "^"), ("#2e7d32", "P"),
)  # fmt: skip
COUNTS = [10 ** (k / 4) for k in range(4, 29)]  # of samples made


def reward_against_cost(metrics: Metrics) -> "Figure":
    """Mean reward against NFE, reward calls and time per returned sample; the tilted law's own mean reward dashed."""
    steering = Steering.of(metrics)
    title = "Mean reward against cost per returned sample; dashed: the exact tilted law, beyond it over-optimisation"
    drawn = Panels.new(3, (4.3, 4.3), title, sharey=True)
    for name, cells in steering.lines():
        gaps = [min(max(-cell.reward, LEAST_GAP), MOST_GAP) for cell in cells]
        costs = (
            [max(cell.cost.nfe, 1) for cell in cells],
            [cell.cost.reward_calls / cell.total for cell in cells],
            [cell.milliseconds for cell in cells],
        )
        for axis, cost in zip(drawn.axes, costs, strict=True):
            shown = [(x, y) for x, y in zip(cost, gaps, strict=True) if x > 0]
            if shown:
                axis.plot(*zip(*shown, strict=True), label=name, **style(name))
    for axis, label in zip(drawn.axes, ("NFE", "reward calls", "milliseconds"), strict=True):
        exact_line(axis, -steering.exact_reward)
        axis.set(xscale="log", yscale="log", xlabel=f"{label} per sample", ylabel="− mean reward (log scale, reversed)")
    drawn.axes[0].invert_yaxis()
    drawn.rim()
    drawn.legend()
    return drawn.figure


def sweep(strengths: Sequence[float], curves: Mapping[str, Sequence[float | None]]) -> "Figure":
    """Distance to the exact law against λ, a line a method; what did not end in samples has no point."""
    drawn = Panels.new(1, (8.6, 4.2), "Fine-tuning as the reward sharpens")
    (axis,) = drawn.axes
    for (name, values), (colour, marker, line) in zip(curves.items(), LOOKS, strict=False):
        kept = [(s, v) for s, v in zip(strengths, values, strict=True) if v is not None]
        first = name == next(iter(curves))  # wide and below, since the next may lie on it
        look = {"linewidth": 5.0, "alpha": 0.45, "markersize": 9} if first else {"linewidth": 1.6, "markersize": 6}
        axis.plot(*zip(*kept, strict=True), color=colour, marker=marker, linestyle=line, label=name, **look)
    axis.axhline(1, color=QUIET, linestyle=":", linewidth=1.4, label="exact samples")
    axis.set(xscale="log", yscale="log", xlabel="strength λ", ylabel="sliced W2 / floor")
    axis.set_ylim(0.8, min(axis.get_ylim()[1], 100.0))  # what explodes leaves the frame
    drawn.figure.legend(loc="outside right center", frameon=False, fontsize=10)
    return drawn.figure


def frontier(problems: Mapping[str, Any]) -> "Figure":
    """Error of every method against its evaluations, a panel a problem."""
    drawn = Panels.new(len(problems), (4.0, 3.4), "Error against evaluations where rejection dies", sharey=True)
    for axis, (name, found) in zip(drawn.axes, problems.items(), strict=True):
        for method, by in found["methods"].items():
            points = sorted((cell["nfe"], min(max(cell["sw2"], LEAST_RATIO), MOST_RATIO)) for cell in by.values())
            axis.plot(*zip(*points, strict=True), label=method, **style(method))
        axis.axhline(1, color=QUIET, linestyle=":", linewidth=1.4)
        axis.set(xscale="log", yscale="log", xlabel="NFE per sample", ylabel="sliced W2 / floor")
        axis.set_title(name)
    drawn.rim()
    drawn.legend()
    return drawn.figure


def few_evaluations(rewards: Mapping[str, Any]) -> "Figure":
    """Reward against diversity of best-of-N in one step and of an annealed cloud, a panel a reward."""
    drawn = Panels.new(len(rewards), (4.0, 3.4), "Reward at a diversity, on digits")
    for axis, (name, found) in zip(drawn.axes, rewards.items(), strict=True):
        for kind, method in (("best of", "best-of-n"), ("annealed", "mfm-anneal")):
            cells = list(found[kind].values())
            label = "best of 1, 10, 100 and 1,000" if kind == "best of" else f"MFM-Anneal, {cells[0]['nfe']:.0f} NFE"
            points = [(cell["distance"], cell["reward"]) for cell in cells]
            axis.plot(*zip(*points, strict=True), label=label, **style(method))
        axis.set(xlabel="mean distance between samples", ylabel="mean reward")
        axis.set_title(name)
    drawn.rim(own_ticks=True)
    drawn.legend()
    return drawn.figure


def low_dimensional(problems: Mapping[str, Any]) -> "Figure":
    """∇V as the data thins, the errors of its estimators at the thinnest, and how far the steered laws are."""
    kinds = list(dict.fromkeys(found["kind"] for found in problems.values()))
    drawn = Panels.new(3 * len(kinds), (4.4, 3.5), "Data that loses its thickness: variances shrunk by s")
    for row, kind in enumerate(kinds):
        mine = [found for found in problems.values() if found["kind"] == kind]
        sizes, errors, laws = drawn.axes[3 * row : 3 * row + 3]
        for i, found in enumerate(mine):
            gaps, colour = [float(gap) for gap in found["estimates"]], SHADES[i % len(SHADES)]
            cells = found["estimates"].values()
            label = f"s = {found['s']:g}"
            sizes.plot(gaps, [cell["gradient"] for cell in cells], color=colour, label=label)
            sizes.plot(gaps, [cell["steepest"] for cell in cells], color=colour, linestyle=":")
        sizes.set(ylabel="size of $\\nabla V$", title=f"{kind}: on the way (dotted: steepest)")
        thin = mine[-1]
        for name, (colour, marker, line) in ESTIMATORS.items():
            cells = thin["estimates"].items()
            points = [(float(gap), cell["errors"][name] / cell["gradient"]) for gap, cell in cells]
            errors.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, label=f"∇V: {name}")
        errors.axhline(1, color=QUIET, linestyle=":", linewidth=1.4)
        errors.set(ylabel="error / size", ylim=(1e-5, 1e3), title=f"{kind}: ∇V from 16 draws, s = {thin['s']:g}")
        for name in thin["methods"]:
            ratios = [(found["s"], min(found["methods"][name]["ratio"], MOST_RATIO)) for found in mine]
            laws.plot(*zip(*ratios, strict=True), label=name, **style(name))
        laws.axhline(1, color=QUIET, linestyle=":", linewidth=1.4)
        laws.set(ylabel="sliced W2 / floor", ylim=(LEAST_RATIO, 1.2 * MOST_RATIO), title=f"{kind}: steered laws")
        laws.set(xlabel="s")
        for axis in (sizes, errors):
            axis.set(xlabel="1 − t")
        for axis in (sizes, errors, laws):
            axis.set(xscale="log", yscale="log")
            axis.invert_xaxis()
    drawn.legend()
    return drawn.figure


def error_propagation(problems: Mapping[str, Any], slopes: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Errors of V and of D* − D, of steered laws by method, and of drift and draws alone, against δ."""
    drawn = Panels.new(3, (4.9, 4.4), "Errors against a known relative error δ of the base model")
    values, laws, alone = drawn.axes
    by_delta = [cell for cell in problems.values() if cell.get("delta")]
    for i, t in enumerate(by_delta[0]["values"]):
        for what, line, title in (("value", "-", "V, nats"), ("shift", "--", "D* − D, relative")):
            points = [(cell["delta"], cell["values"][t][what]) for cell in by_delta]
            values.plot(*zip(*points, strict=True), color=SHADES[2 * i], linestyle=line, label=f"{title}, t = {t}")
    for name, fit in slopes.items():
        points = [(float(delta), value) for delta, value in fit.items() if delta != "slope" and value > 0]
        axis, look = (alone, {"linestyle": ":"}) if name.endswith("alone") else (laws, {})
        axis.plot(*zip(*points, strict=True), label=name, **style(name) | look)
        if name in ("mfm-gf", "none"):
            alone.plot(*zip(*points, strict=True), label=name, **style(name))
    for name, mark in (("mfm-gf", "*"), ("none", "h")):
        exact = problems["δ = 0"]["methods"][name]["sw2"]
        trained = [cell for cell in problems.values() if "map_delta" in cell]
        added = [max(cell["methods"][name]["sw2"] ** 2 - exact**2, 0) ** 0.5 for cell in trained]
        points = [(cell["map_delta"], size) for cell, size in zip(trained, added, strict=True) if size > 0]
        if points:
            look = {**style(name), "linestyle": "", "marker": mark, "markersize": 11}
            alone.plot(*zip(*points, strict=True), label=f"{name}, trained maps", **look)
    for axis, title in zip(drawn.axes, ("value", "steered laws", "drift or draws; trained maps"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="δ", title=title)
        axis.set_ylabel("error" if axis is values else "sliced W2 that δ adds")
    drawn.legend()
    return drawn.figure


def diversity(problems: Mapping[str, Any]) -> "Figure":
    """Effective modes, the smallest mode's share and mean distance, over those of exact samples, against λ."""
    drawn = Panels.new(3, (4.4, 3.8), "Diversity as the reward sharpens, over that of exact samples")
    names = list(dict.fromkeys(name for found in problems.values() for name in found["methods"]))[1:]
    looks = {**looks_of(name for name in names if base_method(name)[0]), **TUNED_LOOKS}
    for axis, what in zip(drawn.axes, ("effective modes", "smallest mode", "mean distance"), strict=True):
        for name in names:
            points = [
                (found["strength"], min(max(_varied(found, name)[what], 0.05), 3.0))
                for found in problems.values() if name in found["methods"]
            ]  # fmt: skip
            axis.plot(*zip(*points, strict=True), label=name, **looks[name])
        axis.axhline(1, color=QUIET, linestyle=":", linewidth=1.4)
        axis.set(xscale="log", yscale="log", xlabel="strength λ", ylim=(0.04, 3.5), title=what)
    drawn.axes[0].set(ylabel="over exact samples")
    drawn.legend()
    return drawn.figure


def _varied(found: Mapping[str, Any], name: str) -> dict[str, float]:
    """A method's diversity over that of exact samples."""
    mine, exact = found["methods"][name], found["methods"]["exact samples"]
    smallest = found["weights"].index(min(found["weights"]))
    return {
        "effective modes": mine["modes"] / exact["modes"],
        "smallest mode": mine["frequencies"][smallest] / found["weights"][smallest],
        "mean distance": mine["distance"] / exact["distance"],
    }


def generalisation(problems: Mapping[str, Any]) -> "Figure":
    """What the judging classifier says of samples against what the guide says, a panel a reward."""
    drawn = Panels.new(len(problems), (4.4, 3.8), "A reward that is optimised, and the same of another classifier")
    names = list(dict.fromkeys(name for found in problems.values() for name in found["methods"]))
    looks = {name: (colour, marker) for name, (colour, marker) in zip(names, POINTS, strict=False)}
    for axis, (reward, found) in zip(drawn.axes, problems.items(), strict=True):
        for name, cell in found["methods"].items():
            colour, marker = looks[name]
            axis.plot(cell["guide"], cell["judge"], marker, color=colour, markersize=9, linestyle="", label=name)
        axis.set(xlabel="guide, optimised", ylabel="judge", title=reward)
    drawn.legend()
    return drawn.figure


def crossover(bills: Mapping[str, tuple[float, float]]) -> "Figure":
    """Calls in all against the number of samples made: (calls before the first one, calls a sample) by name."""
    drawn = Panels.new(1, (7.4, 3.8), "Steer or tune: the bill, training included")
    (axis,) = drawn.axes
    for (name, (before, each)), (colour, _, line) in zip(bills.items(), LOOKS, strict=False):
        axis.plot(COUNTS, [before + each * n for n in COUNTS], color=colour, linestyle=line, linewidth=1.8, label=name)
    axis.set(xscale="log", yscale="log", xlabel="samples made", ylabel="network and reward calls in all")
    drawn.figure.legend(loc="outside right center", frameon=False, fontsize=10)
    return drawn.figure
