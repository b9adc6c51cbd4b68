"""Benchmark 3: what a step costs against a plain flow-matching step on the same network, batch and optimiser."""

import statistics
import time

import torch

from benchmarks.common import keep, table
from metaflowmaps.glass import Drift
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.training.config import LossConfig, TrainConfig
from metaflowmaps.training.run import build_map, build_objective
from metaflowmaps.training.state import TrainState
from metaflowmaps.training.teachers import ExactTeacher, GlassTeacher, Teacher

ROUNDS, STEPS = 12, 20


def cases() -> dict[str, tuple[TrainConfig, str]]:
    """Name -> (configuration, teacher): every loss form, plain flow matching first."""
    base = gmm()

    def with_loss(**options: object) -> TrainConfig:
        return base.model_copy(update={"loss": LossConfig(**options)})  # type: ignore[arg-type]

    return {
        "flow matching": (with_loss(diagonal="data", consistency="none", velocity="self"), "none"),
        "default recipe": (base, "exact"),
        "Lagrangian difference, network teacher": (base, "network"),
        "Lagrangian JVP, network teacher": (with_loss(consistency="lagrangian"), "network"),
        "Eulerian, network teacher": (with_loss(consistency="eulerian"), "network"),
        "MeanFlow": (with_loss(diagonal="data", consistency="mean-flow", velocity="data"), "none"),
        "semigroup": (with_loss(diagonal="data", consistency="semigroup", velocity="self"), "none"),
    }


def main() -> None:
    """Time all cases in turns, so that drift of the machine falls on all alike; medians of rounds."""
    torch.set_num_threads(2)
    runners = {name: _runner(config, teacher) for name, (config, teacher) in cases().items()}
    for run in runners.values():
        run(STEPS)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS):
        for name, run in runners.items():
            began = time.perf_counter()
            run(STEPS)
            seconds[name].append((time.perf_counter() - began) / STEPS)
    base = seconds["flow matching"]
    figures = {}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, base, strict=True)]
        quarter = statistics.quantiles(ratios, n=4)
        figures[name] = {
            "milliseconds": 1000 * statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [quarter[0], quarter[2]],
        }
    rows = [
        [name, f["milliseconds"], f["ratio"], "{:.2f} to {:.2f}".format(*f["ratio_quartiles"])]
        for name, f in figures.items()
    ]
    print(table(["step", "ms", "× flow matching", "quartiles"], rows))
    keep("step-cost", "python -m benchmarks step-cost", {"steps": figures})


def _runner(config: TrainConfig, kind: str):  # noqa: ANN202
    model = build_map(config)
    law, state = config.law.build(), TrainState(model, config.optimizer)
    teacher: Teacher | None = None
    if kind == "exact":
        teacher = ExactTeacher(model.path, law)
    elif kind == "network":
        frozen = build_map(config).requires_grad_(False)
        drift: Drift = frozen.drift
        teacher = GlassTeacher(model.path, drift)
    objective = build_objective(config, teacher)

    def run(steps: int) -> None:
        for _ in range(steps):
            batch = objective.batch(model, state.step)
            loss = objective(model, batch).mean()
            state.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            state.optimizer.step()
            state.average()
            state.step += 1

    return run
