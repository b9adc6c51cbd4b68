"""Bias and variance of tuned drifts on a navigation task in the plane whose optimal drift is known.

Every method trains runs of several seeds from one base, with the same network, states, batches and optimizer, for the
same processor time; see :mod:`benchmarks.control_estimators` for the task and for what is measured. A run's raw
figures are kept in ``runs/bench/control/parts`` and not made again.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from benchmarks import control_report as said
from benchmarks.common import RESULTS, RUNS, say, table, trained
from benchmarks.control_estimators import (
    DATA_STD,
    LAW,
    Exact,
    Navigation,
    PlaneJudge,
    Probes,
    decomposed,
    drift_flow,
    implied_flow,
    make_probes,
    target_errors,
)
from metaflowmaps.cli.context import Context
from metaflowmaps.cli.results import Request
from metaflowmaps.finetuning import MFMFT, AdjointMatching, DRaFT, SelfNormalised, TuningObjective
from metaflowmaps.finetuning.tune import make_objective, make_problem, make_student
from metaflowmaps.finetuning.tuning_config import FinetuneConfig, MetersConfig
from metaflowmaps.finetuning.tuning_problem import TuningProblem
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.networks import MLPConfig
from metaflowmaps.random import randn, stream
from metaflowmaps.sampling import integrate, uniform_grid
from metaflowmaps.training.loop import Watch, train
from metaflowmaps.training.train_config import ModelConfig, OptimizerConfig, TimesConfig, TrainConfig
from metaflowmaps.work.config import Config

OUT = RUNS / "control"
COMMAND = "python -m benchmarks control"
LOOKS = 64  # a run is looked at after 1/64, 1/32, 1/16 … of its steps

METHODS: dict[str, TuningObjective] = {
    **{f"mfm-ft {form} {n}": MFMFT(n, form) for form in ("blend", "gradient", "gradient-free") for n in (1, 4)},
    **{f"self-normalised gradient {n}": SelfNormalised(n, "gradient") for n in (1, 4, 16)},
    "self-normalised gradient-free 4": SelfNormalised(4, "gradient-free"),
    "self-normalised gradient-free 64": SelfNormalised(64, "gradient-free"),
    "self-normalised blend 16": SelfNormalised(16, "blend"),
    "adjoint-matching": AdjointMatching(),
    "draft": DRaFT(),
}
# one optimizer for all, but for this: at the others' rate adjoint matching ends worse than in mid-run
RATES = {"adjoint-matching": 1e-3}


class ControlConfig(Config):
    """How long, how often, and how finely it is measured."""

    methods: tuple[str, ...] = tuple(METHODS)
    seconds: float = Field(15.0, gt=0)  # of processor time a run, on one core
    seeds: int = Field(4, ge=2)
    base_steps: int = Field(8000, ge=1)
    batch_size: int = Field(512, ge=1)
    warmup_steps: int = Field(20, ge=0)  # the slowest method has no more than some hundred steps
    probes: int = Field(1024, ge=2)
    samples: int = Field(2048, ge=64)
    ode_steps: int = Field(250, ge=1)
    target_probes: int = Field(192, ge=2)
    target_draws: int = Field(4096, ge=128)
    last: float = 0.9936


def base_config(config: ControlConfig) -> TrainConfig:
    """The base: a map of the law, taught by its exact auxiliary drift."""
    return TrainConfig(
        recipe="navigation",
        data=LAW,
        model=ModelConfig(data_std=DATA_STD, network=MLPConfig(width=128, depth=4)),
        times=TimesConfig(focus=(0.1, 0.6), focus_share=0.5),
        steps=config.base_steps,
        threads=1,
    )


def main(**settings: Any) -> None:
    """benchmarks/results/control.json and control-*.png."""
    config, began = ControlConfig(**settings), time.perf_counter()
    base = MetaFlowMap.from_pretrained(trained(base_config(config), f"control-base-{config.base_steps}").checkpoint)
    torch.set_num_threads(1)
    exact = Exact(LAW.law(), base.path, Navigation())
    probes = make_probes(exact, base, config.probes, config.last)
    runs = {name: _runs(name, config, base, probes) for name in config.methods}
    metrics, samples = _measured(config, exact, base, probes, runs)
    metrics["targets"] = _targets(config, exact, base)
    metrics |= said.words(config.model_dump(), metrics)
    for old in OUT.glob("*.png"):
        old.unlink()
    drawn = {
        "arena": said.arena(exact, metrics, samples),
        "error": said.error_against_seconds(metrics),
        "parts": said.bias_and_variance(metrics),
    }
    for name, figure in drawn.items():
        figures.save(figure, OUT / f"{name}.png")
    trained_for = sum(run["seconds"][-1] for kept in runs.values() for run in kept)
    cost = {"seconds": trained_for, "seconds_of_last_call": time.perf_counter() - began}  # parts are kept between calls
    settings = {"task": "navigation", **config.model_dump(mode="json")}
    Request(Context(invocation=COMMAND), "control", settings, OUT).write(metrics, cost, "cpu")
    RESULTS.mkdir(exist_ok=True)
    shutil.copy(OUT / "results.json", RESULTS / "control.json")
    for name in drawn:
        shutil.copy(OUT / f"{name}.png", RESULTS / f"control-{name}.png")
    for title, words in metrics["tables"].items():
        print(f"\n{title}\n\n{table(words['head'], [[_cell(c) for c in row] for row in words['rows']])}")
    say(metrics["summary"])


# -- runs --------------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Processor time of this process, less what is spent in pauses. With one thread that is time on an idle core."""

    def __init__(self) -> None:
        self.began, self.paused = time.process_time(), 0.0

    def seconds(self) -> float:
        return time.process_time() - self.began - self.paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        start = time.process_time()
        yield
        self.paused += time.process_time() - start


