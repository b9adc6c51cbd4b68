"""Moving digits: the next frame given one to four past ones, in one call, against many calls and cheap rivals.

Two of MNIST's digits bounce in a square; those of held-out sequences were never seen. Given one frame their directions
are open, given two the next frame is known but for overlap: what draws do not agree on must shrink from one to the
other. Forecasts are judged as whole frames (energy score), and by the centre of all ink, in pixels: how far draws
spread, how far their mean is from what came, and the rank of what came among the draws, uniform where calibrated.

Rivals: the ODE of the map's own drift and of the flow that taught it, in many calls, and without a network the last
frame again, the mean of the training frames, and pixels extrapolated linearly from the last two.
"""

import os
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RUNS, keep, say, trained
from benchmarks.provenance import RESULTS
from metaflowmaps.context import Context, ordered
from metaflowmaps.data import MovingDigits
from metaflowmaps.data.paths import Paths
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.forecast_error import Forecaster, ForecastEvalConfig, evaluate_forecasts, ode_draws
from metaflowmaps.lab.figures.curves import rank_histograms
from metaflowmaps.lab.figures.image_figures import image_grid
from metaflowmaps.lab.figures.plots import save
from metaflowmaps.metrics.scores import energy_score
from metaflowmaps.random import stream
from metaflowmaps.recipes import recipe
from metaflowmaps.training.building import fitted
from metaflowmaps.training.train_config import TrainConfig

MNIST = os.path.join(os.environ.get("MFM_SHARED", "../shared"), "data", "mnist")
BY_CALLS = ForecastEvalConfig(samples=8, forecasts=48, map_steps=(1, 2), ode_steps=(2, 4, 8, 16, 32))
FORECASTS, DRAWS, BINS = 128, 15, 8  # by number of observed frames: a truth has one of 16 ranks
SHOWN_DRAWS, SEEN, AT = 5, (1, 2, 4), 5  # of the figure: futures, frames given, the frame that is asked for


def main() -> None:
    """Train the map (a quarter of an hour of one core) and judge it; writes results/moving-digits.json, two figures."""
    config = fitted(next_frame())
    assert isinstance(config.data, MovingDigits)
    result = trained(config, "moving-digits")
    model, drift = (MetaFlowMap.from_pretrained(path) for path in (result.checkpoint, RUNS / "moving-digits" / "drift"))
    scores = evaluate_forecasts(model, config.data, BY_CALLS, say, rivals(config.data, drift))
    scores["forecasts"]["flow-32"]["calls"] = 32.0  # of its own network, which is not the one that was metered
    held_out, observed, ranks = config.data.held_out(), {}, {}
    for count in range(1, 5):
        observed[str(count)], ranks[f"given {count}"] = by_observed(model, of_length(held_out, count), count)
    save(rank_histograms(ranks, DRAWS, "The centre of the ink among its draws"), RESULTS / "moving-ranks.png")
    save(futures(model, held_out), RESULTS / "moving-digits.png")
    found = {"train_seconds": result.seconds, **scores, "observed": observed}
    keep("moving-digits", "python -m benchmarks moving-digits", found)


def next_frame() -> TrainConfig:
    """The recipe, on one core."""
    return recipe("moving-digits", data=MNIST).model_copy(update={"threads": 1})  # type: ignore[return-value]


def rivals(source: MovingDigits, drift: MetaFlowMap) -> dict[str, Forecaster]:
    """The flow that taught the map, and forecasts that need no network."""
    mean = source.paths()[0].values.flatten(0, 1).mean(0)

    def repeated_mean(context: Context, num_draws: int) -> Tensor:
        return mean.expand(1, len(context), *mean.shape)

    return {
        "flow-32": lambda context, n: ode_draws(drift, context, n, 32, stream(BY_CALLS.seed, "noise")),
        "mean": repeated_mean,
        "linear": lambda context, n: extrapolated(context)[None],
    }


