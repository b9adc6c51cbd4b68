"""Draw samples of the data law; samples.safetensors holds them and their seeds."""

from typing import Literal

import torch
from pydantic import Field

from metaflowmaps._files import write_tensors
from metaflowmaps.cli.context import Context, Results
from metaflowmaps.cli.drawing import Drawing, draw, usual_size
from metaflowmaps.cli.results import Request
from metaflowmaps.cli.sample_pictures import DrawingOptions, PictureWriter
from metaflowmaps.cost import Meter
from metaflowmaps.lab.figures import plots, result_figures
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.random import RowNoise, fresh_seeds, stream
from metaflowmaps.sampling import integrate, uniform_grid
from metaflowmaps.work.shards import Shard


class Sample(DrawingOptions):
    """What is drawn, and how."""

    num: int | None = Field(None, ge=1, description="How many samples (1024).")
    steps: int = Field(1, ge=1, description="Network calls a sample.")
    method: Literal["refine", "compose", "ode"] = Field(
        "refine", description="refine (Algorithm 1), compose (k jumps from noise) or ode."
    )


def run(config: Sample, context: Context) -> Results:
    """Samples by refinement, by composed jumps at context time 0, or by the drift's ODE."""
    opened = OpenedModel.open(config.checkpoint, context.device, needs_map=config.method != "ode")
    model, num, seed = opened.model, config.count(config.num), context.seed or 0
    pictures = PictureWriter(opened, config, num)
    identity = pictures.identity(num=num, seed=seed)
    if context.dry_run:
        return context.plan("sample", identity, opened.cost_of(num * config.steps))
    request = Request(context, "sample", identity, opened.beside("sample"))
    seeds = torch.tensor(config.only) if config.only else fresh_seeds(num, stream(seed, "sample"))

    @torch.no_grad()
    def make(part: slice) -> Shard:
        own, cond = seeds[part], pictures.rows(part)
        with Meter(model.network) as meter, pictures.autocast():
            if config.method == "refine":
                points = model.generate(len(own), config.steps, cond=cond, seeds=own)
            else:
                noise = RowNoise(own.to(opened.device), "generate").normal(model.event_shape, dtype=model.dtype)
                if config.method == "compose":
                    points = model.push(noise, 0.0, torch.zeros_like(noise), config.steps, cond)
                else:
                    points = integrate(lambda t, x: model.drift(t, x, cond), noise, uniform_grid(config.steps))
        return Shard({"samples": points, "seeds": own}, {"cost": meter.cost(), "rows": len(own)})

    def finish(made: Shard) -> Results:
        points, out = made.tensors["samples"], request.out
        write_tensors(out / "samples.safetensors", made.tensors)
        title = f"{num} samples, {config.steps} network call(s) each"
        if opened.is_planar:
            plots.save(plots.scatter(points, title, opened.law), out / "samples.png")
        elif opened.is_pictorial:
            shown = pictures.shown(points[: result_figures.GRID])
            result_figures.samples_grid(shown, title, out / "samples.png")
            pictures.write(points, out)
        spread = points.flatten(1).std(0).mean() if num > 1 else torch.zeros(())
        metrics = {"num": num, "mean": float(points.mean()), "std": float(spread)}
        return request.write(metrics, made.facts["cost"], opened.device)

    return draw(request, Drawing(num, usual_size(context.share), make, finish))
