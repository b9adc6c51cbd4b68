"""The figures of results; those of image experiments write PNGs into a directory and return their captions."""

import re
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from metaflowmaps.data import Examples
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.interop.foreign import GLASS_STEPS, ForeignModel
from metaflowmaps.lab.evaluate.images import race_cells
from metaflowmaps.lab.evaluate.images.class_mixture import Mixed
from metaflowmaps.lab.evaluate.images.generation import Generated
from metaflowmaps.lab.evaluate.images.image_rewards import short
from metaflowmaps.lab.evaluate.images.inverse_problems import PROBLEMS, Solved
from metaflowmaps.lab.evaluate.images.race import Raced
from metaflowmaps.lab.evaluate.images.race_cells import RewardResult
from metaflowmaps.lab.evaluate.images.recovery import Recovered
from metaflowmaps.lab.evaluate.images.rollout_value import Estimated
from metaflowmaps.lab.evaluate.images.setup import ImageSetup
from metaflowmaps.lab.evaluate.images.steered import image_variant
from metaflowmaps.lab.figures import image_figures, plots, steering_figures
from metaflowmaps.lab.figures.curves import (
    Floor,
    Frontier,
    against_calls,
    by_calls,
    frequencies,
    frontier,
    rank_histograms,
)
from metaflowmaps.lab.results import Metrics, Steering
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.random import randn, stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIMES = (0.0, 0.1, 0.2, 0.5, 0.8)  # of the picture of one noisy image
PANEL_TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)  # of posteriors of a mixture
DRAWS = 8  # in the picture of one noisy image
DRAWN = 24  # draws in a picture of draws
GRID = 64  # samples in a picture of samples
RACED = 12  # samples of a cell of the race
SHOWN_DRAWS = 4  # of num_draws, the panels show the one nearest to this
TITLE_LETTERS = 46  # over a single panel
COLOURS = " Latents are shown by their first three channels, as colours."
RECOVERED = (
    "A held-out image, noised to time t, and draws of the map for it in one network call each. At t = 0 the noisy "
    "image says nothing; as t → 1 it decides everything."
)
SAMPLERS = {"map": "map", "glass": "GLASS", "drift-glass": "GLASS, drift alone"}
GENERATION_KINDS = {"refine": "map, refined", "compose": "map, composed", "ode": "ODE", "drift-ode": "ODE, drift alone"}
SHOWN = ("refine-1", "refine-2", "refine-4", "refine-8", "compose-4", "ode-4", "ode-64")
AGAINST = {"distance": "mean pairwise distance", "frechet": "Fréchet distance to the target's data"}
CAPTIONS = {  # of pictures that mixtures have too, under other words
    "posterior": {"posteriors.png": "A noisy image and what it may be: draws of the map."},
    "steer": {"samples.png": "Steered samples, the first of them."},
}


def coloured(x: Tensor) -> Tensor:
    """(n, C, H, W) as pictures: latents, which have four channels, by the first three of them, ±2 as black to white."""
    return x if x.shape[1] in (1, 3) else (x[:, :3] / 2).clamp(-1, 1)


@torch.no_grad()
def draws_picture(model: MetaFlowMap, held_out: Examples, out: Path) -> None:
    """A held-out image, noised to each time, and draws of the map in one call."""
    image = held_out.tensor(slice(0, 1)).to(model.device)
    eps = randn(tuple(image.shape), stream(0, "picture"), device=model.device)
    noisy, draws = [], []
    for t in TIMES:
        x_t = model.path.interpolate(eps, image, t)
        noisy.append(x_t[0].cpu())
        draws.append(model.draw(t, x_t, DRAWS, generator=stream(0, "picture", repr(t)))[:, 0].cpu())
    plots.save(recovery_grid(image[0].cpu(), noisy, draws, TIMES), out)


def recovery_grid(image: Tensor, noisy: list[Tensor], draws: list[Tensor], times: tuple[float, ...]) -> "Figure":
    """Rows by time: image, noisy image, draws."""
    rows = [coloured(torch.cat([image[None], x[None], drawn])) for x, drawn in zip(noisy, draws, strict=True)]
    titles = ["image", "noisy", "draws, one network call each", *([""] * (len(draws[0]) - 1))]
    title = "One noisy image, many plausible clean ones"
    return image_figures.image_grid(rows, [f"t = {t:g}" for t in times], titles, title)