def extrapolated(context: Context) -> Tensor:
    """2 x_k − x_{k−1} within the range of pixels, where one frame is given that frame: (B, *event)."""
    seen = ordered(context.conditions(), 2)
    count = seen.mask.sum(1)
    row = torch.arange(len(count))
    last, before = (seen.values[row, (count - back).clamp_min(0)] for back in (1, 2))
    return (2 * last - before).clamp(-1, 1)


def of_length(paths: Paths, count: int) -> Paths:
    """The same paths, of which contexts hold so many frames."""
    return Paths(paths.values, paths.times, paths.law.model_copy(update={"least": count, "most": count}))


@torch.no_grad()
def by_observed(model: MetaFlowMap, paths: Paths, count: int) -> tuple[dict[str, float], Tensor]:
    """Scores of one-step draws given so many frames, and the counts of ranks in bins."""
    truth, context = paths.sample_given(FORECASTS, stream(0, "moving-digits", count))
    draws = model.draw(context, DRAWS, generator=stream(1, "moving-digits", count))
    at, centres = centre(truth), centre(draws)
    ranks = (centres < at).sum(0)  # (B, 2)
    last = ordered(context.conditions(), 1)
    points = {"last": last.values[torch.arange(len(truth)), last.mask.sum(1) - 1], "linear": extrapolated(context)}
    scores = {
        "energy": float(energy_score(draws, truth).mean()),
        **{f"energy_{name}": float(energy_score(x[None], truth).mean()) for name, x in points.items()},
        "pixel_spread": float(draws.std(0).square().mean().sqrt()),
        "centre_spread": float(centres.var(0).mean().sqrt()),
        "centre_error": float((centres.mean(0) - at).square().mean().sqrt()),
        "inside_half": float(((ranks >= 4) & (ranks < 12)).double().mean()),
        "outermost": float(((ranks == 0) | (ranks == DRAWS)).double().mean()),
    }
    return scores, torch.bincount(ranks.flatten() * BINS // (DRAWS + 1), minlength=BINS)


def centre(frames: Tensor) -> Tensor:
    """Where the ink of frames (…, 1, H, W) lies on average: (…, 2), x and y in pixels."""
    ink = (frames[..., 0, :, :] + 1).clamp_min(0)
    place = torch.arange(ink.shape[-1]).to(ink)
    return torch.stack([(ink.sum(axis) * place).sum(-1) for axis in (-2, -1)], -1) / ink.sum((-2, -1))[..., None]


@torch.no_grad()
def futures(model: MetaFlowMap, held_out: Paths) -> Any:
    """Past frames, what came, draws and their spread: of the straightest path, and of the one that turns most."""
    frames = held_out.values[:, : AT + 1]
    moves = centre(frames).diff(dim=1)
    turn = moves.diff(dim=1)[:, -2].norm(dim=-1)  # between the last frames given
    straight = moves.diff(dim=1).norm(dim=-1).amax(1)
    rows, names = [], []
    for name, path in (("straight", int(straight.argmin())), ("after a turn", int(turn.argmax()))):
        for count in SEEN:
            past = torch.full_like(frames[path, :4], 0.0)
            past[4 - count :] = frames[path, AT - count : AT]
            times = torch.arange(float(AT - count), AT)
            context = Context(frames[path : path + 1, AT - count : AT], times, query=float(AT))
            draws = model.draw(context, 64, generator=stream(2, "moving-digits"))[:, 0]
            ends = torch.stack([draws.mean(0), 2 * draws.std(0) - 1])
            rows.append(torch.cat([past, frames[path, AT : AT + 1], draws[:SHOWN_DRAWS], ends]).clamp(-1, 1))
            names.append(f"{name}, {count} given")
    titles = ["past", "", "", "", "came", "next frames, one call each", *[""] * (SHOWN_DRAWS - 1), "mean", "spread"]
    return image_grid(rows, names, titles)
