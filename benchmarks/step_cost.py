"""Benchmark 3: what a step costs against a plain flow-matching step on the same network, batch and optimiser.

Once for the mixture's perceptron and its recipe, once for a transformer of 5 M parameters on 256 tokens with labels and
a guided network teacher of its own size, the setting of the ImageNet recipes.
"""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import keep, say
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks.dit import SIZES, DiT, DiTConfig
from metaflowmaps.path import Drift, LinearPath
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.training.building import build_map
from metaflowmaps.training.objective import Objective
from metaflowmaps.training.state import TrainState
from metaflowmaps.training.teachers import ExactTeacher, GlassTeacher, Teacher
from metaflowmaps.training.train_config import ConditionConfig, LossConfig, OptimizerConfig, TimesConfig, TrainConfig
from metaflowmaps.training.training_run import build_objective

ROUNDS, STEPS = 12, 20


def cases() -> dict[str, tuple[TrainConfig, str]]:
    """Name -> (configuration, teacher): every loss form, plain flow matching first."""
    base = gmm()

    def with_loss(**options: object) -> TrainConfig:
        return base.model_copy(update={"loss": LossConfig(**options)})  # type: ignore[arg-type]

    return {
        "flow matching": (with_loss(diagonal="data", consistency="none"), "none"),
        "default recipe": (base, "exact"),
        "Lagrangian difference, network teacher": (base, "network"),
        "Lagrangian JVP, network teacher": (with_loss(consistency="lagrangian"), "network"),
        "Eulerian, network teacher": (with_loss(consistency="eulerian"), "network"),
        "MeanFlow": (with_loss(diagonal="data", consistency="mean-flow"), "none"),
        "semigroup": (with_loss(diagonal="data", consistency="semigroup"), "none"),
    }


def main() -> None:
    """The perceptron: benchmarks/results/step-cost.json."""
    torch.set_num_threads(2)
    runners = {name: _runner(config, teacher) for name, (config, teacher) in cases().items()}
    keep("step-cost", "python -m benchmarks step-cost", {"steps": measured(runners, ROUNDS, STEPS)})


def transformer() -> None:
    """The transformer: benchmarks/results/step-cost-transformer.json. One thread, in seconds of its processor time."""
    torch.set_num_threads(1)
    runners = {name: _transformer(*case) for name, case in transformer_cases().items()}
    figures = measured(runners, 5, 1, time.process_time)
    keep("step-cost-transformer", "python -m benchmarks step-cost-transformer", {"rows": BATCH, "steps": figures})


def measured(
    runners: dict[str, Callable[[int], None]],
    rounds: int,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Time all cases in turns, so that drift of the machine falls on all alike; medians of rounds."""
    for run in runners.values():
        run(steps)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for i in range(rounds):
        for name, run in runners.items():
            gc.collect()
            began = clock()
            run(steps)
            seconds[name].append((clock() - began) / steps)
        say(f"step-cost: round {i + 1} of {rounds}")
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
    return figures


# -- the transformer -------------------------------------------------------------------------------------------------

BATCH, CLASSES = 8, 10
ALL, SOME = (2.5,), (1.0, 2.5)  # guidance: of every row with a label, of every other one


def transformer_cases() -> dict[str, tuple[dict[str, Any], tuple[float, ...], int]]:
    """Name -> (loss, guidance scales, rows)."""
    split: dict[str, Any] = {"diagonal_share": 0.75, "adaptive_power_diagonal": 0.5, "adaptive_power_consistency": 1.0}

    def by(name: str, derivative: str) -> dict[str, Any]:
        return {**split, "consistency": {"name": name, "derivative": derivative}}

    return {
        "flow matching": ({"diagonal": "data", "consistency": "none"}, (1.0,), BATCH),
        "Lagrangian difference": ({**split}, ALL, BATCH),
        "Lagrangian difference, half of the rows guided": ({**split}, SOME, BATCH),
        "Lagrangian JVP (forward)": (by("lagrangian", "forward"), ALL, BATCH),
        "Eulerian, forward": (by("eulerian", "forward"), ALL, BATCH),
        "Eulerian, difference": (by("eulerian", "difference"), ALL, BATCH),
        "semigroup": ({**split, "consistency": "semigroup"}, ALL, BATCH),
        "MeanFlow, forward, no teacher": ({**by("mean-flow", "forward"), "diagonal": "data"}, (1.0,), BATCH),
        "MeanFlow, difference, no teacher": ({**by("mean-flow", "difference"), "diagonal": "data"}, (1.0,), BATCH),
        "both terms on every row, Lagrangian difference": ({**split, "diagonal_share": 0.5}, ALL, 2 * BATCH),
        "both terms on every row, Eulerian, forward": (
            {**by("eulerian", "forward"), "diagonal_share": 0.5},
            ALL,
            2 * BATCH,
        ),
    }


class Latents:
    """Noise in the shape of latents, with labels."""

    def sample_labelled(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        x_1 = torch.randn((n, 4, 32, 32), generator=generator)
        return x_1, torch.randint(CLASSES, (n,), generator=generator)


def _transformer(loss: dict[str, Any], guidance: tuple[float, ...], rows: int) -> Callable[[int], None]:
    def network() -> DiT:
        torch.manual_seed(0)
        return DiTConfig(patch=2, num_classes=CLASSES, guidance=True, **SIZES["tiny"]).network((4, 32, 32))

    model, frozen = (MetaFlowMap(network(), LinearPath(), "plain") for _ in range(2))
    teacher = GlassTeacher(model.path, frozen.requires_grad_(False).drift, CLASSES)
    condition = ConditionConfig(dropout=0.2, guidance=guidance)
    objective = Objective(Latents(), LossConfig(**loss), TimesConfig(), teacher, rows, 0, condition)  # type: ignore[arg-type]
    return _stepper(model, TrainState(model, OptimizerConfig(name="radam", lr=1e-4)), objective)


def _runner(config: TrainConfig, kind: str) -> Callable[[int], None]:
    model = build_map(config)
    law, state = config.data.law(), TrainState(model, config.optimizer)
    teacher: Teacher | None = None
    if kind == "exact":
        teacher = ExactTeacher(model.path, law)
    elif kind == "network":
        frozen = build_map(config).requires_grad_(False)
        drift: Drift = frozen.drift
        teacher = GlassTeacher(model.path, drift)
    return _stepper(model, state, build_objective(config, teacher))


def _stepper(model: MetaFlowMap, state: TrainState, objective: Objective) -> Callable[[int], None]:
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