def posterior_grid(x_t: Tensor, draws: Tensor, t: float, out: Path) -> None:
    """A noisy image and its first draws."""
    each = min(8, len(draws))
    rows = [coloured(torch.cat([x_t[None], part])) for part in draws[:DRAWN].split(each) if len(part) == each]
    titles = ["noisy", "draws", *([""] * (each - 1))]
    title = f"A noisy image at t = {t:g} and what it may be"
    plots.save(image_figures.image_grid(rows, [""] * len(rows), titles, title), out)


def samples_grid(x: Tensor, title: str, out: Path) -> None:
    """The first samples, sixteen a row."""
    shown = coloured(x[:GRID].cpu())
    rows = [part for part in shown.split(16) if len(part) == min(16, len(shown))]
    plots.save(image_figures.image_grid(rows, [""] * len(rows), None, title), out)


def _distances(setup: ImageSetup) -> tuple[str, str]:
    """What distances are, for a caption, and what they are to: FID is said of nothing else."""
    space, to = setup.judge.space, setup.compared_with
    named = space if "latents" in space or "Inception" in space else "classifier features"
    measure = setup.measure if setup.measure == "FID" else f"Fréchet distance ({named}, not FID)"
    return measure, f"the {to}" if to == "held-out images" else to


def _save_all(figures: Mapping[str, tuple["Figure", str]], out: Path) -> dict[str, str]:
    """Write each figure; the captions by file name."""
    for name, (figure, _) in figures.items():
        plots.save(figure, out / name)
    return {name: caption for name, (_, caption) in figures.items()}


def recovery(found: Recovered, times: tuple[float, ...], out: Path) -> dict[str, str]:
    """Draws, their spread, and the distance against network calls."""
    means, deviations = (torch.stack([pair[i] for pair in found.spread]) for i in (0, 1))
    spread = image_figures.spread_maps(
        {"draws of the map": (means, deviations)},
        [f"t = {t:g}" for t in times],
        "Where the draws agree, and where they do not",
        torch.stack(found.noisy),
    )
    setup, (named, target) = found.setup, _distances(found.setup)
    curves = {f"t = {float(t):g}": by_calls(by_sampler, SAMPLERS) for t, by_sampler in found.frechet.items()}
    distance = against_calls(
        curves,
        "network calls a draw",
        setup.measure,
        Floor(dict.fromkeys(curves, found.floor), "images trained on"),
        f"Draws against {setup.compared_with}, in {setup.judge.space}",
    )
    figures = {
        "draws.png": (
            recovery_grid(found.image, found.noisy, found.draws, times),
            "A held-out image, noised to time t, and eight draws of the map in one network call each. At t = 0 the "
            "noisy image says nothing; as t → 1 it decides everything.",
        ),
        "spread.png": (spread, "Mean and standard deviation, pixel by pixel, of 256 draws given that noisy image."),
        "frechet-against-calls.png": (
            distance,
            f"{named} of one draw for each noised held-out image to {target}, against network calls "
            "a draw. Dashed: the images trained on.",
        ),
    }
    return _save_all(figures, out)


def value(found: Estimated, out: Path) -> dict[str, str]:
    """Correlation with rollouts against network calls."""
    cells = found.by_sampler
    most = max((n for by_draws in cells.values() for n in by_draws), key=int)
    (again,) = found.rollout.values()
    curves = {
        f"t = {float(t):g}": by_calls({name: cell[most][t]["pearson"] for name, cell in cells.items()}, SAMPLERS)
        for t in again
    }
    figure = against_calls(
        curves,
        "network calls a draw",
        "Pearson r with rollouts",
        Floor({f"t = {float(t):g}": cell["pearson"] for t, cell in again.items()}, "rollouts again"),
        f"Value of the reward {short([found.config.reward])[found.config.reward]} from {most} draws",
        yscale="linear",
    )
    caption = (
        "Correlation of the estimated value with that of rollouts, over noised held-out images, against network calls "
        "a draw. Dashed: a second set of rollouts."
    )
    return _save_all({"value-against-calls.png": (figure, caption)}, out)


