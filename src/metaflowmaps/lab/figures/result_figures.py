"""The figures of results; those of image experiments write PNGs into a directory and return their captions."""

import re
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaflowmaps.data import Examples
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.images import race as races
from metaflowmaps.lab.evaluate.images.class_mixture import Mixed
from metaflowmaps.lab.evaluate.images.generation import Generated
from metaflowmaps.lab.evaluate.images.image_rewards import short
from metaflowmaps.lab.evaluate.images.inverse_problems import PROBLEMS, Solved
from metaflowmaps.lab.evaluate.images.race import Raced
from metaflowmaps.lab.evaluate.images.recovery import Recovered
from metaflowmaps.lab.evaluate.images.steered import image_variant
from metaflowmaps.lab.figures import image_figures, steering_figures
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.random import randn, stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TIMES = (0.0, 0.1, 0.2, 0.5, 0.8)
PANEL_TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)
DRAWS = 8
GRID = 64  # samples in a picture of samples
SHOWN_DRAWS = 4  # of num_draws, the panels show the one nearest to this
TITLE = 46  # letters over a single panel
DRAWN = 24  # draws in a picture of draws
COLOURS = " Latents are shown by their first three channels, as colours."
RECOVERED = (
    "A held-out image, noised to time t, and draws of the map for it in one network call each. At t = 0 the noisy "
    "image says nothing; as t → 1 it decides everything."
)
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
    figures.save(recovery_grid(image[0].cpu(), noisy, draws, TIMES), out)


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
    figures.save(image_figures.image_grid(rows, [""] * len(rows), titles, title), out)


def samples_grid(x: Tensor, title: str, out: Path) -> None:
    """The first samples, sixteen a row."""
    shown = coloured(x[:GRID].cpu())
    rows = [part for part in shown.split(16) if len(part) == min(16, len(shown))]
    figures.save(image_figures.image_grid(rows, [""] * len(rows), None, title), out)


def recovery(found: Recovered, times: tuple[float, ...], out: Path) -> dict[str, str]:
    """Draws, their spread, and the distance against network calls."""
    figures.save(recovery_grid(found.image, found.noisy, found.draws, times), out / "draws.png")
    means, deviations = (torch.stack([pair[i] for pair in found.spread]) for i in (0, 1))
    spread = image_figures.spread_maps(
        {"draws of the map": (means, deviations)},
        [f"t = {t:g}" for t in times],
        "Where the draws agree, and where they do not",
        torch.stack(found.noisy),
    )
    figures.save(spread, out / "spread.png")
    frechet = found.metrics["frechet"]
    curves: dict[str, Any] = {}
    for t, by_sampler in frechet.items():
        panel: dict[str, Any] = {}
        for name, value in by_sampler.items():
            kind, _, steps = name.rpartition("-")
            x, y, _ = panel.setdefault(KINDS[kind], ([], [], None))
            x.append(int(steps))
            y.append(value)
        curves[f"t = {float(t):g}"] = panel
    measure, against = _measure(found.metrics)
    figure = image_figures.against_calls(
        curves,
        "network calls a draw",
        measure,
        dict.fromkeys(curves, found.floor),
        f"Draws against {against}, in {found.metrics['space']}",
        "images trained on",
    )
    figures.save(figure, out / "frechet-against-calls.png")
    return {
        "draws.png": "A held-out image, noised to time t, and eight draws of the map in one network call each. At "
        "t = 0 the noisy image says nothing; as t → 1 it decides everything.",
        "spread.png": "Mean and standard deviation, pixel by pixel, of 256 draws given that noisy image.",
        "frechet-against-calls.png": f"{_in_words(found.metrics)} of one draw for each noised held-out image to "
        f"{'the ' * (against == 'held-out images')}{against}, against network calls a draw. Dashed: the images trained "
        "on.",
    }


def _measure(metrics: dict[str, Any]) -> tuple[str, str]:
    """What distances are called, and what they are to."""
    return metrics.get("measure", "Fréchet distance"), metrics.get("to", "held-out images")


def _in_words(metrics: dict[str, Any]) -> str:
    """What distances are, for a caption: FID is said of nothing else."""
    measure, space = _measure(metrics)[0], metrics["space"]
    named = space if "latents" in space or "Inception" in space else "classifier features"
    return measure if measure == "FID" else f"Fréchet distance ({named}, not FID)"


KINDS = {"map": "map", "glass": "GLASS", "drift-glass": "GLASS, drift alone"}
VALUE_KINDS = {"map": "map", "glass": "GLASS"}


