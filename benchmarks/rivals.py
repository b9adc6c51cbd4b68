"""Every steering method against the cheapest rivals, and every rival at its best, on problems with exact answers.

DPS and TDS have a strength and a temper that practitioners tune. They are chosen here by SW2 on *another* observation
and other seeds than those on which all methods are then compared: nothing is picked on samples that it is judged by.
Methods of the package run on their defaults.

Draws are exact (``mfm.ExactModel``), so what differs is the method and not how well a map was trained; exact draws have
no gradient in the state, so MFM-G is not among them (``python -m benchmarks steering`` has it, on maps).
"""

import json
import sys
from typing import Any

import torch

from benchmarks.common import RESULTS, keep, say
from benchmarks.provenance import commit_now
from benchmarks.steering import light
from benchmarks.table_rows import METHODS, method_rows
from benchmarks.tables import markdown
from metaflowmaps.lab.evaluate.steering_error import SteeringEvalConfig, evaluate_steering
from metaflowmaps.path import LinearPath
from metaflowmaps.posterior import ExactModel
from metaflowmaps.recipes.tasks import steering_task
from metaflowmaps.rewards.analytic import LinearGaussian

STEPS = 50
TUNED = {
    "dps": [f"dps-scale={scale}" for scale in ("1", ".3", ".1", ".03", ".01")],
    "tds": [
        f"tds-temper={temper}-scale={scale}-64-all"
        for temper in ("0", ".5", "1") for scale in ("1", ".1")
    ],
}  # fmt: skip
COMPARED = (
    "none", "rejection-bound=0", "rejection", "resampling-16", "resampling-64", "best-of-n-map-16",
    "best-of-n-map-1000",
    "best-of-n-16", "dps", "tds-64-all", "mfm-gf-1", "mfm-gf-4", "mfm-gf-16", "mfm-smc-4", "mfm-search-4",
    "mfm-anneal", "exact",
)  # fmt: skip
PROBLEMS = {
    "plane": ("gmm-inverse", "paper", [1.0]),
    "16-D medium": ("mixture-16d", "medium", [0.5, -0.5]),
    "16-D sharp": ("mixture-16d", "sharp", [0.5, -0.5]),
    "16-D broad": ("mixture-16d", "broad", [0.5, -0.5]),
}  # name: task, reward, the observation that rivals are tuned on


def main() -> None:
    """Benchmark: rivals."""
    torch.set_num_threads(1)
    file = RESULTS / "rivals.json"
    kept: dict[str, Any] = json.loads(file.read_text())["problems"] if file.exists() else {}
    for name in PROBLEMS:
        if name not in kept:
            kept[name] = _problem(name)
            keep("rivals", "python -m benchmarks rivals", {"problems": kept})
        print(f"\n{name}\n\n{markdown([METHODS, *method_rows(kept[name]['metrics'])])}")


def _problem(name: str) -> dict[str, Any]:
    task_name, reward_name, other = PROBLEMS[name]
    task = steering_task(task_name)
    model = ExactModel(LinearPath(), task.law)
    reward = task.reward(reward_name)
    elsewhere = LinearGaussian(reward.A, torch.tensor(other), reward.noise_std)
    chosen, scans = [], {}
    for family, names in TUNED.items():
        config = SteeringEvalConfig(
            samples=1024, seeds=1, steps=STEPS, methods=tuple(names), num_draws=(1,), mmd_seeds=0, seed=101, budget=1e9
        )
        scanned = _measured(model, task.law, elsewhere, config)
        scans[family] = {n: cell["sw2"] / cell["floor_sw2"] for n in names for cell in scanned["methods"][n].values()}
        chosen.append(min(scans[family], key=lambda n: scans[family][n]))
        say(f"{name}: {family} at its best elsewhere: {chosen[-1]}")
    config = SteeringEvalConfig(
        samples=2048, seeds=2, steps=STEPS, num_draws=(1,), mmd_seeds=0, budget=2e6,
        methods=(*COMPARED, *(c for c in chosen if c not in COMPARED)),
    )  # fmt: skip
    metrics = _measured(model, task.law, reward, config)
    return {**commit_now(), "chosen elsewhere": chosen, "scans elsewhere": scans, "metrics": light(metrics)}


def _measured(model: ExactModel, law: Any, reward: LinearGaussian, config: SteeringEvalConfig) -> dict[str, Any]:
    metrics, _ = evaluate_steering(model, law, reward, config, lambda line: say(f"  {line}"))
    return dict(metrics)


if __name__ == "__main__":
    sys.exit(main())
