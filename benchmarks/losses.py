"""Benchmark 2: which consistency loss? All of them, at equal wall-clock on one core, three seeds.

The budget covers everything a run needs: where a learned teacher is used, its flow matching comes out of the same
seconds. Steps are set from a timing of the very configuration, so that each schedule ends with the budget.
"""

import math
import statistics
import time

import torch

from benchmarks.common import RESULTS, judged, keep, say, trained
from metaflowmaps.lab.evaluate.posterior_error import PosteriorEvalConfig
from metaflowmaps.lab.figures.plots import GLASS, MAP, new_figure, save
from metaflowmaps.losses import Eulerian, Lagrangian, LagrangianDifference, MeanFlow, Semigroup
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.training.building import build_map
from metaflowmaps.training.parents import drift_config
from metaflowmaps.training.state import TrainState
from metaflowmaps.training.teachers import GlassTeacher
from metaflowmaps.training.train_config import LossConfig, TrainConfig
from metaflowmaps.training.training_run import build_objective

BUDGET, DRIFT_SHARE, SEEDS = 8.0, 0.4, (0, 1, 2)
JUDGE = PosteriorEvalConfig(samples=4096, contexts=8, sets=2, map_steps=(1,), glass_steps=())

LOSSES: dict[str, LossConfig] = {
    "MeanFlow, data": LossConfig(diagonal="data", consistency=MeanFlow()),
    "Eulerian, self": LossConfig(diagonal="data", consistency=Eulerian(velocity="self")),
    "Lagrangian JVP, self": LossConfig(diagonal="data", consistency=Lagrangian(velocity="self")),
    "Lagrangian difference, self": LossConfig(diagonal="data", consistency=LagrangianDifference(velocity="self")),
    "semigroup, data diagonal": LossConfig(diagonal="data", consistency=Semigroup()),
    "Eulerian, learned teacher": LossConfig(consistency=Eulerian()),
    "Lagrangian JVP, learned teacher": LossConfig(consistency=Lagrangian()),
    "Lagrangian difference, learned teacher": LossConfig(consistency=LagrangianDifference()),
    "semigroup, learned teacher diagonal": LossConfig(consistency=Semigroup()),
}
PARAMETERIZATIONS = ("gaussian", "residual", "plain")
EDGE = 2.0  # of the picture: an error of two posterior standard deviations says no more than that
IN_ALL_THREE = ("MeanFlow, data", "semigroup, data diagonal")


def main(budget: float = BUDGET) -> None:
    """Train and judge every cell; a table, a figure, a JSON file."""
    figures: dict[str, dict[str, object]] = {}
    for parameterization in PARAMETERIZATIONS:
        for name, loss in LOSSES.items():
            if parameterization == "residual" and name not in IN_ALL_THREE:
                continue
            errors, seconds, steps = [], [], []
            for seed in SEEDS:
                config = _sized(_config(loss, parameterization, seed), budget)
                label = f"losses-{parameterization}-{name}-{seed}".replace(", ", "-").replace(" ", "-")
                try:
                    run = trained(config, label)
                    metrics = judged(run, JUDGE).metrics()
                    at = metrics["relative_sw2"]
                    floor = metrics["floor"]
                    errors.append(list(at.values()))  # type: ignore[attr-defined]
                    seconds.append(run.seconds)
                    steps.append(run.step)
                except RuntimeError as error:  # a non-finite loss is a result too
                    say(f"{label}: {error}")
                    errors.append([math.inf] * len(JUDGE.times))
            means = [statistics.fmean(e) for e in errors]
            figures[f"{parameterization}: {name}"] = {
                "relative_sw2": dict(zip(map(str, JUDGE.times), map(list, zip(*errors, strict=True)), strict=True)),
                "mean": statistics.fmean(means),
                "spread": statistics.stdev(means) if all(map(math.isfinite, means)) else math.inf,
                "seconds": seconds,
                "steps": steps,
            }
            say(f"{parameterization}: {name}: {means}")
    keep("losses", "python -m benchmarks losses", {"budget_seconds": budget, "floor": floor, "losses": figures})
    picture(figures)


def picture(figures: dict[str, dict[str, object]]) -> None:
    """Mean error of each loss, one dot a seed, one colour a parameterisation."""
    figure, axes = new_figure(9.2, 4.8)
    axis = axes[0, 0]
    colors = dict(zip(PARAMETERIZATIONS, (MAP, "#2e9e6b", GLASS), strict=True))
    for row, name in enumerate(reversed(LOSSES)):
        for offset, parameterization in zip((0.22, 0.0, -0.22), PARAMETERIZATIONS, strict=True):
            if f"{parameterization}: {name}" not in figures:
                continue
            by_t: dict[str, list[float]] = figures[f"{parameterization}: {name}"]["relative_sw2"]  # type: ignore[assignment]
            seeds = [min(statistics.fmean(values), EDGE) for values in zip(*by_t.values(), strict=True)]
            axis.scatter(
                seeds, [row + offset] * len(seeds), color=colors[parameterization], s=26,
                label=parameterization,
            )  # fmt: skip
    axis.set_yticks(range(len(LOSSES)), list(reversed(LOSSES)))
    axis.set(xscale="log", xlabel="sliced W2 / posterior std of one map step, mean over t (left is better)")
    axis.set_xlim(right=1.1 * EDGE)
    axis.set_title(f"Consistency losses at equal wall-clock, three seeds (at {EDGE:g}: that or worse)", fontsize=13)
    axis.grid(axis="x", which="both", color="#e3e5e8", linewidth=0.7)
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, RESULTS / "losses.png")


def _config(loss: LossConfig, parameterization: str, seed: int) -> TrainConfig:
    base = gmm()
    return base.model_copy(
        update={
            "loss": loss,
            "model": base.model.model_copy(update={"parameterization": parameterization}),
            "teacher": "learned" if loss.taught else "none",
            "seed": seed,
            "checkpoint_every": 10**6,
            "threads": 1,
        }
    )


def _sized(config: TrainConfig, budget: float) -> TrainConfig:
    """steps (and drift_steps) that fill the budget on this machine."""
    if config.teacher != "learned":
        return config.model_copy(update={"steps": max(1, round(budget / _step_seconds(config, False)))})
    drift_steps = round(DRIFT_SHARE * budget / _step_seconds(drift_config(config), False))
    steps = round((1 - DRIFT_SHARE) * budget / _step_seconds(config, True))
    return config.model_copy(update={"steps": max(1, steps), "drift_steps": max(1, drift_steps)})


def _step_seconds(config: TrainConfig, learned: bool) -> float:
    torch.set_num_threads(config.threads)
    model = build_map(config)
    teacher = GlassTeacher(model.path, build_map(config).requires_grad_(False).drift) if learned else None
    objective, state = build_objective(config, teacher), TrainState(model, config.optimizer)
    began = 0.0
    for step in range(45):
        if step == 15:
            began = time.perf_counter()
        objective(model, objective.batch(model, step)).mean().backward()
        state.optimizer.step()
        state.average()
        state.optimizer.zero_grad()
    return (time.perf_counter() - began) / 30
