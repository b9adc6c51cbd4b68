"""Maps of general contexts: a process with exact posteriors, the yearly sunspots, and two simulators.

The mixture of two Ornstein–Uhlenbeck processes has exact posteriors, which are bimodal until enough is seen. The
sunspots (1700 to 2008) are one series: the last three tenths are held out, and forecast from the nine years before,
one to five years ahead. ``sunspots.npz`` holds the 309 yearly means of the National Geophysical Data Center, which are
in the public domain. Two simulators with exact posteriors (:mod:`benchmarks.simulators`) are run 10,000 times each: the
rival of their maps is the flow that taught them, of the same network, in many calls.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.classifier_test import c2st
from benchmarks.common import RUNS, keep, say, trained
from benchmarks.simulators import TASKS
from metaflowmaps.context import Context
from metaflowmaps.cost import Meter
from metaflowmaps.data import ContextLaw, Process, Sequences, Simulator
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.context_error import ContextEvalConfig, evaluate_contexts
from metaflowmaps.lab.evaluate.forecast_error import ForecastEvalConfig, evaluate_forecasts, ode_draws
from metaflowmaps.networks import MLPConfig, ObservedConfig
from metaflowmaps.random import stream
from metaflowmaps.recipes import recipe
from metaflowmaps.training.building import fitted
from metaflowmaps.training.train_config import TrainConfig

SUNSPOTS = Path("benchmarks") / "sunspots.npz"
PROCESS = Process(process="ou-mixture")
FAST: dict[str, Any] = {"threads": 1, "checkpoint_every": 500}
SIMULATIONS, OBSERVED, DRAWS = 10_000, 5, 1_000  # to learn from; observations, and draws of each posterior, to judge
SIMULATOR_STEPS = {"gaussian-linear": (600, 600), "two-moons": (2_000, 1_000)}  # of the drift, and of the map
ODE_STEPS = (4, 32)


def process_from_data() -> TrainConfig:
    """The mixture's map from its paths alone: 3,000 steps of a drift, and 1,500 of the map that starts from it."""
    steps = {"drift_steps": 3_000, "steps": 1_500, "start_from_drift": True, "drift_batch_size": 256}
    return recipe("sequences").model_copy(update={"data": PROCESS, **steps, **FAST})  # type: ignore[return-value]


def sunspots() -> TrainConfig:
    """A small map of a short series: 216 years to learn from."""
    law = ContextLaw(place="latest", least=1, most=9, lead=5, window=20)
    base = recipe("sequences", data=str(SUNSPOTS))
    network = ObservedConfig(body=MLPConfig(width=64, depth=3), width=32)
    changes = {
        "data": base.data.model_copy(update={"stationary": True, "contexts": law, "hold_out": 0.3}),
        "model": base.model.model_copy(update={"network": network}),  # type: ignore[union-attr]
        "drift_steps": 300, "steps": 300, "drift_batch_size": 128, "batch_size": 128,
    }  # fmt: skip
    return base.model_copy(update={**changes, **FAST})  # type: ignore[return-value]


def posterior_of(task: str) -> TrainConfig:
    """A map of a simulator's parameters."""
    (drift_steps, steps), base = SIMULATOR_STEPS[task], recipe("simulator")
    data = Simulator(simulate=TASKS[task].simulate, num=SIMULATIONS)
    return base.model_copy(update={"data": data, "drift_steps": drift_steps, "steps": steps, **FAST})  # type: ignore[return-value]


@torch.no_grad()
def judged_by_classifier(task: str, model: MetaFlowMap, drift: MetaFlowMap) -> dict[str, Any]:
    """C2ST of the map in one and two calls, of the flow that taught it in many, and of exact draws: .5 is perfect."""
    found: dict[str, dict[str, Any]] = {}
    exact = TASKS[task]
    for number, x in enumerate(exact.simulate(OBSERVED, stream(0, "observed"))[1]):
        context = Context(x[None, None], torch.zeros(1), query=0.0)
        truth, again = (exact.posterior(x, DRAWS, stream(part, "exact", number)) for part in range(2))
        samplers = {f"map-{k}": partial(model.draw, context, DRAWS, steps=k) for k in (1, 2)}
        samplers |= {f"ode-{k}": partial(ode_draws, drift, context, DRAWS, k) for k in ODE_STEPS}
        for name, sampler in samplers.items():
            with Meter(model.network) as one, Meter(drift.network) as other:
                draws = sampler(generator=stream(0, "noise", number))[:, 0]
            with torch.enable_grad():
                _note(found, name, c2st(truth, draws), (one.forwards + other.forwards) / DRAWS, one.seconds)
        with torch.enable_grad():
            _note(found, "exact", c2st(truth, again), 0.0, 0.0)
    return {name: {key: sum(values) / len(values) for key, values in cell.items()} for name, cell in found.items()}


def _note(found: dict[str, Any], name: str, accuracy: float, calls: float, seconds: float) -> None:
    cell = found.setdefault(name, {"c2st": [], "calls": [], "seconds": []})
    for key, value in (("c2st", accuracy), ("calls", calls), ("seconds", seconds)):
        cell[key].append(value)


def main() -> None:
    """Train and judge both; a quarter of an hour on one core."""
    figures: dict[str, Any] = {"processes": {}}
    for name, config in {"data alone": process_from_data()}.items():
        say(f"general contexts: {name}")
        model, seconds = _made(config, f"contexts-{name.replace(' ', '-')}")
        judged = evaluate_contexts(model, PROCESS, ContextEvalConfig(samples=2048, contexts=16, map_steps=(1, 2)))
        figures["processes"][name] = {"train_seconds": seconds, **judged}
    say("general contexts: sunspots")
    config = fitted(sunspots())
    assert isinstance(config.data, Sequences)
    model, seconds = _made(config, "contexts-sunspots")
    scores = evaluate_forecasts(model, config.data, ForecastEvalConfig(ode_steps=(4, 32), map_steps=(1, 2)))
    figures["sunspots"] = {"train_seconds": seconds, **scores}
    keep("general-contexts", "python -m benchmarks general-contexts", figures)


def simulators() -> None:
    """Train and judge the posteriors of both simulators; some ten minutes of one core."""
    figures: dict[str, Any] = {"simulators": {}}
    for task in TASKS:
        say(f"simulators: {task}")
        model, seconds = _made(posterior_of(task), f"contexts-{task}")
        drift = MetaFlowMap.from_pretrained(RUNS / f"contexts-{task}" / "drift")
        samplers = judged_by_classifier(task, model, drift)
        figures["simulators"][task] = {"train_seconds": seconds, "simulations": SIMULATIONS, "samplers": samplers}
    keep("simulators", "python -m benchmarks simulators", figures)


def _made(config: TrainConfig, name: str) -> tuple[MetaFlowMap, float]:
    result = trained(fitted(config), name)
    torch.set_num_threads(1)
    return MetaFlowMap.from_pretrained(result.checkpoint), result.seconds
