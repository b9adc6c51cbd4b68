"""mfm demo: the digits' story from the shipped models, or the mixture's from its training to its steering."""

import json
import time
from pathlib import Path
from typing import Any

import torch

from metaflowmaps.checkpoint.shipped import shipped
from metaflowmaps.commands.images import evaluate_images
from metaflowmaps.commands.judge import eval_posterior
from metaflowmaps.commands.runs import write_results
from metaflowmaps.commands.shared import Results, Say, begun, digest, open_model, typed
from metaflowmaps.commands.stage import open_stage
from metaflowmaps.commands.steering import eval_steering
from metaflowmaps.commands.train import resolve_training, train
from metaflowmaps.errors import unknown
from metaflowmaps.lab.evaluate.images.race import RaceConfig, evaluate_race, title
from metaflowmaps.lab.evaluate.images.stage import table
from metaflowmaps.lab.figures import image_figures
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.lab.report.html import write_report
from metaflowmaps.random import randn, stream
from metaflowmaps.recipes.gmm import gmm

SHOWN = ["none", "mfm-g", "mfm-gf", "mfm-smc", "dps", "tds", "best-of-n", "exact"]
STORIES = ("digits", "gmm")
HEADLINE = "MFM-G with one draw against best-of-N"
STORY_TIMES = (0.1, 0.3, 0.5, 0.7)
RACE = RaceConfig(
    rewards=("margin", "slant"), methods=("mfm-g-rescale-1", "mfm-gf-4", "dps"), strengths=(8.0,), rescales=(0.5, 1.5),
    samples=64, pool=8000,
)  # fmt: skip
GAMMA = {"margin": 1.5, "slant": 0.5}  # the length of MFM-G's steering that the story shows
STEERED = (
    ("ode 1", "unsteered"), ("ode 1000", "best of 1,000"), ("dps 8", "DPS"),
    ("mfm-g-rescale-1 {gamma:g}", "MFM-G, one draw"),
    ("mfm-gf-4 8", "MFM-GF, 4 draws"),
)  # fmt: skip


def demo(law: str, out: Path | None, seed: int, say: Say) -> tuple[Path, Results]:
    """The report's page, and the results whose tables are shown."""
    if law not in STORIES:
        raise unknown("law", law, STORIES)
    return (demo_digits if law == "digits" else demo_mixture)(out or Path("runs/demo") / law, seed, say)


def demo_digits(out: Path, seed: int, say: Say) -> tuple[Path, Results]:
    """Noisy digits, what they may be, and digits steered: the shipped models, no training."""
    say("digits: what noisy images may be, and a race for two rewards …")
    story = _story(out / "story", seed, say)
    say("digits: one-step draws against GLASS …")
    settings = ["samples=512", "glass_steps=[1,4,16,30]", "images=64"]
    evaluate_images(
        "posterior", _digits(), out / "posterior", settings, seed, "cpu",
        typed("eval posterior digits", settings), say,
    )  # fmt: skip
    return write_report([out / "story", out / "posterior"], out / "report.html"), story


def _digits() -> str:
    """The shipped map, whatever directory is called digits here."""
    return str(shipped("digits") or "digits")


