"""The evaluations of maps of general contexts: draws against exact posteriors, forecasts of what was held out."""

from pathlib import Path

import torch
from torch import Tensor

from metaflowmaps.context import Context
from metaflowmaps.data import ContextSource, Process, read_source
from metaflowmaps.data.paths import Paths
from metaflowmaps.errors import InputError
from metaflowmaps.lab.evaluate.context_error import ContextEvalConfig, evaluate_contexts
from metaflowmaps.lab.evaluate.forecast_error import ForecastEvalConfig, evaluate_forecasts
from metaflowmaps.lab.evaluate.on_mixtures import Draw, Measurement, Say
from metaflowmaps.lab.evaluate.rows import Json
from metaflowmaps.lab.figures import context_figures, plots
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.random import stream

FAN = (
    "Draws of the map for one path that was held out, at every time of it: half and nine tenths of them, and the truth."
)


def source_of(opened: OpenedModel) -> ContextSource | None:
    """The sequences, process or simulator that a map was trained on; None for a map of other things."""
    source = read_source(opened.checkpoint.training)
    return source if isinstance(source, ContextSource) else None


def posterior_on_process(opened: OpenedModel, config: ContextEvalConfig) -> Measurement:
    """Relative sliced W2 by number of observations, of a map that was trained on a process."""
    source = source_of(opened)
    if not isinstance(source, Process):
        raise InputError(f"nobody knows the posteriors of {opened.name}'s data: mfm eval forecast {opened.name}")

    def measure(say: Say) -> tuple[Json, Draw]:
        metrics = evaluate_contexts(opened.model, source, config, say)
        head = ["observations", *metrics["floor"]]
        ratios = [[f"{name} over its floor", *by_count.values()] for name, by_count in metrics["ratio"].items()]
        rows = [["one map step", *metrics["relative_sw2"].values()], ["floor", *metrics["floor"].values()], *ratios]
        metrics["tables"] = {"Relative sliced W2 by number of observations": {"head": head, "rows": rows}}
        return metrics, lambda out: None

    identity = {"checkpoint": opened.digest, **config.model_dump()}
    out = opened.beside(f"eval-posterior-{config.samples}")
    return Measurement("eval posterior", identity, out, opened.device, opened.cost_of(0), measure)


def forecasts_on_data(checkpoint: str, config: ForecastEvalConfig, device: str = "auto") -> Measurement:
    """Scores of forecasts of what a map was not trained on."""
    opened = OpenedModel.open(checkpoint, device)
    source = source_of(opened)
    if source is None:
        raise InputError(f"{checkpoint} was not trained on sequences: mfm eval posterior or generation judge it")

    def measure(say: Say) -> tuple[Json, Draw]:
        metrics = evaluate_forecasts(opened.model, source, config, say)
        metrics["tables"] = {"Forecasts of what was held out": _table(metrics["forecasts"])}
        paths = source.held_out()
        pictured = isinstance(paths, Paths) and len(opened.model.event_shape) == 1
        metrics["captions"] = {"fan.png": FAN} if pictured else {}

        def draw(out: Path) -> None:
            if pictured:
                context, asked, truth = fan_of(paths, stream(config.seed, "fan"))
                plots.save(context_figures.fan(opened.model, context, asked, truth), out / "fan.png")

        return metrics, draw

    calls = config.forecasts * config.samples * (sum(config.map_steps) + sum(config.ode_steps))
    identity = {"checkpoint": opened.digest, **config.model_dump()}
    where = opened.beside("eval-forecast")
    return Measurement("eval forecast", identity, where, opened.device, opened.cost_of(calls), measure)


def fan_of(paths: Paths, generator: torch.Generator) -> tuple[Context, Tensor, tuple[Tensor, Tensor]]:
    """A context of a held-out path, the times of its window that it does not hold, and what was there."""
    law = paths.law.model_copy(update={"least": paths.law.most})
    fullest = Paths(paths.values, paths.times, law, paths.first_target)
    path, place = fullest.targets[int(torch.randint(len(fullest.targets), (1,), generator=generator))].tolist()
    times, values, seen = paths.times[path], paths.values[path, :, 0], paths.seen[path]
    first = max(0, min(place - 1 - law.most, len(times) - paths.window))
    inside = torch.arange(first, min(first + paths.window, len(times)))
    observed = inside[: law.most] if law.place != "any" else inside[:: max(1, len(inside) // law.most)][: law.most]
    mask = seen[observed]
    context = Context(torch.where(mask[:, None], paths.values[path, observed], 0.0)[None], times[observed], mask)
    asked = inside if law.place == "any" else inside[len(observed) : len(observed) + law.lead * 8]
    known = inside[seen[inside]]
    return context, times[asked], (times[known], values[known])


def _table(found: Json) -> Json:
    levels = next(iter(found.values()))["coverage"]
    head = ["forecaster", "calls a draw", "CRPS", "±", "energy score", *(f"in {float(k):.0%}" for k in levels), "s"]
    rows = []
    for name, one in found.items():
        inside = [one.get("coverage", {}).get(level) for level in levels]
        rows.append([name, one["calls"], one["crps"], one["crps_std_err"], one["energy"], *inside, one["seconds"]])
    return {"head": head, "rows": rows}