def mixture(found: Mixed, out: Path) -> dict[str, str]:
    """Frequencies, and samples of each method."""
    shares = {image_variant(name).title: cell.frequencies for name, cell in found.cells.items()}
    titles = [image_variant(name).title for name in found.samples]
    figures = {
        "frequencies.png": (
            frequencies(shares, found.target.tolist(), "Class frequencies as the judge sees them"),
            "Share of each class among the samples (bars) against the target (marks).",
        ),
        "samples.png": (
            image_figures.image_grid(
                [*found.samples.values()], titles, title="Samples steered to a mixture of classes"
            ),
            "The first samples of each method.",
        ),
    }
    return _save_all(figures, out)


def race(found: Raced, out: Path) -> dict[str, str]:
    """Frontiers: reward against diversity and against distance to the target, and samples."""
    rewards = found.races
    brief = short(rewards)
    figures = {
        "reward-against-distance.png": (
            frontier([_frontier(one, "distance", f"reward: {brief[name]}") for name, one in rewards.items()]),
            "Mean reward against diversity (mean pairwise distance in the judge's features), one line a method, "
            "strength (λσ) or N growing along it. Up and right is better. Star: the tenth of all images with the "
            "highest reward.",
        ),
        "reward-against-frechet.png": (
            frontier([_frontier(one, "frechet", f"reward: {brief[name]}") for name, one in rewards.items()]),
            "Mean reward against the Fréchet distance to the images with the highest reward. Up and to the left is "
            "better.",
        ),
    }
    for name, shown in found.samples.items():
        rows = {key: shown[key][:RACED] for key in _shown_cells(rewards[name]) if len(shown.get(key, ())) >= RACED}
        title = f"Samples for the reward {brief[name]}"
        file = f"samples-{re.sub(r'[^-+.:0-9A-Za-z]+', '-', brief[name])}.png"
        grid = image_figures.image_grid([*rows.values()], [_shown_title(key) for key in rows], title=title)
        figures[file] = grid, f"The first twelve samples for the reward {brief[name]}."
    return _save_all(figures, out)


def _frontier(one: RewardResult, what: Literal["distance", "frechet"], title: str) -> Frontier:
    """The race for one reward, against one of the distances of its cells."""
    methods: dict[str, list[tuple[float, float, float]]] = {}
    for cell in one.scored:
        x = getattr(cell, what)
        if x is not None:
            methods.setdefault(race_cells.title(cell.method), []).append((cell.number, x, cell.reward))
    best = getattr(one.data, what)
    target = None if best is None else (best, one.data.target_reward)
    return Frontier(title, AGAINST[what], "mean reward", methods, target)


def _shown_cells(one: RewardResult) -> list[str]:
    """The cells whose samples are worth a look: the data, the pool's, MFM-G that is as good, the strongest steering."""
    head, strongest = (
        one.headline.get("ode"),
        max((c.number for c in one.scored if c.method not in race_cells.POOLS), default=0),
    )
    best = [] if head is None else [f"ode {head.n:g}", f"{head.method} {head.strength:g}"]
    wanted = ["target data", "ode 1", *best, f"dps {strongest:g}", f"mfm-gf-16 {strongest:g}"]
    return list(dict.fromkeys(wanted))


def _shown_title(key: str) -> str:
    method, _, number = key.rpartition(" ")
    if key == "target data":
        return "images of highest reward"
    if method in race_cells.POOLS:
        return f"best of {number}, {race_cells.POOLS[method].removeprefix('best-of-N of ')}"
    sign = "γ" if image_variant(method).rescaled else "λσ"
    return f"{race_cells.title(method)}, {sign} = {number}"


