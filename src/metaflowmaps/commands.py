"""What each command does, apart from parsing and printing: a function from arguments to a results dictionary."""

import hashlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from metaflowmaps.checkpoint import Checkpoint, load_model, resolve_checkpoint
from metaflowmaps.config import override, validated
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.evaluation.posterior import PosteriorEvalConfig, evaluate_posterior
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.meter import Meter
from metaflowmaps.mixture import GaussianMixture
from metaflowmaps.progress import training_progress
from metaflowmaps.randomness import randn, stream
from metaflowmaps.recipes.gmm import LAW, gmm, paper_mixture
from metaflowmaps.report import figures
from metaflowmaps.report.html import posterior_tables, write_report
from metaflowmaps.runs import claim, pick_device, write_results
from metaflowmaps.sampling import INTEGRATORS, integrate, uniform_grid
from metaflowmaps.training.config import LawConfig, TrainConfig
from metaflowmaps.training.run import build_map, build_objective, run_training
from metaflowmaps.training.state import TrainState
from metaflowmaps.training.teachers import ExactTeacher

Say = Callable[[str], None]
Results = dict[str, Any]
LAWS: dict[str, Callable[[], GaussianMixture]] = {"gmm": paper_mixture}
PICTURE_TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)


# -- train ---------------------------------------------------------------------------------------------


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
    law, parameters = config.law.build(), _parameters(build_map(config))  # what cannot be built claims no directory
    done = claim(out, "train", config.model_dump())
    if done is not None:
        say(f"{out} is complete: {config.steps} steps of {config.recipe}")
        return {**done, "out": str(out / "results.json")}
    with training_progress(config, say) as report:
        result = run_training(
            config,
            out,
            device=target,
            resume=resume,
            report=report,
            on_sample=(lambda model, step: _sample_picture(model, law, step, out)) if law.dim == 2 else None,
        )
    if law.dim == 2:
        model = load_model(result.checkpoint)
        figures.save(_panels(model, law, config.seed), out / "posteriors.png")
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
    parameters = _parameters(shapes)
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


# -- draw ----------------------------------------------------------------------------------------------


def sample(
    checkpoint: str,
    num: int,
    steps: int,
    method: str,
    out: Path | None,
    seed: int,
    device: str,
    invocation: str,
) -> Results:
    """Samples of the data law, by refinement, by composed jumps at context time 0, or by the drift's ODE."""
    if method not in ("refine", "compose", "ode"):
        raise unknown("method", method, ("refine", "compose", "ode"))
    model, found, target = _open(checkpoint, device)
    settings = {"checkpoint": _digest(found), "num": num, "steps": steps, "method": method, "seed": seed}
    out = out or _beside(checkpoint, found, "sample")
    done = claim(out, "sample", settings)
    if done is not None:
        return {**done, "out": str(out / "results.json")}
    g = stream(seed, "sample")
    with torch.no_grad(), Meter(model.network) as meter:
        if method == "refine":
            points = model.generate(num, steps, g)
        else:
            noise = randn((num, *model.event_shape), g, model.dtype, target)
            if method == "compose":
                points = model.push(noise, 0.0, torch.zeros_like(noise), steps)
            else:
                points = integrate(model.drift, noise, uniform_grid(steps))
    _save_tensors(out / "samples.safetensors", {"samples": points})
    if model.event_shape == (2,):
        law = _law_of(found)
        figures.save(
            figures.scatter(points.cpu(), f"{num} samples, {steps} network call(s) each", law),
            out / "samples.png",
        )
    spread = points.flatten(1).std(0).mean() if num > 1 else torch.zeros(())
    metrics = {"num": num, "mean": float(points.mean()), "std": float(spread)}
    results = write_results(
        out, "sample", settings, metrics, meter.cost(), seed=seed, device=target, invocation=invocation
    )
    return {**results, "out": str(out / "results.json")}


