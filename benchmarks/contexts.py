"""Maps of general contexts from data alone: a process with exact posteriors, and the yearly sunspots.

The mixture of two Ornstein–Uhlenbeck processes has exact posteriors, which are bimodal until enough is seen. The
sunspots (1700 to 2008) are one series: the last three tenths are held out, and forecast from the nine years before,
one to five years ahead. ``sunspots.npz`` holds the 309 yearly means of the National Geophysical Data Center, which are
in the public domain.
"""

from pathlib import Path
from typing import Any

import torch

from benchmarks.common import keep, say, trained
from metaflowmaps.data import ContextLaw, Process, Sequences
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.context_error import ContextEvalConfig, evaluate_contexts
from metaflowmaps.lab.evaluate.forecast_error import ForecastEvalConfig, evaluate_forecasts
from metaflowmaps.networks import MLPConfig, ObservedConfig
from metaflowmaps.recipes import recipe
from metaflowmaps.training.building import fitted
from metaflowmaps.training.train_config import TrainConfig

SUNSPOTS = Path("benchmarks") / "sunspots.npz"
PROCESS = Process(process="ou-mixture")
FAST: dict[str, Any] = {"threads": 1, "checkpoint_every": 500}


def process_from_data() -> TrainConfig:
    """The mixture's map from its paths alone, in two times 1,500 steps of 256."""
    steps = {"drift_steps": 1_500, "steps": 1_500, "drift_batch_size": 256}
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


def _made(config: TrainConfig, name: str) -> tuple[MetaFlowMap, float]:
    result = trained(fitted(config), name)
    torch.set_num_threads(1)
    return MetaFlowMap.from_pretrained(result.checkpoint), result.seconds
