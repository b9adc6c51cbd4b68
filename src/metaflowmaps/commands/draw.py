"""mfm sample and mfm posterior."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from metaflowmaps._files import write_tensors
from metaflowmaps.commands import pictures
from metaflowmaps.commands.runs import write_results
from metaflowmaps.commands.scene import Scene, Wish
from metaflowmaps.commands.shards import draw_in_shards, usual_size
from metaflowmaps.commands.shared import Results, Say, beside, digest, law_of, open_model
from metaflowmaps.cost import Meter
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.random import RowNoise, fresh_seeds, randn, stream
from metaflowmaps.sampling import integrate, uniform_grid
from metaflowmaps.work.shards import Made, Share, own_device


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
    share: Share = Share(),
    say: Say = lambda line: None,
    wish: Wish = Wish(),
) -> Results:
    """Samples of the data law, by refinement, by composed jumps at context time 0, or by the drift's ODE.

    ``only``: the samples with these seeds, num of them.
    """
    if method not in ("refine", "compose", "ode"):
        raise unknown("method", method, ("refine", "compose", "ode"))
    model, found, target = open_model(checkpoint, own_device(device), needs_map=method != "ode")
    scene = Scene(model, found, wish, num)
    settings = {"checkpoint": digest(found), "num": num, "steps": steps, "method": method, "seed": seed}
    settings |= scene.settings
    if only:
        settings["only"] = list(only)
    place = out or beside(checkpoint, found, "sample")
    seeds = torch.tensor(only) if only else fresh_seeds(num, stream(seed, "sample"))

    @torch.no_grad()
    def make(part: slice) -> Made:
        own, cond = seeds[part], scene.part(part)
        with Meter(model.network) as meter, scene.autocast():
            if method == "refine":
                points = model.generate(len(own), steps, cond=cond, seeds=own)
            else:
                noise = RowNoise(own.to(target), "generate").normal(model.event_shape, dtype=model.dtype)
                if method == "compose":
                    points = model.push(noise, 0.0, torch.zeros_like(noise), steps, cond)
                else:
                    points = integrate(lambda t, x: model.drift(t, x, cond), noise, uniform_grid(steps))
        return Made({"samples": points, "seeds": own}, {"cost": meter.cost(), "rows": len(own)})

    def finish(made: Made) -> Results:
        points = made.tensors["samples"]
        write_tensors(place / "samples.safetensors", made.tensors)
        title = f"{num} samples, {steps} network call(s) each"
        if model.event_shape == (2,):
            figures.save(figures.scatter(points, title, law_of(found)), place / "samples.png")
        elif len(model.event_shape) == 3:
            pictures.samples_grid(scene.shown(points[: pictures.GRID], say), title, place / "samples.png")
            scene.write(points, place)
        spread = points.flatten(1).std(0).mean() if num > 1 else torch.zeros(())
        metrics = {"num": num, "mean": float(points.mean()), "std": float(spread)}
        results = write_results(
            place, "sample", settings, metrics, made.facts["cost"], seed=seed, device=target, invocation=invocation
        )
        return {**results, "out": str(place / "results.json")}

    return draw_in_shards(place, "sample", settings, num, share, say, usual_size(share), make, finish)


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
    share: Share = Share(),
    say: Say = lambda line: None,
    wish: Wish = Wish(),
    image: str | None = None,
) -> Results:
    """Draws of clean data given one noisy state: ``x``, or ``image`` noised, or a sample of the map noised.

    ``only``: the draws with these seeds, num_draws of them.
    """
    model, found, target = open_model(checkpoint, own_device(device))
    if not 0 <= t <= 1:
        raise InputError(f"--t must lie in [0, 1] (0 is noise, 1 is data), got {t}")
    if x is not None and image is not None:
        raise InputError("--x and --image both say what to draw for: give one of them")
    scene = Scene(model, found, wish, num_draws)
    g = stream(seed, "posterior")
    if x is None:
        x_1 = model.generate(1, 4, g, scene.part(slice(1))) if image is None else scene.encode(image)
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
        **scene.settings,
    }
    place = out or beside(checkpoint, found, "posterior")
    seeds = torch.tensor(only) if only else fresh_seeds(num_draws, stream(seed, "posterior-draws"))

    @torch.no_grad()
    def make(part: slice) -> Made:
        own = seeds[part]
        with Meter(model.network) as meter, scene.autocast():
            noise = RowNoise(own.to(target), "posterior").normal(model.event_shape, dtype=model.dtype)
            draws = model.push(noise, t, x_t.expand_as(noise), steps, scene.part(part))
        return Made({"draws": draws, "seeds": own}, {"cost": meter.cost(), "rows": len(own)})

    def finish(made: Made) -> Results:
        draws, law = made.tensors["draws"], law_of(found)
        write_tensors(place / "draws.safetensors", {**made.tensors, "x_t": x_t[0], "t": torch.tensor(t)})
        if model.event_shape == (2,):
            shown = law if t < 1 else None
            title = f"{num_draws} posterior draws"
            picture = figures.posterior_panels(model.path, shown, [t], [x_t[0].cpu()], [draws], title)
            figures.save(picture, place / "posteriors.png")
        elif len(model.event_shape) == 3:
            both = scene.shown(torch.cat([x_t.cpu(), draws[: pictures.DRAWN].cpu()]), say)
            pictures.posterior_grid(both[0], both[1:], t, place / "posteriors.png")
            scene.write(draws, place)
        metrics: dict[str, Any] = {
            **({"captions": pictures.CAPTIONS["posterior"]} if len(model.event_shape) == 3 else {}),
            "num_draws": num_draws,
            "mean": draws.mean(0).flatten().tolist(),
            "std": (draws.std(0) if num_draws > 1 else torch.zeros_like(draws[0])).flatten().tolist(),
        }
        if law is not None:
            exact = law.posterior(model.path, t, x_t.double().cpu())
            metrics["exact_mean"] = exact.mean[0].tolist()
            metrics["exact_std"] = exact.variance[0].sqrt().tolist()
        results = write_results(
            place, "posterior", settings, metrics, made.facts["cost"], seed=seed, device=target, invocation=invocation
        )
        return {**results, "out": str(place / "results.json")}

    return draw_in_shards(place, "posterior", settings, num_draws, share, say, usual_size(share), make, finish)


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
