"""Figures of mixtures: samples over exact contours, errors against cost and calls, the course of steering."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from metaflowmaps.lab.figures.curves import Floor, against_calls, by_calls, calls_axis
from metaflowmaps.lab.figures.looks import looks_of, style
from metaflowmaps.lab.figures.plots import Panels, exact_line, mass_contours, plane, points
from metaflowmaps.lab.results import Course, Metrics, PosteriorErrors, Steering, ValueErrors
from metaflowmaps.laws.mixture import GaussianMixture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CEILING = 100  # times the floor: what is worse is drawn here
FRAME = 5.6  # half the side of the plane that is shown
COURSE_TICKS = 8  # markers along a trajectory
SAMPLERS = {"map": "map", "glass": "GLASS"}


def panels(tilted: GaussianMixture, metrics: Metrics, samples: Mapping[str, Tensor]) -> "Figure":
    """One panel a method: its samples ("method.num_draws") over the exact tilted law, with error and cost."""
    steering = Steering.of(metrics)
    title = "Steered samples over the exact tilted law (contours hold 50, 90, 99 %)"
    drawn = plane(len(samples), (3.2, 3.7), title, most=4, sharex=True, sharey=True)
    for axis, (cell, x) in zip(drawn.axes, samples.items(), strict=True):
        name, key = cell.rsplit(".", 1)
        steered = steering.methods[name][key]
        axis.set(xlim=(-FRAME, FRAME), ylim=(-FRAME, FRAME), xticks=range(-4, 5, 2))
        mass_contours(axis, tilted, 241)
        points(axis, x, 1500)
        draws = "" if key == "0" else f", N = {key}"
        ratio = f"> {CEILING}" if steered.ratio >= CEILING else f"{steered.ratio:.2f}"
        axis.set_title(f"{name}{draws}\nSW2 {ratio} × floor, {_short(steered.cost.nfe)} NFE", fontsize=10.5)
    drawn.rim()
    return drawn.figure


def error_against_cost(metrics: Metrics) -> "Figure":
    """SW2 and mode-weight error as ratios to their floors at that many samples, against NFE and time a sample."""
    title = "Error against cost per returned sample; dashed line: exact samples"
    drawn = Panels.new(4, (5.75, 3.7), title, most=2, sharey="row")
    for name, cells in Steering.of(metrics).lines():
        costs = [max(cell.cost.nfe, 1) for cell in cells], [cell.milliseconds for cell in cells]
        errors = [min(cell.ratio, CEILING) for cell in cells], [max(cell.mode_ratio, 0.3) for cell in cells]
        for axis, error, cost in zip(drawn.axes, (errors[0], errors[0], errors[1], errors[1]), costs * 2, strict=True):
            axis.plot(cost, error, label=name, **style(name))
    for axis, label in zip(drawn.axes, ("NFE per sample", "milliseconds per sample") * 2, strict=True):
        axis.set(xscale="log", yscale="log", xlabel=label)
        exact_line(axis, 1.0)
    drawn.axes[0].set(ylim=(0.7, 1.3 * CEILING), ylabel=f"sliced W2 / floor (at most {CEILING} shown)")
    drawn.axes[2].set(ylabel="error of mode weights (L1) / floor")
    drawn.rim(own_ticks=True)
    drawn.legend()
    return drawn.figure


def trajectory(courses: Mapping[str, Course]) -> "Figure":
    """ESS of the draws and norm of the value's gradient against time, one line a method."""
    drawn = Panels.new(2, (5.5, 4.0), "Along the trajectory, mean over samples")
    ess, norm = drawn.axes
    for name, course in courses.items():
        look = {**style(name), "markevery": max(1, len(course.time) // COURSE_TICKS), "markersize": 5}
        for axis, values in ((ess, course.ess), (norm, course.gradient_norm)):
            shown = [(t, v) for t, v in zip(course.time, values, strict=False) if v > 0]  # ∇V is 0 at t = 0
            if values:
                axis.plot([t for t, _ in shown], [v for _, v in shown], label=name, **look)
    ess.set(xlabel="time t (0: noise, 1: data)", ylabel="effective number of draws (ESS)", ylim=(0, None))
    norm.set(xlabel="time t (0: noise, 1: data)", ylabel="norm of the estimated ∇V")
    if any(len(line.get_xdata()) for line in norm.lines):  # type: ignore[arg-type]
        norm.set_yscale("log")
        low, high = norm.get_ylim()
        norm.set_ylim(max(low, 1e-2), max(min(high, 1e4), 1e-1))  # a method that explodes leaves the frame
    drawn.legend(courses)
    return drawn.figure


def posterior_error(metrics: Metrics) -> "Figure":
    """Relative SW2 against network calls a draw: map and GLASS, one panel a time, the floor dashed."""
    errors = PosteriorErrors.of(metrics)
    shown = {
        f"t = {float(t):g}": by_calls(
            {name: at[t] for name, at in errors.by_sampler.items()}, SAMPLERS, errors.network_calls_per_draw
        )
        for t in errors.relative_sw2
    }
    floor = Floor({f"t = {float(t):g}": level for t, level in errors.floor.items()})
    title = "Error of posterior draws against network calls"
    return against_calls(shown, "network calls per draw", "sliced W2 / posterior std", floor, title)


def value_error(metrics: Metrics) -> "Figure":
    """RMSE and correlation of V̂ against network calls a draw, one panel a time."""
    errors = ValueErrors.of(metrics)
    times, looks, calls = errors.times, looks_of(SAMPLERS.values()), errors.network_calls_per_draw
    title = f"Value from {errors.num_draws} draws against the exact value"
    drawn = Panels.new(2 * len(times), (3.1, 3.0), title, most=len(times), sharex=True, sharey="row")
    asked = [(what, t) for what in ("rmse", "pearson") for t in times]
    for axis, (what, t) in zip(drawn.axes, asked, strict=True):
        values = {name: getattr(at[t], what) for name, at in errors.by_sampler.items()}
        for label, curve in by_calls(values, SAMPLERS, calls).items():
            axis.plot(*zip(*curve, strict=True), label=label, **looks[label])
        exact_line(axis, values["exact"], "exact draws")
        axis.set(xscale="log", xlabel="network calls per draw")
        if what == "rmse":
            axis.set(yscale="log", ylabel="RMSE of the value")
            axis.set_title(f"t = {float(t):g}", fontsize=12)
        else:
            axis.set(ylabel="Pearson r")
    calls_axis(drawn.axes, {calls[name] for name in errors.by_sampler if name != "exact"})
    drawn.rim()
    drawn.legend()
    return drawn.figure


def _short(value: float) -> str:
    return f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.3g}"
