"""The figure of fine-tuning: what the meters saw."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from metaflowmaps.lab.figures.plots import CONTEXT, GLASS, MAP, QUIET, Panels, exact_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METERS = {
    "reward": ("mean reward λr of samples", MAP),
    "distance": ("mean distance between samples", GLASS),
    "distance_to_base": ("divergence from the base, nats", CONTEXT),
    "bound": ("reward − divergence", "#2e7d32"),
}


def meters(records: Sequence[Mapping[str, float | None]], reward: str, evidence: float | None = None) -> "Figure":
    """Reward, diversity, distance to the base and the bound against training steps; dashed: where it began.

    ``evidence``, log E[e^r], is what the bound can reach (dotted).
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for name in METERS:
            value, step = record.get(name), record["step"]
            if value is not None and step is not None:
                curves.setdefault(name, []).append((step, value))
    panels = Panels.new(len(curves), (3.8, 3.0), f"While tuning to {reward}", most=2)
    shown = [name for name in METERS if name in curves]
    for axis, name in zip(panels.axes, shown, strict=True):
        curve, (label, colour) = curves[name], METERS[name]
        axis.plot(*zip(*curve, strict=True), color=colour, marker="o", markersize=4, linewidth=1.6)
        exact_line(axis, curve[0][1])
        if name == "bound" and evidence is not None:
            axis.axhline(evidence, color=QUIET, linestyle=":", linewidth=1.6, label="log E[e^r] over the base")
            axis.legend(frameon=False, fontsize=9.5)
        axis.set(xlabel="training step", ylabel=label)
    return panels.figure
