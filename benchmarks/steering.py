"""Steering: every method on the paper's inverse problem and in 16 dimensions, the value, and what recycling is worth.

Parts are kept one by one in ``results/``; a part that is there already with the same settings is not measured again.
"""

import json
from itertools import pairwise
from typing import Any

import torch

from benchmarks import benchmark_figures
from benchmarks.common import RESULTS, keep, say, trained
from benchmarks.provenance import commit_now
from metaflowmaps.draws import DrawOptions, make_draws
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.steering_error import SteeringEvalConfig, evaluate_steering
from metaflowmaps.lab.evaluate.value_error import ValueEvalConfig, evaluate_value
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.lab.figures import steering_figures
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.path import LinearPath
from metaflowmaps.posterior import ExactModel
from metaflowmaps.random import randn, stream
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.recipes.mixture16 import mixture_16d
from metaflowmaps.recipes.tasks import steering_task
from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.sampling import uniform_grid
from metaflowmaps.steering.recycling import DrawPool
from metaflowmaps.value import ess, free_shift

# the cheapest rivals: one-step samples, accepted, resampled, or the best of some
CHEAP = ("rejection", "resampling-16", "resampling-64", "best-of-n-map-16", "best-of-n-map-1000")
MAIN = (
    "none", *CHEAP, "mfm-g", "mfm-gf", "mfm-smc", "mfm-anneal", "mfm-search", "dps", "tds", "best-of-n", "glass",
    "exact",
)  # fmt: skip
# as published, or with one choice changed
VARIED = (
    "mfm-g-plain", "mfm-g-plain-clip", "mfm-gf-plain", "mfm-gf-denoise", "mfm-smc-plain", "mfm-smc-unguided",
    "mfm-search-particle",
)  # fmt: skip
SDE = {"process": "sde", "methods": ("none", "rejection", "resampling-16", "mfm-g", "mfm-gf", "exact")}
# budgets keep a cell under a minute on one core; a cell that they cut says on how many samples it ran
PARTS: dict[str, dict[str, Any]] = {
    "ode, 50 steps": {
        "steps": 50, "methods": MAIN, "num_draws": (1, 2, 4, 8, 16, 32, 64, 128), "budget": 2e6
    },
    "ode, 50 steps, variants": {"steps": 50, "methods": VARIED, "num_draws": (1, 4, 16, 64), "budget": 2e6},
    "ode, 250 steps": {"steps": 250, "seeds": 1, "methods": MAIN, "num_draws": (1, 4, 16), "budget": 9.3e6},
    "sde, 50 steps": {"steps": 50, "num_draws": (1, 4, 16), "budget": 2e6, **SDE},
    "sde, 250 steps": {"steps": 250, "num_draws": (4,), "budget": 9.3e6, **SDE},
    "ode, 1000 steps": {
        "steps": 1000, "seeds": 1, "num_draws": (4,), "budget": 2e7,
        "methods": ("rejection", "resampling-16", "mfm-g", "mfm-gf", "mfm-smc", "tds", "exact"),
    },
    "sde, 1000 steps": {"steps": 1000, "seeds": 1, "num_draws": (4,), "budget": 2e7, **SDE},
}  # fmt: skip
SEEDS: dict[str, dict[str, Any]] = {
    "ode, 50 steps": {
        "steps": 50, "seeds": 20, "methods": ("rejection", "resampling-16", "mfm-gf", "mfm-g"), "num_draws": (4,)
    },
    "ode, 250 steps": {"steps": 250, "seeds": 8, "methods": ("mfm-gf",), "num_draws": (4,)},
    "particles, 50 steps": {"steps": 50, "seeds": 20, "methods": ("mfm-smc", "tds"), "num_draws": (4,)},
    "particles, 250 steps": {
        "steps": 250, "seeds": 4, "methods": ("mfm-smc", "tds"), "num_draws": (4,), "budget": 9.3e6,
    },
}  # fmt: skip
IN_16D = (
    "none", *CHEAP, "mfm-g", "mfm-g-plain", "mfm-gf", "mfm-gf-plain", "mfm-smc", "mfm-anneal", "dps", "tds",
    "best-of-n", "exact",
)  # fmt: skip


