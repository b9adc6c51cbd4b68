"""Figures of fine-tuning: what the meters saw."""

from typing import TYPE_CHECKING, Any

from metaflowmaps.report.figures import CONTEXT, GLASS, MAP, QUIET, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "reward": ("mean reward λr of samples", MAP),
    "distance": ("mean distance between samples", GLASS),
    "distance_to_base": ("divergence from the base, nats", CONTEXT),
}


def meters(records: list[dict[str, Any]], reward: str) -> "Figure":
    """Reward, diversity and distance to the base against training steps; the dashed line is where it began."""
    shown = [name for name in PANELS if any(r.get(name) is not None for r in records)]
    figure, axes = new_figure(3.9 * len(shown), 3.7, 1, len(shown))
    figure.suptitle(f"While tuning to {reward}", fontsize=13)
    for axis, name in zip(axes[0], shown, strict=True):
        label, colour = PANELS[name]
        kept = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        axis.plot(*zip(*kept, strict=True), color=colour, marker="o", markersize=4, linewidth=1.6)
        axis.axhline(kept[0][1], color=QUIET, linestyle="--", linewidth=1.2)
        axis.set(xlabel="training step", ylabel=label)
        axis.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    return figure
