"""Draw clean data given a noisy state; writes draws.safetensors with their seeds and a picture."""

import math

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps._shapes import Cond, first_cond
from metaflowmaps.cli.context import Context, Results
from metaflowmaps.cli.drawing import Drawing, draw
from metaflowmaps.cli.observations import ObservingOptions, span_of
from metaflowmaps.cli.results import Request
from metaflowmaps.context import Context as Observed
from metaflowmaps.data import Process
from metaflowmaps.data.sequences import PathSource
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.on_contexts import source_of
from metaflowmaps.lab.figures import context_figures, plots, result_figures
from metaflowmaps.lab.sample_pictures import SamplePictures
from metaflowmaps.random import RowNoise, randn, stream
from metaflowmaps.work.shards import Shard


class PosteriorDraws(ObservingOptions):
    """The noisy state, and how many draws."""

    t: float = Field(0.4, description="Time of the noisy state, in [0, 1].")
    x: str | None = Field(None, description="The noisy state, as numbers: 1.0,-0.5. Drawn if absent.")
    image: str | None = Field(None, description="A clean picture to noise, in place of --x.")
    num_draws: int | None = Field(None, ge=1, description="How many draws (1024).")
    steps: int = Field(1, ge=1, description="Network calls a draw.")

    def next_command(self, results: Results, folder: str) -> str:
        """Are draws like these right?"""
        return f"mfm eval posterior {self.named}"


def run(config: PosteriorDraws, context: Context) -> Results:
    """Draws given one noisy state: ``x``, or ``image`` noised, or a sample of the map noised; or given observations."""
    if not 0 <= config.t <= 1:
        raise InputError(f"--t must lie in [0, 1] (0 is noise, 1 is data), got {config.t}")
    if config.x is not None and config.image is not None:
        raise InputError("--x and --image both say what to draw for: give one of them")
    pictures = config.open(context, config.count(config.num_draws))
    given = config.observed(pictures.opened.model)
    if given is not None:
        return _given_observations(config, context, pictures, given)
    opened, num, seed, t = pictures.opened, pictures.num, context.seed or 0, config.t
    model, x_t = opened.model, _state(config, pictures, stream(seed, "posterior"))

    def points(seeds: Tensor, cond: Cond) -> Tensor:
        noise = RowNoise(seeds.to(opened.device), "posterior").normal(model.event_shape, dtype=model.dtype)
        return model.push(noise, t, x_t.expand_as(noise), config.steps, cond)

    def finish(request: Request, made: Shard) -> Results:
        draws = made.tensors["draws"]
        config.write(request.out, "draws", {**made.tensors, "x_t": x_t[0], "t": torch.tensor(t)})
        _picture(request, pictures, t, x_t, draws)
        metrics: Results = {
            "num_draws": num,
            "mean": draws.mean(0).flatten().tolist(),
            "std": (draws.std(0) if num > 1 else torch.zeros_like(draws[0])).flatten().tolist(),
        }
        if opened.is_pictorial:
            metrics["captions"] = result_figures.CAPTIONS["posterior"]
        if opened.law is not None:
            exact = opened.law.posterior(model.path, t, x_t.double().cpu())
            metrics |= {"exact_mean": exact.mean[0].tolist(), "exact_std": exact.variance[0].sqrt().tolist()}
        return request.write(metrics, made.facts["cost"], opened.device)

    make = config.by_seed(pictures, "draws", points, seed, "posterior-draws")
    identity = config.identity(pictures, num_draws=num, seed=seed, x=x_t.flatten().tolist())
    drawing = Drawing("posterior", identity, num * config.steps, context.share.usual_size(), make, finish)
    return draw(pictures, drawing, context)


def _given_observations(config: PosteriorDraws, context: Context, pictures: SamplePictures, given: Observed) -> Results:
    """Draws of X_r given what was observed, of a map of general contexts."""
    opened, num, seed = pictures.opened, pictures.num, context.seed or 0
    model = opened.model
    known = model.encode(model.conditions_of(given))

    def points(seeds: Tensor, cond: Cond) -> Tensor:
        noise = RowNoise(seeds.to(opened.device), "posterior").normal(model.event_shape, dtype=model.dtype)
        return model.push(noise, 0.0, torch.zeros_like(noise), config.steps, first_cond(known, len(noise)))

    def finish(request: Request, made: Shard) -> Results:
        draws = made.tensors["draws"]
        seen = {name: value[0] for name, value in given.conditions().items()}
        config.write(request.out, "draws", {**made.tensors, **seen})
        spread = draws.std(0) if num > 1 else torch.zeros_like(draws[0])
        metrics: Results = {
            "num_draws": num,
            "mean": draws.mean(0).flatten().tolist(),
            "std": spread.flatten().tolist(),
            "captions": {},
            "summary": f"{num:,} draws at time {config.query:g} given {int(given.mask.sum())} observations.",
        }
        source = source_of(opened)
        if isinstance(source, Process):
            exact = source.exact().given(given)
            metrics |= {"exact_mean": exact.mean[0].tolist(), "exact_std": exact.variance[0].sqrt().tolist()}
        if isinstance(source, PathSource) and len(model.event_shape) == 1:
            times = torch.linspace(*span_of(given, model), 60)
            plots.save(context_figures.fan(model, given, times), request.out / "fan.png")
            metrics["captions"] = {"fan.png": "Half and nine tenths of the map's draws at every time, given the dots."}
        return request.write(metrics, made.facts["cost"], opened.device)

    make = config.by_seed(pictures, "draws", points, seed, "posterior-draws")
    identity = config.identity(pictures, num_draws=num, seed=seed)
    drawing = Drawing("posterior", identity, num * config.steps, context.share.usual_size(), make, finish)
    return draw(pictures, drawing, context)


def _state(config: PosteriorDraws, pictures: SamplePictures, generator: torch.Generator) -> Tensor:
    """The noisy state, (1, *event)."""
    model = pictures.opened.model
    if config.x is not None:
        return _parse_state(config.x, model).to(model.device)
    if config.image is None:
        x_1 = model.generate(1, 4, generator, pictures.rows(slice(1)))
    else:
        x_1 = pictures.encode(config.image)
    return model.path.interpolate(randn(tuple(x_1.shape), generator, model.dtype, model.device), x_1, config.t)


def _picture(request: Request, pictures: SamplePictures, t: float, x_t: Tensor, draws: Tensor) -> None:
    opened, file = pictures.opened, request.out / "posteriors.png"
    if opened.is_planar:
        law = opened.law if t < 1 else None
        title = f"{len(draws)} posterior draws"
        plots.save(plots.posterior_panels(opened.model.path, law, [t], [x_t[0].cpu()], [draws], title), file)
    elif opened.is_pictorial:
        both = pictures.shown(torch.cat([x_t.cpu(), draws[: result_figures.DRAWN].cpu()]))
        result_figures.posterior_grid(both[0], both[1:], t, file)
        pictures.write(draws, request.out)


def _parse_state(text: str, model: MetaFlowMap) -> Tensor:
    try:
        values = [float(part) for part in text.replace(" ", ",").split(",") if part]
    except ValueError:
        raise InputError(f"--x takes numbers separated by commas, got {text!r}") from None
    size = math.prod(model.event_shape)
    if len(values) != size or not all(map(math.isfinite, values)):
        raise InputError(f"--x needs {size} finite numbers for states of shape {model.event_shape}, got {text!r}")
    return torch.tensor(values, dtype=model.dtype).reshape(1, *model.event_shape)