def with_tuned(problem: str, parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """DPS and TDS also as ``python -m benchmarks rivals`` has tuned them for a problem of this kind."""
    chosen = json.loads((RESULTS / "rivals.json").read_text())["problems"][problem]["chosen elsewhere"]
    tuned = {label: [n for n in chosen if n.partition("-")[0] in part["methods"]] for label, part in parts.items()}
    return {label: {**part, "methods": (*part["methods"], *tuned[label])} for label, part in parts.items()}


def gmm_inverse() -> None:
    """Benchmark 1 and 4: the paper's inverse problem."""
    task = steering_task("gmm-inverse")
    run = trained(gmm(), "fidelity-default")
    model = MetaFlowMap.from_pretrained(run.checkpoint)
    measured = _parts("steering", model, task.law, task.reward(""), with_tuned("plane", PARTS))
    main = measured["ode, 50 steps"]
    figures.save(steering_figures.error_against_cost(main), RESULTS / "steering-error.png")
    figures.save(benchmark_figures.reward_against_cost(main), RESULTS / "steering-reward.png")


def gmm_inverse_seeds() -> None:
    """Benchmark 1 again where one seed says little: N = 4, and particle methods."""
    task = steering_task("gmm-inverse")
    model = MetaFlowMap.from_pretrained(trained(gmm(), "fidelity-default").checkpoint)
    _parts("steering-seeds", model, task.law, task.reward(""), with_tuned("plane", SEEDS))


def in_16d() -> None:
    """Benchmark 2: 16 dimensions, three sharpnesses."""
    task = steering_task("mixture-16d")
    model = MetaFlowMap.from_pretrained(trained(mixture_16d(), "mixture-16d").checkpoint)
    for name, reward in task.rewards.items():
        part = {"steps": 50, "seeds": 1, "methods": IN_16D, "num_draws": (1, 4, 16), "budget": 2e6}
        parts = with_tuned(f"16-D {name}", {"ode, 50 steps": part})
        _parts(f"steering-16d-{name}", model, task.law, reward, parts)


def _parts(
    name: str, model: MetaFlowMap, law: GaussianMixture, reward: LinearGaussian, parts: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    torch.set_num_threads(1)  # two of these may run side by side on two cores
    file = RESULTS / f"{name}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    kept = {label: {"commit": before.get("commit"), **part} for label, part in before.get("parts", {}).items()}
    for label, settings in parts.items():
        config = SteeringEvalConfig(**{"budget": 1e9, **settings})
        if kept.get(label, {}).get("config") != json.loads(config.model_dump_json()):
            say(f"{name}: {label}")
            metrics, _ = evaluate_steering(model, law, reward, config, lambda line: say(f"  {line}"), model.data_std)
            settings_kept = json.loads(config.model_dump_json())
            kept[label] = {**commit_now(), "config": settings_kept, "metrics": light(metrics)}
            keep(name, f"python -m benchmarks {'steering-16d' if '16d' in name else name}", {"parts": kept})
    return {label: part["metrics"] for label, part in kept.items()}


def light(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without the trajectories, rounded: these files live in the repository."""
    methods = {
        name: {key: {k: _rounded(v) for k, v in cell.items() if k != "trajectory"} for key, cell in by.items()}
        for name, by in metrics["methods"].items()
    }
    return {**{k: _rounded(v) for k, v in metrics.items() if k != "methods"}, "methods": methods}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def value() -> None:
    """Benchmark 3: V̂ of map and GLASS against the exact value."""
    task = steering_task("gmm-inverse")
    model = MetaFlowMap.from_pretrained(trained(gmm(), "fidelity-default").checkpoint)
    out = {}
    for label, settings in (
        ("euler", {}),
        ("midpoint, angle", {"glass_method": "midpoint", "glass_spacing": "angle", "glass_steps": (1, 2, 4, 8, 16)}),
    ):
        metrics = evaluate_value(model, task.law, task.reward(""), ValueEvalConfig(**settings), say)
        out[label] = _rounded(metrics)
        if label == "euler":
            figures.save(steering_figures.value_error(metrics), RESULTS / "value.png")
    keep("value", "python -m benchmarks value", out)


# -- recycling -----------------------------------------------------------------------------------------


LENGTHS = (2, 4, 8, 16)


def recycling() -> None:
    """What recycled draws are worth as the dimension grows: exact draws, exact trajectories, error of the shift."""
    out = {}
    for dim in (2, 8, 32, 128, 512):
        for steps in (50, 250):
            say(f"recycling: {dim} dimensions, {steps} steps")
            out[f"{dim}, {steps}"] = {length: _recycled(dim, steps, length) for length in (1, *LENGTHS)}
    keep("recycling", "python -m benchmarks recycling", {"dimension, steps -> L -> error and effective draws": out})


@torch.no_grad()
def _recycled(dim: int, steps: int, length: int, num_draws: int = 4, batch: int = 128) -> dict[str, float]:
    """Root-mean-square error of Σ (w − ω) x_1 along exactly steered trajectories of a three-mode mixture."""
    means = torch.zeros(3, dim)
    means[0], means[2] = -3.0 / dim**0.5, 3.0 / dim**0.5
    law, path = GaussianMixture(means, 0.5), LinearPath()
    a = torch.nn.functional.normalize(torch.randn(dim, generator=stream(0, "along", dim)), dim=0)
    target, noise = 1.0, 0.5
    reward = LinearGaussian(a, target, noise)
    model, pool = ExactModel(path, law), DrawPool(path, length)
    g = stream(0, "recycling", dim, steps)
    x = randn((batch, dim), g)
    errors, effective = [], []
    for t, u in pairwise(uniform_grid(steps).tolist()):
        drawn = make_draws(model, lambda x, cond=None: reward(x), t, x, DrawOptions(num_draws), g)
        log_base = pool.add(t, x, drawn)
        posterior = law.posterior(path, t, x)
        # one observed coordinate a·x_1 ~ N(a·m_k, v) in each component: the tilt of an isotropic mixture
        v, gap = 0.5 * (1 - t) ** 2 / ((1 - t) ** 2 + 0.5 * t**2), target - posterior.means.to(x) @ a
        weights = (posterior.weights.to(x).log() - gap.square() / (2 * (noise**2 + v))).softmax(-1)
        moved = posterior.means.to(x) + (v / (noise**2 + v) * gap)[..., None] * a
        exact = (weights[..., None] * moved).sum(1) - posterior.mean.to(x)
        if t > 0.05:  # a pool has to fill first
            errors.append((free_shift(pool.pooled(), log_base) - exact).square().sum(1).mean())
            effective.append(ess(log_base.exp()).mean())
        x = x + (u - t) * (model.drift(t, x) + float(path.tilt_gain(t)) * exact)
    return {"error": float(torch.stack(errors).mean().sqrt()), "draws": float(torch.stack(effective).mean())}
