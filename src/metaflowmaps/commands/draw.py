"""mfm sample and mfm posterior."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from metaflowmaps.commands import pictures
from metaflowmaps.commands.shared import Results, begun, beside, digest, law_of, open_model, save_tensors
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.meter import Meter
from metaflowmaps.randomness import RowNoise, fresh_seeds, randn, stream
from metaflowmaps.report import figures
from metaflowmaps.runs import write_results
from metaflowmaps.sampling import integrate, uniform_grid


def sample(
    checkpoint: str,
    num: int,
    steps: int,
    method: str,
    out: Path | None,
    seed: int,
    device: str,
    invocation: str,
    only: Sequence[int] = (),
) -> Results:
    """Samples of the data law, by refinement, by composed jumps at context time 0, or by the drift's ODE.

    ``only``: the samples with these seeds, num of them.
    """
    if method not in ("refine", "compose", "ode"):
        raise unknown("method", method, ("refine", "compose", "ode"))
    model, found, target = open_model(checkpoint, device, needs_map=method != "ode")
    settings = {"checkpoint": digest(found), "num": num, "steps": steps, "method": method, "seed": seed}
    if only:
        settings["only"] = list(only)
    out = out or beside(checkpoint, found, "sample")
    done = begun(out, "sample", settings)
    if done is not None:
        return done
    seeds = torch.tensor(only) if only else fresh_seeds(num, stream(seed, "sample"))
    with torch.no_grad(), Meter(model.network) as meter:
        if method == "refine":
            points = model.generate(num, steps, seeds=seeds)
        else:
            noise = RowNoise(seeds.to(target), "generate").normal(model.event_shape, dtype=model.dtype)
            if method == "compose":
                points = model.push(noise, 0.0, torch.zeros_like(noise), steps)
            else:
                points = integrate(model.drift, noise, uniform_grid(steps))
    save_tensors(out / "samples.safetensors", {"samples": points, "seeds": seeds})
    if model.event_shape == (2,):
        law = law_of(found)
        figures.save(
            figures.scatter(points.cpu(), f"{num} samples, {steps} network call(s) each", law),
            out / "samples.png",
        )
    elif len(model.event_shape) == 3:
        pictures.samples_grid(points, f"{num} samples, {steps} network call(s) each", out / "samples.png")
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
    only: Sequence[int] = (),
) -> Results:
    """Draws of clean data given one noisy state. ``only``: the draws with these seeds, num_draws of them."""
    model, found, target = open_model(checkpoint, device)
    if not 0 <= t <= 1:
        raise InputError(f"--t must lie in [0, 1] (0 is noise, 1 is data), got {t}")
    g = stream(seed, "posterior")
    if x is None:
        x_1 = model.generate(1, 4, g)
        x_t = model.path.interpolate(randn(tuple(x_1.shape), g, model.dtype, target), x_1, t)
    else:
        x_t = _parse_state(x, model).to(target)
    settings = {
        "checkpoint": digest(found),
        "t": t,
        "x": x_t.flatten().tolist(),
        "num_draws": num_draws,
        "steps": steps,
        "seed": seed,
        **({"only": list(only)} if only else {}),
    }
    out = out or beside(checkpoint, found, "posterior")
    done = begun(out, "posterior", settings)
    if done is not None:
        return done
    seeds = torch.tensor(only) if only else fresh_seeds(num_draws, stream(seed, "posterior-draws"))
    with torch.no_grad(), Meter(model.network) as meter:
        noise = RowNoise(seeds.to(target), "posterior").normal(model.event_shape, dtype=model.dtype)
        draws = model.push(noise, t, x_t.expand_as(noise), steps)
    save_tensors(out / "draws.safetensors", {"draws": draws, "seeds": seeds, "x_t": x_t[0], "t": torch.tensor(t)})
    law = law_of(found)
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
    elif len(model.event_shape) == 3:
        pictures.posterior_grid(x_t[0].cpu(), draws.cpu(), t, out / "posteriors.png")
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