def posterior(
    checkpoint: str,
    t: float,
    x: str | None,
    num_draws: int,
    steps: int,
    out: Path | None,
    seed: int,
    device: str,
    invocation: str,
) -> Results:
    """Draws of clean data given one noisy state."""
    model, found, target = _open(checkpoint, device)
    if not 0 <= t <= 1:
        raise InputError(f"--t must lie in [0, 1] (0 is noise, 1 is data), got {t}")
    g = stream(seed, "posterior")
    if x is None:
        x_1 = model.generate(1, 4, g)
        x_t = model.path.interpolate(randn(tuple(x_1.shape), g, model.dtype, target), x_1, t)
    else:
        x_t = _parse_state(x, model).to(target)
    settings = {
        "checkpoint": _digest(found),
        "t": t,
        "x": x_t.flatten().tolist(),
        "num_draws": num_draws,
        "steps": steps,
        "seed": seed,
    }
    out = out or _beside(checkpoint, found, "posterior")
    done = claim(out, "posterior", settings)
    if done is not None:
        return {**done, "out": str(out / "results.json")}
    with torch.no_grad(), Meter(model.network) as meter:
        draws = model.draw(t, x_t, num_draws, steps, g)[:, 0]
    _save_tensors(out / "draws.safetensors", {"draws": draws, "x_t": x_t[0], "t": torch.tensor(t)})
    law = _law_of(found)
    if model.event_shape == (2,):
        picture = figures.posterior_panels(
            model.path,
            law if t < 1 else None,
            [t],
            [x_t[0].cpu()],
            [draws.cpu()],
            f"{num_draws} posterior draws",
        )
        figures.save(picture, out / "posteriors.png")
    metrics: dict[str, Any] = {
        "num_draws": num_draws,
        "mean": draws.mean(0).flatten().tolist(),
        "std": (draws.std(0) if num_draws > 1 else torch.zeros_like(draws[0])).flatten().tolist(),
    }
    if law is not None:
        exact = law.posterior(model.path, t, x_t.double().cpu())
        metrics["exact_mean"] = exact.mean[0].tolist()
        metrics["exact_std"] = exact.variance[0].sqrt().tolist()
    results = write_results(
        out, "posterior", settings, metrics, meter.cost(), seed=seed, device=target, invocation=invocation
    )
    return {**results, "out": str(out / "results.json")}


# -- judge ---------------------------------------------------------------------------------------------


def eval_posterior(
    checkpoint: str,
    law: str,
    samples: int,
    out: Path | None,
    settings: Iterable[str],
    seed: int,
    device: str,
    invocation: str,
    say: Say,
) -> Results:
    """Relative sliced W2 at each t for the map and for GLASS with the map's own drift."""
    if law not in LAWS:
        raise unknown("law", law, LAWS)
    config = override(validated(PosteriorEvalConfig, {"samples": samples, "seed": seed}), settings)
    model, found, target = _open(checkpoint, device)
    trained_on = found.config.get("training", {}).get("law")
    if trained_on not in (None, LAW.model_dump()):
        raise InputError(f"{checkpoint} was trained on another law than --law {law}: judge it with its own")
    if config.glass_method not in INTEGRATORS:
        raise unknown("glass_method", config.glass_method, INTEGRATORS)
    out = out or _beside(checkpoint, found, f"eval-posterior-{config.samples}")
    full = {"checkpoint": _digest(found), "law": law, **config.model_dump()}
    done = claim(out, "eval posterior", full)
    if done is not None:
        return {**done, "out": str(out / "results.json")}
    began = time.perf_counter()
    mixture = LAWS[law]()
    measured = evaluate_posterior(model, mixture, config, lambda line: say(f"eval posterior: {line}"))
    metrics = measured.metrics()
    cost = {"seconds": time.perf_counter() - began, "seconds_by_sampler": measured.seconds}
    figures.save(_panels(model, mixture, seed), out / "posteriors.png")
    figures.save(figures.error_against_calls(metrics), out / "error-against-calls.png")
    results = write_results(out, "eval posterior", full, metrics, cost, seed=seed, device=target, invocation=invocation)
    return {**results, "out": str(out / "results.json")}


