"""Figures of fine-tuning: what the meters saw, how methods bear sharper rewards, and when tuning pays."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metaflowmaps.lab.figures.plots import CONTEXT, GLASS, MAP, QUIET, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "reward": ("mean reward λr of samples", MAP),
    "distance": ("mean distance between samples", GLASS),
    "distance_to_base": ("divergence from the base, nats", CONTEXT),
    "bound": ("reward − divergence", "#2e7d32"),
}


def meters(records: list[dict[str, Any]], reward: str, evidence: float | None = None) -> "Figure":
    """Reward, diversity, distance to the base and the bound against training steps; dashed: where it began.

    ``evidence``, log E[e^r], is what the bound can reach (dotted).
    """
    shown = [name for name in PANELS if any(r.get(name) is not None for r in records)]
    figure, axes = new_figure(7.6, 3.1 * -(-len(shown) // 2), -(-len(shown) // 2), 2)
    figure.suptitle(f"While tuning to {reward}", fontsize=13)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, shown, strict=False):
        label, colour = PANELS[name]
        kept = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        axis.plot(*zip(*kept, strict=True), color=colour, marker="o", markersize=4, linewidth=1.6)
        axis.axhline(kept[0][1], color=QUIET, linestyle="--", linewidth=1.2)
        if name == "bound" and evidence is not None:
            axis.axhline(evidence, color=QUIET, linestyle=":", linewidth=1.6, label="log E[e^r] over the base")
            axis.legend(frameon=False, fontsize=9.5)
        axis.set(xlabel="training step", ylabel=label)
        axis.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    return figure


LOOKS = (
    (MAP, "o", "-"),
    (MAP, "s", "--"),
    (GLASS, "D", "-"),
    (CONTEXT, "^", "-"),
    ("#2e7d32", "v", "-"),
    ("#7b4fb5", "P", "-"),
    ("#b8860b", "X", "-"),
    (QUIET, "*", "--"),
)


def sweep(strengths: Sequence[float], curves: Mapping[str, Sequence[float | None]]) -> "Figure":
    """Distance to the exact law against λ, a line a method; what did not end in samples has no point."""
    figure, axes = new_figure(8.6, 4.6)
    axis = axes[0, 0]
    for (name, values), (colour, marker, line) in zip(curves.items(), LOOKS, strict=False):
        kept = [(s, v) for s, v in zip(strengths, values, strict=True) if v is not None]
        first = name == next(iter(curves))  # wide and below, since the next may lie on it
        width = 5.0 if first else 1.6
        axis.plot(
            *zip(*kept, strict=True),
            color=colour,
            marker=marker,
            linestyle=line,
            label=name,
            linewidth=width,
            alpha=0.45 if first else 1.0,
            markersize=9 if first else 6,
        )
    axis.axhline(1, color=QUIET, linestyle=":", linewidth=1.4, label="exact samples")
    axis.set(xscale="log", yscale="log", xlabel="strength λ", ylabel="sliced W2 / floor")
    axis.set_ylim(0.8, min(axis.get_ylim()[1], 100.0))  # what explodes leaves the frame
    axis.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    figure.suptitle("Fine-tuning as the reward sharpens", fontsize=13)
    figure.legend(loc="outside right center", frameon=False, fontsize=10)
    return figure


def crossover(bills: Mapping[str, tuple[float, float]]) -> "Figure":
    """Calls in all against the number of samples made: (calls before the first one, calls a sample) by name."""
    figure, axes = new_figure(7.4, 4.2)
    axis = axes[0, 0]
    counts = [10 ** (k / 4) for k in range(4, 29)]
    for (name, (before, each)), (colour, _, line) in zip(bills.items(), LOOKS[::1], strict=False):
        axis.plot(counts, [before + each * n for n in counts], color=colour, linestyle=line, linewidth=1.8, label=name)
    axis.set(xscale="log", yscale="log", xlabel="samples made", ylabel="network and reward calls in all")
    axis.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    figure.suptitle("Steer or tune: the bill, training included", fontsize=13)
    figure.legend(loc="outside right center", frameon=False, fontsize=10)
    return figure