def inverse(found: Solved, draws: int, out: Path) -> dict[str, str]:
    """What was seen, samples, and rank histograms."""
    figures = {}
    for problem, shown in found.pictures.items():
        methods = {name: x for name, x in shown.items() if name not in ("truth", "seen")}
        rows = [shown["truth"], shown["seen"], *(part for x in methods.values() for part in x[:2])]
        titles = ["truth", "seen", *(title for name in methods for title in (image_variant(name).title, ""))]
        ranks = {image_variant(name).title: h for name, h in found.histograms[problem].items()}
        figures[f"{problem}.png"] = (
            image_figures.image_grid(rows, titles, title=PROBLEMS[problem].capitalize()),
            "Six held-out images, what was seen of them, and two samples of each method.",
        )
        figures[f"{problem}-ranks.png"] = (
            rank_histograms(ranks, draws, f"Ranks of the truth among {draws} samples: {PROBLEMS[problem]}"),
            "How often the true pixel has each rank among the samples: flat when calibrated.",
        )
    return _save_all(figures, out)


def generation(found: Generated, out: Path) -> dict[str, str]:
    """Distance against network calls, and samples."""
    setup, (named, target) = found.setup, _distances(found.setup)
    kind_of = "Samples of all classes" if "conditional" in setup.extras() else "Unconditional samples"
    floor = None if found.floor is None else Floor({"": found.floor.frechet}, "images trained on")
    curves = by_calls({name: cell.frechet for name, cell in found.by_sampler.items()}, GENERATION_KINDS)
    title = fill(f"{kind_of}, in {setup.judge.space}", TITLE_LETTERS)
    rows = {name: x for name, x in found.samples.items() if name in SHOWN} or found.samples
    titles = [f"{GENERATION_KINDS[n.rpartition('-')[0]]}, {n.rpartition('-')[2]} steps" for n in rows]
    dashed = "" if floor is None else " Dashed: the images trained on."
    figures = {
        "frechet-against-calls.png": (
            against_calls({"": curves}, "network calls a sample", setup.measure, floor, title),
            f"{named} of samples to {target} against network calls a sample.{dashed}",
        ),
        "samples.png": (
            image_figures.image_grid([*rows.values()], titles, title=kind_of),
            "The first sixteen samples of some samplers.",
        ),
    }
    return _save_all(figures, out)


# -- mixtures --------------------------------------------------------------------------------------------------------


def panels(model: Any, law: GaussianMixture, seed: int) -> "Figure":
    """Draws for one noisy state a time: of eight seeded ones, the one whose posterior is the widest."""
    contexts, draws = [], []
    for t in PANEL_TIMES:
        g = stream(seed, "picture", str(t))
        x_1 = law.sample(8, g)
        candidates = model.path.interpolate(randn(tuple(x_1.shape), g), x_1, t)
        widest = int(law.posterior(model.path, t, candidates).variance.sum(-1).argmax())
        x_t = candidates[widest : widest + 1].to(model.device, model.dtype)
        with torch.no_grad():
            draws.append(model.draw(t, x_t, 1000, generator=g)[:, 0].cpu())
        contexts.append(x_t[0].cpu())
    by = f"GLASS in {GLASS_STEPS} calls" if isinstance(model, ForeignModel) else "the map in one call"
    title = f"Draws of {by}, exact posteriors as contours"
    return plots.posterior_panels(model.path, law, PANEL_TIMES, contexts, draws, title)


def steering(metrics: Metrics, samples: Mapping[str, Tensor], tilted: GaussianMixture, out: Path) -> None:
    """Every method's samples over the exact law, its error against its cost, and its course.

    Args:
        metrics: those of an evaluation of steering.
        samples: the first samples of each cell, "method.num_draws".
        tilted: the exact law.
        out: the directory.
    """
    methods = Steering.of(metrics).methods
    nearest = {name: min(cells, key=lambda key: abs(int(key) - SHOWN_DRAWS)) for name, cells in methods.items()}
    if tilted.dim == 2:
        shown = {f"{name}.{key}": samples[f"{name}.{key}"] for name, key in nearest.items()}
        plots.save(steering_figures.panels(tilted, metrics, shown), out / "steered.png")
    plots.save(steering_figures.error_against_cost(metrics), out / "error-against-cost.png")
    courses = {name: methods[name][key].trajectory for name, key in nearest.items()}
    plots.save(steering_figures.trajectory(courses), out / "trajectory.png")