def _story(out: Path, seed: int, say: Say) -> Results:
    """The first figure: draws for noisy digits on the left, steered digits with their costs on the right."""
    model, found, device = open_model(_digits(), "cpu")
    config = RACE.model_copy(update={"seed": seed})
    full = {"checkpoint": digest(found), **config.model_dump()}
    done = begun(out, "demo", full)
    if done is not None:
        return done
    began = time.perf_counter()
    stage, _ = open_stage(_digits(), found, model, config)
    raced = evaluate_race(stage, config, lambda line: say(f"demo: {line}"))
    noisy = []
    images, _ = stage.images(len(STORY_TIMES), "story", seed)
    for i, t in enumerate(STORY_TIMES):
        g = stream(seed, "story", i)
        x_t = model.path.interpolate(randn(tuple(images[i : i + 1].shape), g), images[i : i + 1], t)
        with torch.no_grad():
            noisy.append((images[i], x_t[0], model.draw(t, x_t, 6, generator=g)[:, 0]))
    cells = {
        name: {f"{c['method']} {c.get('strength', c.get('n')):g}": c for c in race["cells"]}
        for name, race in raced.metrics["rewards"].items()
    }
    for name, wish in (("margin", "“be a three”"), ("slant", "“lean to the right”")):
        keys = [(key.format(gamma=GAMMA[name]), label) for key, label in STEERED]
        shown = [(label, raced.samples[name][key][:6], _price(cells[name][key])) for key, label in keys]
        picture = image_figures.story(noisy, shown, f"From noisy digits to steered digits; the reward says {wish}")
        figures.save(picture, out / f"story-{name}.png")
    metrics: dict[str, Any] = {
        "rewards": raced.metrics["rewards"],
        "tables": {
            HEADLINE: raced.metrics["tables"][HEADLINE],
            **{f"Reward {name}": _short(name, race) for name, race in raced.metrics["rewards"].items()},
        },
        "summary": "Every row of draws comes from one noisy digit, one network call a draw. Steered digits come from "
        "noise; beside them is what one sample cost in network and reward evaluations (NFE) and in time here.",
        "captions": {
            "story-margin.png": "Left: a digit, its noisy version, and six draws of what it may have been, one "
            "network call each. Right: digits steered to be threes, by the log-odds of a classifier.",
            "story-slant.png": "The same, steered to lean to the right, a reward measured from pixels.",
        },
    }  # fmt: skip
    cost = {"seconds": time.perf_counter() - began}
    return write_results(out, "demo", full, metrics, cost, seed=seed, device=device, invocation="mfm demo")


def _price(cell: dict[str, Any]) -> str:
    seconds = cell["cost"]["seconds"]
    took = f"{1000 * seconds:.2g} ms" if seconds < 1 else f"{seconds:.2g} s"
    return f"reward {cell['reward']:.2f}, diversity {cell['distance']:.1f}\n{cell['cost']['nfe']:,.0f} NFE, {took}"


def _short(name: str, race: dict[str, Any]) -> dict[str, Any]:
    rows = [
        [title(c["method"]), c.get("strength", c.get("n")), c["reward"], c["distance"], round(c["cost"]["nfe"]),
         1000 * c["cost"]["seconds"]]
        for c in race["cells"] if "reward" in c
    ]  # fmt: skip
    return table(["method", "λσ, γ or N", "reward", "mean distance", "NFE", "ms"], rows)


def demo_mixture(out: Path, seed: int, say: Say) -> tuple[Path, Results]:
    """Train the mixture's map, judge it, steer it."""
    config = resolve_training(gmm(fast=True), [], seed, None)
    say(f"training the meta flow map of a three-mode mixture ({config.steps} steps) …")
    train(config, out / "train", "cpu", "auto", "mfm train gmm --fast", say)
    say("judging its posterior draws against the exact posteriors …")
    settings = ["sets=8", "other_contexts=4"]
    results = eval_posterior(
        str(out / "train"), "gmm", 8192, out / "eval", settings, seed, "cpu",
        typed(f"eval posterior {out / 'train'}", settings), say,
    )  # fmt: skip
    say("steering it towards an observation, every method on one meter …")
    settings = ["steps=50", "seeds=1", "num_draws=[4]", f"methods={json.dumps(SHOWN)}"]
    eval_steering(
        str(out / "train"), "gmm-inverse", 2048, out / "steering", settings, seed, "cpu",
        typed(f"eval steering {out / 'train'} --samples 2048", settings), say,
    )  # fmt: skip
    return write_report([out / "eval", out / "steering", out / "train"], out / "report.html"), results
