"""Noisy pictures, what they may be, and steered pictures, as report.html: about a minute on a laptop."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from metaflowmaps.checkpoint.shipped import shipped
from metaflowmaps.cli import evaluate
from metaflowmaps.cli.context import Context, Options, Results, typed_settings
from metaflowmaps.cli.results import Request
from metaflowmaps.cli.telling import print_tables
from metaflowmaps.cli.train import resolve, train
from metaflowmaps.lab.digits_story import RACE, tell_story
from metaflowmaps.lab.emoji_story import EmojiStoryConfig, tell_emoji_story
from metaflowmaps.lab.evaluate.images.recovery import RecoveryConfig
from metaflowmaps.lab.evaluate.on_mixtures import posterior_on_mixture
from metaflowmaps.lab.evaluate.posterior_error import PosteriorEvalConfig
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.lab.report.html import tables_of, write_report
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.steering import DPS, MFMG, MFMGF, SMC, TDS, BestOfN, Exact, Rejection, Resampling, Unsteered

METHODS = [m.name for m in (Unsteered, MFMG, MFMGF, SMC, DPS, TDS, BestOfN, Rejection, Resampling, Exact)]
NEXT = {
    "digits": "digits --reward margin:7 --preset images",
    "emoji": "emoji --reward colour:green --strength 30 --method mfm-g --steps 40 --num 8",
    "gmm": "runs/demo/gmm/train --reward gmm-inverse",
}


class Demo(Options):
    """Which story."""

    shared = ("out", "seed", "as_json")

    law: Literal["digits", "emoji", "gmm"] = Field(
        "digits", description="Which story: digits or emoji (shipped models), or gmm (trains a map, minutes)."
    )

    def next_command(self, results: Results, folder: str) -> str:
        """Steering of one's own, by what is shipped."""
        return f"mfm steer {NEXT[self.law]}"


def run(config: Demo, context: Context) -> Results | str:
    """The results, whose first table is shown, and the report's page."""
    out = context.out or Path("runs/demo") / config.law
    pages, results = {"digits": _digits, "emoji": _emoji, "gmm": _mixture}[config.law](out, context)
    page = str(write_report(pages, out / "report.html"))
    if context.as_json:
        return {**results, "out": page}
    title, table = next(iter(tables_of(results).items()))  # the others are on the page
    print_tables({title: table})
    return f"report: {page}"


def _part(context: Context, out: Path, command: str, settings: tuple[str, ...] = ()) -> Context:
    """The context of a command that the demo runs, as if it had been typed."""
    return context.model_copy(update={"out": out, "device": "cpu", "invocation": typed_settings(command, settings)})


def _digits(out: Path, context: Context) -> tuple[list[Path], Results]:
    """Noisy digits, what they may be, and digits steered: the shipped models, no training."""
    digits = str(shipped("digits") or "digits")  # the shipped map, whatever directory is called digits here
    context.say("digits: what noisy images may be, and a race for two rewards …")
    story = _story(digits, RACE, tell_story, _part(context, out / "story", "demo"))
    context.say("digits: one-step draws against GLASS …")
    settings = RecoveryConfig(samples=512, glass_steps=(1, 4, 16, 30), images=64, seed=context.seed or 0)
    typed = ("samples=512", "glass_steps=[1,4,16,30]", "images=64")
    evaluate.measure_images(
        "posterior", digits, settings, _part(context, out / "posterior", "eval posterior digits", typed)
    )
    return [out / "story", out / "posterior"], story


def _emoji(out: Path, context: Context) -> tuple[list[Path], Results]:
    """Noisy emoji, what they may be, and emoji steered to a colour, a category, both: the shipped models."""
    emoji = str(shipped("emoji") or "emoji")
    context.say("emoji: what noisy pictures may be, and steering to a colour, a category, both …")
    told = _part(context, out / "story", "demo --law emoji")
    return [out / "story"], _story(emoji, EmojiStoryConfig(), tell_emoji_story, told)


def _story(checkpoint: str, settings: Any, tell: Callable[..., Results], context: Context) -> Results:
    """The story's figures and what they say.

    Args:
        checkpoint: of the map.
        settings: an ImageEvalConfig, of what ``tell`` does.
        tell: (opened, settings, out, say) -> metrics.
        context: of the story.
    """
    opened = OpenedModel.open(checkpoint, "cpu")
    config = settings.model_copy(update={"seed": context.seed or 0})
    assert context.out is not None
    request = Request(context, "demo", {"checkpoint": opened.digest, **config.model_dump()}, context.out)
    done = request.begin()
    if done is not None:
        return done
    began = time.perf_counter()
    metrics = tell(opened, config, request.out, lambda line: context.say(f"demo: {line}"))
    return request.write(metrics, {"seconds": time.perf_counter() - began}, opened.device)


def _mixture(out: Path, context: Context) -> tuple[list[Path], Results]:
    """Train the mixture's map, judge it, steer it."""
    map_, seed = str(out / "train"), context.seed or 0
    config = resolve(gmm(fast=True), (), context)
    context.say(f"training the meta flow map of a three-mode mixture ({config.steps} steps) …")
    train(config, _part(context, out / "train", "train gmm --fast"))
    context.say("judging its posterior draws against the exact posteriors …")
    settings = PosteriorEvalConfig(samples=8192, seed=seed, sets=8, other_contexts=4)
    judged = evaluate.measure(
        posterior_on_mixture(map_, "gmm", settings, "cpu"),
        _part(context, out / "eval", f"eval posterior {map_}", ("sets=8", "other_contexts=4")),
    )
    context.say("steering it towards an observation, every method on one meter …")
    typed = ("steps=50", "seeds=1", "num_draws=[4]", f"methods={json.dumps(METHODS)}")
    evaluate.steering(
        evaluate.SteeringEvaluation(checkpoint=map_, task="gmm-inverse", samples=2048, settings=typed),
        _part(context, out / "steering", f"eval steering {map_} --samples 2048", typed),
    )
    return [out / "eval", out / "steering", out / "train"], judged