def print_posterior_tables(metrics: dict[str, Any]) -> None:
    """The tables of ``mfm eval posterior`` as text."""
    for title, (head, rows) in posterior_tables(metrics).items():
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        print(f"\n{title}")
        for row in [head, *rows]:
            print(
                "  ".join(
                    cell.ljust(w) if i == 0 else cell.rjust(w)
                    for i, (cell, w) in enumerate(zip(row, widths, strict=True))
                )
            )
    print()


def demo(out: Path, seed: int, say: Say) -> tuple[Path, Results]:
    """Train, judge, report."""
    config = resolve_training(gmm(fast=True), [], seed, None)
    say(f"training the meta flow map of a three-mode mixture ({config.steps} steps) …")
    train(config, out / "train", "cpu", "auto", "mfm train gmm --fast", say)
    say("judging its posterior draws against the exact posteriors …")
    settings = ["sets=8", "other_contexts=4"]
    results = eval_posterior(
        str(out / "train"), "gmm", 8192, out / "eval", settings, seed, "cpu",
        "mfm eval posterior " + " ".join([str(out / "train"), *(f"--set {s}" for s in settings)]), say,
    )  # fmt: skip
    return write_report([out / "eval", out / "train"], out / "report.html"), results


# -- internals -----------------------------------------------------------------------------------------


def _open(checkpoint: str, device: str) -> tuple[MetaFlowMap, Checkpoint, torch.device]:
    target = pick_device(device)
    return load_model(checkpoint).to(target), resolve_checkpoint(checkpoint), target


def _beside(checkpoint: str, found: Checkpoint, name: str) -> Path:
    """Results go into the run that made the checkpoint; from elsewhere, under runs/."""
    run = found.path.parent.parent
    return run / name if (run / "run.json").exists() else Path("runs") / f"{Path(checkpoint).name}-{name}"


def _law_of(found: Checkpoint) -> GaussianMixture | None:
    law = found.config.get("training", {}).get("law")
    return None if law is None else validated(LawConfig, law).build()


def _parse_state(text: str, model: MetaFlowMap) -> torch.Tensor:
    try:
        values = [float(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError:
        raise InputError(f"--x takes numbers separated by commas, got {text!r}") from None
    size = 1
    for extent in model.event_shape:
        size *= extent
    if len(values) != size or not all(abs(v) < float("inf") for v in values):
        raise InputError(f"--x needs {size} finite numbers for states of shape {model.event_shape}, got {text!r}")
    return torch.tensor(values, dtype=model.dtype).reshape(1, *model.event_shape)


def _panels(model: MetaFlowMap, law: GaussianMixture, seed: int) -> Any:
    """Draws for one noisy state a time: of eight seeded ones, the one whose posterior is the widest."""
    contexts, draws = [], []
    for t in PICTURE_TIMES:
        g = stream(seed, "picture", str(t))
        x_1 = law.sample(8, g)
        candidates = model.path.interpolate(randn(tuple(x_1.shape), g), x_1, t)
        widest = int(law.posterior(model.path, t, candidates).variance.sum(-1).argmax())
        x_t = candidates[widest : widest + 1].to(model.device, model.dtype)
        with torch.no_grad():
            draws.append(model.draw(t, x_t, 1000, generator=g)[:, 0].cpu())
        contexts.append(x_t[0].cpu())
    title = "Draws of the map in one call, exact posteriors as contours"
    return figures.posterior_panels(model.path, law, PICTURE_TIMES, contexts, draws, title)


def _sample_picture(model: MetaFlowMap, law: GaussianMixture, step: int, out: Path) -> None:
    figures.save(_panels(model, law, 0), out / "samples" / f"step-{step:08d}.png")


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # to bytes first: writing them here gives an OSError, which the command line knows how to report
        temporary.write_bytes(save({name: value.contiguous().cpu() for name, value in tensors.items()}))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _parameters(model: MetaFlowMap) -> int:
    return sum(p.numel() for p in model.parameters())


def _digest(found: Checkpoint) -> str:
    """What identifies a checkpoint: the hash of its manifest, which holds the hash of everything else."""
    return hashlib.sha256((found.path / "manifest.json").read_bytes()).hexdigest()