def value(metrics: dict[str, Any], out: Path) -> dict[str, str]:
    """Correlation with rollouts against network calls."""
    cells = metrics["by_sampler"]
    draws = max((n for name in cells if name != "rollout" for n in cells[name]), key=int)
    curves: dict[str, Any] = {}
    for name, by_draws in cells.items():
        if name == "rollout":
            continue
        kind, _, steps = name.rpartition("-")
        for t, cell in by_draws[draws].items():
            x, y, _ = curves.setdefault(f"t = {float(t):g}", {}).setdefault(VALUE_KINDS[kind], ([], [], None))
            x.append(int(steps))
            y.append(cell["pearson"])
    again, brief = next(iter(cells["rollout"].values())), short([metrics["reward"]])[metrics["reward"]]
    figure = image_figures.against_calls(
        curves,
        "network calls a draw",
        "Pearson r with rollouts",
        {f"t = {float(t):g}": cell["pearson"] for t, cell in again.items()},
        f"Value of the reward {brief} from {draws} draws",
        "rollouts again",
        yscale="linear",
    )
    figures.save(figure, out / "value-against-calls.png")
    return {
        "value-against-calls.png": "Correlation of the estimated value with that of rollouts, over noised held-out "
        "images, against network calls a draw. Dashed: a second set of rollouts."
    }


def mixture(found: Mixed, out: Path) -> dict[str, str]:
    """Frequencies, and samples of each method."""
    methods = found.metrics["methods"]
    frequencies = {image_variant(name).title: cell["frequencies"] for name, cell in methods.items()}
    figure = image_figures.frequencies(frequencies, found.metrics["target"], "Class frequencies as the judge sees them")
    figures.save(figure, out / "frequencies.png")
    names = list(found.samples)
    grid = image_figures.image_grid(
        [found.samples[name] for name in names],
        [image_variant(name).title for name in names],
        None,
        "Samples steered to a mixture of classes",
    )
    figures.save(grid, out / "samples.png")
    return {
        "frequencies.png": "Share of each class among the samples (bars) against the target (marks).",
        "samples.png": "The first samples of each method.",
    }


def race(found: Raced, out: Path) -> dict[str, str]:
    """Frontiers: reward against diversity and against distance to the target, and samples."""
    captions = {}
    brief = short(found.metrics["rewards"])
    for what, label in (("distance", "mean pairwise distance"), ("frechet", "Fréchet distance to the target's data")):
        panels: list[Any] = []
        for name, one in found.metrics["rewards"].items():
            methods: dict[str, list[tuple[float, float, float]]] = {}
            for cell in one["cells"]:
                if cell.get(what) is not None:
                    number = cell.get("strength", cell.get("n"))
                    methods.setdefault(races.title(cell["method"]), []).append((number, cell[what], cell["reward"]))
            data = one["data"]
            target = {} if data[what] is None else {"target": (data[what], data["target_reward"])}
            panels.append(
                {
                    "title": f"reward: {brief[name]}",
                    "xlabel": label,
                    "ylabel": "mean reward",
                    "methods": methods,
                    **target,
                }
            )
        figures.save(image_figures.frontier(panels), out / f"reward-against-{what}.png")
    captions["reward-against-distance.png"] = (
        "Mean reward against diversity (mean pairwise distance in the judge's features), one line a method, strength "
        "(λσ) or N growing along it. Up and right is better. Star: the tenth of all images with the highest reward."
    )
    captions["reward-against-frechet.png"] = (
        "Mean reward against the Fréchet distance to the images with the highest reward. Up and to the left is better."
    )
    for name, shown in found.samples.items():
        head = found.metrics["rewards"][name]["headline"]
        wanted = ["target data", "ode 1"]
        if "ode" in head:
            wanted += [f"ode {head['ode']['n']}", f"{head['ode']['method']} {head['ode']['strength']:g}"]
        strongest = max((c["strength"] for c in found.metrics["rewards"][name]["cells"] if "strength" in c), default=0)
        wanted += [f"dps {strongest:g}", f"mfm-gf-16 {strongest:g}"]
        rows = [(key, shown[key]) for key in dict.fromkeys(wanted) if key in shown and len(shown[key]) >= 12]
        titles = [_shown_title(key) for key, _ in rows]
        title, file = (
            f"Samples for the reward {brief[name]}",
            f"samples-{re.sub(r'[^-+.:0-9A-Za-z]+', '-', brief[name])}.png",
        )
        figures.save(image_figures.image_grid([x[:12] for _, x in rows], titles, None, title), out / file)
        captions[file] = f"The first twelve samples for the reward {brief[name]}."
    return captions


def _shown_title(key: str) -> str:
    method, _, number = key.rpartition(" ")
    if key == "target data":
        return "images of highest reward"
    if method in races.POOLS:
        return f"best of {number}, {races.POOLS[method].removeprefix('best-of-N of ')}"
    sign = "γ" if image_variant(method).rescaled else "λσ"
    return f"{races.title(method)}, {sign} = {number}"


