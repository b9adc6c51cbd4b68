"""mfm train."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from metaflowmaps.checkpoint import load_model
from metaflowmaps.commands.shared import Results, Say, begun, count_parameters, panels, sample_picture
from metaflowmaps.config import override, validated
from metaflowmaps.errors import InputError
from metaflowmaps.progress import training_progress
from metaflowmaps.report import figures
from metaflowmaps.runs import pick_device, write_results
from metaflowmaps.training.config import TrainConfig
from metaflowmaps.training.run import build_map, build_objective, run_training
from metaflowmaps.training.state import TrainState
from metaflowmaps.training.teachers import ExactTeacher


def resolve_training(
    base: TrainConfig, settings: Iterable[str], seed: int | None, max_steps: int | None
) -> TrainConfig:
    """The configuration after --set, --seed and --max-steps."""
    config = override(base, settings)
    changes: dict[str, Any] = {}
    if seed is not None:
        changes["seed"] = seed
    if max_steps is not None:
        changes["steps"] = min(config.steps, max_steps)
    return validated(TrainConfig, {**config.model_dump(), **changes})


def train(config: TrainConfig, out: Path, device: str, resume: str, invocation: str, say: Say) -> Results:
    """Train in ``out``; complete runs report, interrupted ones go on."""
    target = pick_device(device)
    torch.set_num_threads(config.threads)
    law, parameters = (
        config.law.build(),
        count_parameters(build_map(config)),
    )  # what cannot be built claims no directory
    done = begun(out, "train", config.model_dump())
    if done is not None:
        say(f"{out} is complete: {config.steps} steps of {config.recipe}")
        return done
    with training_progress(config, say) as report:
        result = run_training(
            config,
            out,
            device=target,
            resume=resume,
            report=report,
            on_sample=(lambda model, step: sample_picture(model, law, step, out)) if law.dim == 2 else None,
        )
    if law.dim == 2:
        model = load_model(result.checkpoint)
        figures.save(panels(model, law, config.seed), out / "posteriors.png")
    figures.save(figures.training_curve(out / "metrics.jsonl"), out / "training.png")
    results = write_results(
        out,
        "train",
        config.model_dump(),
        {"loss": result.loss, "parameters": parameters},
        {"seconds": result.seconds, "steps": result.step},
        seed=config.seed,
        device=target,
        invocation=invocation,
    )
    return {**results, "out": str(out / "results.json")}


def dry_run(config: TrainConfig, device: str) -> Results:
    """Resolve the configuration, count parameters and memory on the meta device, time one step, write nothing."""
    target = pick_device(device)
    torch.set_num_threads(config.threads)
    with torch.device("meta"):
        shapes = build_map(config)
    parameters = count_parameters(shapes)
    # Adam keeps two copies of the weights; SOAP two more square factors, with their eigenvectors, for each matrix
    state = 2 * parameters
    if config.optimizer.name == "soap":
        state += sum(2 * (p.shape[0] ** 2 + p[0].numel() ** 2) for p in shapes.parameters() if p.ndim > 1)
    memory = {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "ema": 4 * parameters,
        "optimizer": 4 * state,
    }
    model = build_map(config).to(target)
    teacher = ExactTeacher(model.path, config.law.build()) if config.teacher != "none" else None
    objective = build_objective(config, teacher)
    optimizer = TrainState(model, config.optimizer).optimizer
    seconds = 0.0
    for step in range(3):  # the first ones allocate and warm up
        began = time.perf_counter()
        loss = objective(model, objective.batch(model, step).to(target)).mean()
        if not bool(loss.isfinite()):
            value = float(loss.detach())
            raise InputError(f"the loss of a first step is {value}: check optimizer.lr, model.data_std and the law")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
    metrics = {
        "parameters": parameters,
        "memory_bytes": sum(memory.values()),
        **{f"memory_{part}_bytes": size for part, size in memory.items()},
        "steps": config.steps,
        "seconds_per_step": seconds,
        "expected_seconds": seconds * config.steps,
    }
    return {
        "schema": 1,
        "command": "train",
        "dry_run": True,
        "config": config.model_dump(),
        "metrics": metrics,
        "cost": {},
    }
