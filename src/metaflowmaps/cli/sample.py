"""Draw samples of the data law; samples.safetensors holds them and their seeds."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import Cond
from metaflowmaps.cli.context import Context, Results
from metaflowmaps.cli.drawing import Drawing, DrawingOptions, draw
from metaflowmaps.cli.results import Request
from metaflowmaps.random import RowNoise
from metaflowmaps.sampling import integrate, uniform_grid
from metaflowmaps.work.shards import Shard


class Sample(DrawingOptions):
    """What is drawn, and how."""

    num: int | None = Field(None, ge=1, description="How many samples (1024).")
    steps: int = Field(1, ge=1, description="Network calls a sample.")
    method: Literal["refine", "compose", "ode"] = Field(
        "refine", description="refine (Algorithm 1), compose (k jumps from noise) or ode."
    )

    def next_command(self, results: Results, folder: str) -> str:
        """The same map, with a reward."""
        return f"mfm steer {self.named}"


def run(config: Sample, context: Context) -> Results:
    """Samples by refinement, by composed jumps at context time 0, or by the drift's ODE."""
    pictures = config.open(context, config.count(config.num), needs_map=config.method != "ode")
    opened, model, num, seed = pictures.opened, pictures.opened.model, pictures.num, context.seed or 0

    def points(seeds: Tensor, cond: Cond) -> Tensor:
        if config.method == "refine":
            return model.generate(len(seeds), config.steps, cond=cond, seeds=seeds)
        noise = RowNoise(seeds.to(opened.device), "generate").normal(model.event_shape, dtype=model.dtype)
        if config.method == "compose":
            return model.push(noise, 0.0, torch.zeros_like(noise), config.steps, cond)
        return integrate(lambda t, x: model.drift(t, x, cond), noise, uniform_grid(config.steps))

    def finish(request: Request, made: Shard) -> Results:
        x = made.tensors["samples"]
        config.write(request.out, "samples", made.tensors)
        pictures.save(x, f"{num} samples, {config.steps} network call(s) each", opened.law, request.out)
        spread = x.flatten(1).std(0).mean() if num > 1 else torch.zeros(())
        metrics = {"num": num, "mean": float(x.mean()), "std": float(spread)}
        return request.write(metrics, made.facts["cost"], opened.device)

    make = config.by_seed(pictures, "samples", points, seed, "sample")
    identity = config.identity(pictures, num=num, seed=seed)
    drawing = Drawing("sample", identity, num * config.steps, context.share.usual_size(), make, finish)
    return draw(pictures, drawing, context)