def inverse(found: Solved, draws: int, out: Path) -> dict[str, str]:
    """What was seen, samples, and rank histograms."""
    captions = {}
    for problem, shown in found.pictures.items():
        rows, titles = [shown["truth"], shown["seen"]], ["truth", "seen"]
        for name, x in shown.items():
            if name not in ("truth", "seen"):
                rows += list(x[:2])
                titles += [image_variant(name).title, ""]
        figures.save(
            image_figures.image_grid(rows, titles, None, PROBLEMS[problem].capitalize()), out / f"{problem}.png"
        )
        histograms = {image_variant(name).title: h for name, h in found.histograms[problem].items()}
        title = f"Ranks of the truth among {draws} samples: {PROBLEMS[problem]}"
        figures.save(image_figures.rank_histograms(histograms, draws, title), out / f"{problem}-ranks.png")
        captions[f"{problem}.png"] = "Six held-out images, what was seen of them, and two samples of each method."
        captions[f"{problem}-ranks.png"] = (
            "How often the true pixel has each rank among the samples: flat when calibrated."
        )
    return captions


GENERATION_KINDS = {"refine": "map, refined", "compose": "map, composed", "ode": "ODE", "drift-ode": "ODE, drift alone"}


def generation(found: Generated, out: Path) -> dict[str, str]:
    """Distance against network calls, and samples."""
    curves: dict[str, Any] = {}
    for name, cell in found.metrics["by_sampler"].items():
        kind, _, steps = name.rpartition("-")
        x, y, _ = curves.setdefault(GENERATION_KINDS[kind], ([], [], None))
        x.append(int(steps))
        y.append(cell["frechet"])
    (measure, against), known = _measure(found.metrics), "floor" in found.metrics
    kind_of = "Samples of all classes" if found.metrics.get("conditional") else "Unconditional samples"
    figure = image_figures.against_calls(
        curves,
        "network calls a sample",
        measure,
        found.metrics["floor"]["frechet"] if known else None,
        fill(f"{kind_of}, in {found.metrics['space']}", TITLE),
        "images trained on",
    )
    figures.save(figure, out / "frechet-against-calls.png")
    rows = {name: x for name, x in found.samples.items() if name in SHOWN} or found.samples
    titles = [f"{GENERATION_KINDS[n.rpartition('-')[0]]}, {n.rpartition('-')[2]} steps" for n in rows]
    figures.save(image_figures.image_grid(list(rows.values()), titles, None, kind_of), out / "samples.png")
    dashed = " Dashed: the images trained on." if known else ""
    return {
        "frechet-against-calls.png": f"{_in_words(found.metrics)} of samples to "
        f"{'the ' * (against == 'held-out images')}{against} against network calls a sample.{dashed}",
        "samples.png": "The first sixteen samples of some samplers.",
    }


SHOWN = ("refine-1", "refine-2", "refine-4", "refine-8", "compose-4", "ode-4", "ode-64")


# -- mixtures --------------------------------------------------------------------------------------------------------


def panels(model: MetaFlowMap, law: GaussianMixture, seed: int) -> "Figure":
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
    title = "Draws of the map in one call, exact posteriors as contours"
    return figures.posterior_panels(model.path, law, PANEL_TIMES, contexts, draws, title)


def steering(metrics: dict[str, Any], samples: dict[str, Tensor], tilted: GaussianMixture, out: Path) -> None:
    """Every method's samples over the exact law, its error against its cost, and its course.

    Args:
        metrics: those of an evaluation of steering.
        samples: the first samples of each cell, "method.num_draws".
        tilted: the exact law.
        out: the directory.
    """
    shown = _one_a_method(samples)
    if tilted.dim == 2:
        figures.save(steering_figures.panels(tilted, metrics, shown), out / "steered.png")
    figures.save(steering_figures.error_against_cost(metrics), out / "error-against-cost.png")
    curves = {
        name: cell["trajectory"]
        for name, by_draws in metrics["methods"].items()
        for key, cell in by_draws.items()
        if f"{name}.{key}" in shown
    }
    figures.save(steering_figures.trajectory(curves), out / "trajectory.png")


def _one_a_method(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """One cell a method: the number of draws nearest to SHOWN_DRAWS."""
    best: dict[str, str] = {}
    for cell in samples:
        name, key = cell.rsplit(".", 1)
        if name not in best or abs(int(key) - SHOWN_DRAWS) < abs(int(best[name]) - SHOWN_DRAWS):
            best[name] = key
    return {f"{name}.{key}": samples[f"{name}.{key}"] for name, key in best.items()}