def _runs(name: str, config: ControlConfig, base: MetaFlowMap, probes: Probes) -> list[dict[str, Any]]:
    """The runs of a method, one a seed, with as many steps as its budget pays for."""
    parts = OUT / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    kept: list[dict[str, Any]] = []
    settings = _settings(name, config, 0, LOOKS).model_dump(mode="json")
    key = json.dumps([settings, config.model_copy(update={"methods": (), "seeds": 2}).model_dump(mode="json")])
    for seed in range(config.seeds):
        file = parts / f"{name.replace(' ', '-')}-{seed}.pt"
        run = torch.load(file) if file.exists() else None
        if run is None or run["key"] != key:
            steps = kept[0]["steps"][-1] if kept else _affordable(name, config, base)
            run = {"key": key, **_run(name, config, base, probes, seed, steps)}
            torch.save(run, file)
            error = float((run["flows"][-1] - probes.tilted).square().sum(1).mean())
            say(f"{name}, seed {seed}: {steps} steps, {run['seconds'][-1]:.1f} s, error {error:.4f}")
        kept.append(run)
    return kept


def _settings(name: str, config: ControlConfig, seed: int, steps: int) -> FinetuneConfig:
    return FinetuneConfig(
        checkpoint="control-base", checkpoint_sha256="", reward="navigation", map="none", last=config.last,
        optimizer=OptimizerConfig(  # a constant rate: the averaged weights are worth looking at anywhere along the run
            lr=RATES.get(name, 3e-3), schedule="constant", clip=10.0, warmup_steps=config.warmup_steps
        ), steps=steps,
        batch_size=config.batch_size, seed=seed, threads=1, log_every=10**9, checkpoint_every=10**9,
        sample_every=max(1, steps // LOOKS), meters=MetersConfig(every=0), method=METHODS[name],
    )  # fmt: skip


def _affordable(name: str, config: ControlConfig, base: MetaFlowMap) -> int:
    """A multiple of LOOKS steps that take the budget, less what has to be made first."""
    scratch = OUT / "scratch"
    marks: list[float] = []
    watch = Stopwatch()
    settings = _settings(name, config, 10**6, 4 * LOOKS).model_copy(update={"sample_every": 4})

    def look(model: MetaFlowMap, step: int) -> bool:
        marks.append(watch.seconds())
        return step >= 12 and marks[-1] - marks[0] > 2.5

    _train(settings, base, scratch, look)
    a_step = (marks[-1] - marks[0]) / (4 * (len(marks) - 1))
    start = max(0.0, marks[0] - 4 * a_step)
    return LOOKS * max(1, round((config.seconds - start) / a_step / LOOKS))


def _train(settings: FinetuneConfig, base: MetaFlowMap, out: Path, look: Any) -> TuningProblem:
    shutil.rmtree(out, ignore_errors=True)
    problem = make_problem(settings, base, Navigation())
    objective = make_objective(settings, problem)
    train(make_student(settings, base), objective, settings, out, watch=Watch(on_sample=look))
    shutil.rmtree(out, ignore_errors=True)
    return problem


def _run(name: str, config: ControlConfig, base: MetaFlowMap, probes: Probes, seed: int, steps: int) -> dict[str, Any]:
    """The averaged model's drift at the probes at times along one run, and samples at its end."""
    one_step, made = not METHODS[name].tunes_drift, {"steps": [], "seconds": [], "flows": []}
    settings = _settings(name, config, seed, steps)
    watch = Stopwatch()
    state: dict[str, Any] = {}

    def look(model: MetaFlowMap, step: int) -> None:
        part = step // settings.sample_every
        if part & (part - 1):  # powers of two only
            return
        with watch.pause():
            made["steps"].append(step)
            made["flows"].append(implied_flow(model, probes) if one_step else drift_flow(model, probes))
            if step == steps:
                state["samples"] = _sampled(model, config, seed, one_step)
        made["seconds"].append(watch.seconds())

    problem = _train(settings, base, OUT / "scratch", look)
    return {**made, "flows": torch.stack(made["flows"]), **state, "calls": dict(problem.calls)}


@torch.no_grad()
def _sampled(model: MetaFlowMap, config: ControlConfig, seed: int, one_step: bool) -> Tensor:
    g = stream(seed, "control-samples")
    if one_step:
        return model.generate(config.samples, 1, g)
    noise = randn((config.samples, *model.event_shape), g, model.dtype)
    return integrate(model.drift, noise, uniform_grid(config.ode_steps))


# -- what they are worth -----------------------------------------------------------------------------------------------


def _measured(
    config: ControlConfig, exact: Exact, base: MetaFlowMap, probes: Probes, runs: dict[str, list[dict[str, Any]]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    judge = PlaneJudge(exact, config.samples)
    methods, samples = {}, {}
    for name, kept in runs.items():
        flows = torch.stack([run["flows"] for run in kept])  # (S, looks, n, 2)
        curve = [decomposed(flows[:, i], probes.tilted) for i in range(flows.shape[1])]
        sets = [run["samples"] for run in kept]
        methods[name] = {
            "steps": kept[0]["steps"],
            "seconds": [_mean([run["seconds"][i] for run in kept]) for i in range(len(curve))],
            "bias_squared": [part.bias_squared for part in curve],
            "variance": [part.variance for part in curve],
            "total": [part.total for part in curve],
            "shift": decomposed(flows[:, -1], probes.tilted, probes.gain)._asdict(),
            "by_time": [
                decomposed(flows[:, -1, part], probes.tilted[part])._asdict()
                for part in torch.arange(len(probes.t)).tensor_split(said.QUARTERS)
            ],
            "ratio_by_seed": [judge([x])["ratio"] for x in sets],
            **judge(sets),
            "network_calls_a_step": kept[0]["calls"]["forwards"] / kept[0]["steps"][-1],
            "reward_calls_a_step": kept[0]["calls"]["reward_calls"] / kept[0]["steps"][-1],
        }
        samples[name] = torch.cat(sets)
    untuned = [_sampled(base, config, seed, False) for seed in range(config.seeds)]
    held_out = [exact.sample(config.samples, stream(seed, "held-out")) for seed in range(config.seeds)]
    samples = {"base": torch.cat(untuned), **samples}
    metrics = {
        "methods": methods,
        "base": {
            "error": _squared(drift_flow(base, probes), probes.base),
            "total": _squared(drift_flow(base, probes), probes.tilted),
            "shift_total": _squared(drift_flow(base, probes), probes.tilted, probes.gain),
            **judge(untuned),
        },
        "exact": {**judge(held_out), "mean_reward": exact.mean_reward(), "ess_share": exact.ess_share()},
    }
    return metrics, samples


def _squared(flow: Tensor, target: Tensor, gain: Tensor | float = 1.0) -> float:
    return float(((flow - target) * gain).square().sum(1).mean())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


FORMS = ("gradient", "gradient-free", "blend")
DRAWS = (1, 4, 16, 64)


def _targets(config: ControlConfig, exact: Exact, base: MetaFlowMap) -> dict[str, Any]:
    """Bias and variance of targets, without training: form -> draws -> {plain, weighted}."""
    probes = make_probes(exact, base, config.target_probes, config.last, seed=1)
    settings = _settings("mfm-ft blend 4", config, 0, 64)
    problem = make_problem(settings, base, Navigation())
    states = problem.at(probes.t.float(), probes.x.float(), {})
    draws = problem.draws(states, config.target_draws, True, stream(0, "targets"))
    out: dict[str, Any] = {}
    for form in FORMS:
        objective = make_objective(settings.model_copy(update={"method": MFMFT(4, form)}), problem)
        if form == "blend":  # its λ is learned along a run; at the base it is learned here, and then stays
            for step in range(200):
                objective.batch(base, step)
        out[form] = {}
        for n in DRAWS:
            errors = target_errors(problem, objective, probes, draws, n)
            out[form][str(n)] = {"plain": errors.plain._asdict(), "weighted": errors.weighted._asdict()}
        say(f"targets, {form}: {[round(out[form][str(n)]['plain']['bias_squared'], 4) for n in DRAWS]}")
    return out


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
