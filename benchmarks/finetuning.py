"""Fine-tuning where the truth is known (the paper's inverse problem) and on digits, beside steering.

Every cell is a run of ``mfm finetune`` under ``runs/bench/finetune``; what is complete is only read. The two tables are
written as results of their own, for ``mfm report``, and kept under benchmarks/results.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks import benchmark_figures
from benchmarks.common import RESULTS, RUNS, machine, say, trained
from metaflowmaps.cli.context import Context, typed_settings
from metaflowmaps.cli.finetune import Finetune, choose_subject, resolve, tune
from metaflowmaps.cli.results import environment
from metaflowmaps.errors import InputError
from metaflowmaps.lab.evaluate.images.setup import cost_of, table
from metaflowmaps.lab.evaluate.images.steered import image_variant
from metaflowmaps.lab.evaluate.images.steered import run as steered
from metaflowmaps.lab.evaluate.tuning_error import Drawn, TunedEvalConfig
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.random import stream
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.steering import ODE

PLACE = RUNS / "finetune"
THREADS = "threads=1"

# -- the paper's mixture -------------------------------------------------------------------------------

STRENGTHS = (1.0, 30.0, 1000.0)
EXACTLY = TunedEvalConfig(samples=4096, seeds=8, ode_steps=250)
# name: what it is called in tables, options of the command, settings
ON_MIXTURE: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "ft": ("MFM-FT, then distilled", {}, []),
    "ft-replay": ("MFM-FT with replay, then distilled", {},
                  ["states.base=0.25", "states.tilted=0.25", "states.replay=0.5"]),
    "direct": ("tilted map in one stage", {"method": "direct"}, ["steps=5000"]),
    "free": ("MFM-FT without reward gradients", {"map": "none"}, ["method.form=gradient-free"]),
    "gradient": ("MFM-FT, gradient form", {"map": "none"}, ["method.form=gradient"]),
    "one-draw": ("MFM-FT, one draw, states of the base", {"map": "none", "num_draws": 1},
                 ["method.form=gradient", "states.tilted=0", "states.base=1"]),
    "learned": ("MFM-FT, learned baseline", {"map": "none"}, ["method.baseline=learned"]),
    "draws": ("MFM-FT, V̂ of 4 other draws as baseline", {"map": "none"}, ["method.baseline=draws"]),
    "low-rank": ("MFM-FT, rank 8", {"map": "none"}, ["low_rank=8"]),
    "snr": ("self-normalised, 4 draws", {"map": "none", "method": "self-normalised"}, ["method.form=gradient"]),
    "snr-16": ("self-normalised, 16 draws", {"map": "none", "method": "self-normalised", "num_draws": 16},
               ["method.form=gradient", "steps=1200"]),
    "adjoint": ("adjoint matching", {"map": "none", "method": "adjoint-matching"}, ["steps=1500"]),
    "draft": ("DRaFT on the one-step map", {"method": "draft"}, ["steps=2000"]),
    "tilt": ("tilt matching", {"map": "none", "method": "tilt-matching"}, []),
    "tilt-explicit": ("tilt matching, explicit", {"map": "none", "method": "tilt-matching"}, ["method.form=explicit"]),
    "ram": ("RAM", {"map": "none", "method": "ram"}, []),
}  # fmt: skip
SWEPT = ("ft", "direct", "free", "gradient", "snr", "adjoint", "draft", "tilt")  # the others: at λ = 1


def mixture() -> None:
    """Every method on gmm-inverse, and the sweep over λ."""
    base = trained(gmm(), "finetune-base").checkpoint.parent.parent
    cells: dict[str, dict[str, Any]] = {}
    for strength in STRENGTHS:
        for name in ON_MIXTURE if strength == 1 else SWEPT:
            title, given, settings = ON_MIXTURE[name]
            done = _run(str(base), "gmm-inverse", strength, name, given, settings, EXACTLY)
            cells[f"{name}-{strength:g}"] = {"title": title, "strength": strength, **done}
    rows = [_mixture_row(cells[f"{name}-1"]) for name in ON_MIXTURE]
    head = ["method", "drift: SW2 / floor", "mode L1", "one step: SW2 / floor", "mode L1", "seconds", "million NFE"]
    first = table(head, [row[1:] for row in sorted(rows, key=lambda row: row[0])])
    sweep = [
        [ON_MIXTURE[name][0], *(_best_ratio(cells[f"{name}-{s:g}"]) for s in STRENGTHS)] for name in SWEPT
    ]  # fmt: skip
    modes = [
        [ON_MIXTURE[name][0], *(_best(cells[f"{name}-{s:g}"], "mode_l1") for s in STRENGTHS)] for name in SWEPT
    ]  # fmt: skip
    rewards = [
        [ON_MIXTURE[name][0], *(_best(cells[f"{name}-{s:g}"], "reward") for s in STRENGTHS)] for name in SWEPT
    ]  # fmt: skip
    lambdas = [f"λ = {s:g}" for s in STRENGTHS]
    metrics = {
        "cells": cells,
        "tables": {
            "Tuned to the paper's inverse problem, against exact samples": first,
            "Sharper rewards: SW2 / floor of the drift's samples (DRaFT: of one step)": table(
                ["method", *lambdas], sweep
            ),
            "Sharper rewards: mode L1 of the same": table(["method", *lambdas], modes),
            "Sharper rewards: mean λr of the same (exact: −.5 at every λ; lower is too wide)": table(
                ["method", *lambdas], rewards
            ),
        },
        "summary": f"250 steps of the tuned drift, {EXACTLY.seeds} sets of {EXACTLY.samples} samples; floor: two exact "
        "sets of that size. One core.",
        "captions": {"sweep.png": "Distance to the exact tilted law (dashed: exact samples) as the reward sharpens."},
    }
    out = RUNS / "finetune-mixture"
    out.mkdir(parents=True, exist_ok=True)
    curves = {ON_MIXTURE[name][0]: [_best_ratio(cells[f"{name}-{s:g}"]) for s in STRENGTHS] for name in SWEPT}
    figures.save(benchmark_figures.sweep(STRENGTHS, curves), out / "sweep.png")
    _keep(out, "finetune-mixture", metrics)


def _mixture_row(cell: dict[str, Any]) -> list[Any]:
    by = cell["samplers"]
    drift, step = by.get("ode-250", {}), by.get("map-1", {})
    key = min((c["ratio"] for c in by.values() if "ratio" in c), default=1e9)
    return [key, cell["title"], drift.get("ratio"), drift.get("mode_l1"), step.get("ratio"), step.get("mode_l1"),
            cell["cost"]["seconds"], cell["cost"]["nfe"] / 1e6]  # fmt: skip


def _best(cell: dict[str, Any], what: str) -> float | None:
    by = cell["samplers"]
    value: float | None = by.get("ode-250", by.get("map-1", {})).get(what)
    return value


def _best_ratio(cell: dict[str, Any]) -> float | None:
    return _best(cell, "ratio")


# -- digits --------------------------------------------------------------------------------------------

LAMBDAS = (1.0, 2.5, 5.0, 10.0)
SLANT_STD = 0.109  # of the slant of the base's samples: its λ counts these
ON_DIGITS = {"mixture": 1.0, "slant": 1 / SLANT_STD}  # strength of λ = 1
STEERED = ("mfm-gf-4", "mfm-g-1", "mfm-smc-4", "rejection", "resampling-16", "resampling-64")
STEERED_STEPS, STEERED_SAMPLES = 50, 1024
VARIED = {"direct": ({"method": "direct"}, ["steps=4000"]), "low-rank": ({"map": "none"}, ["low_rank=16"]),
          "snr": ({"map": "none", "method": "self-normalised"}, []),
          "adjoint": ({"map": "none", "method": "adjoint-matching"}, ["steps=800"]),
          "draft": ({"method": "draft"}, ["steps=500"])}  # fmt: skip
JUDGED = TunedEvalConfig(samples=2048, seeds=1, ode_steps=50)


def digits() -> None:
    """Two rewards, four strengths, beside steering of the base for the same tilt."""
    rewards: dict[str, dict[str, Any]] = {}
    for reward, unit in ON_DIGITS.items():
        rewards[reward] = {}
        for lam in LAMBDAS:
            tuned = _run("digits", reward, lam * unit, "ft", {}, [], JUDGED)
            rewards[reward][f"{lam:g}"] = {**tuned, "steered": _steered(reward, lam * unit)}
        for name, (given, settings) in VARIED.items() if reward == "mixture" else ():
            rewards[reward][f"1-{name}"] = _run("digits", reward, unit, name, given, settings, JUDGED)
    tables: dict[str, Any] = {}
    for reward, by in rewards.items():
        tables |= _digits_tables(reward, by)
    metrics = {
        "rewards": rewards, "tables": tables,
        "summary": f"Tuned digits beside steering for the same p_1 e^{{λr}}; steering takes {STEERED_STEPS} steps.",
        "captions": {"crossover.png": "Network and reward calls in all, training included, against samples made."},
    }  # fmt: skip
    out = RUNS / "finetune-digits"
    out.mkdir(parents=True, exist_ok=True)
    figures.save(benchmark_figures.crossover(_bills(rewards["mixture"]["1"])), out / "crossover.png")
    for reward in ON_DIGITS:
        for lam in LAMBDAS:
            picture = PLACE / f"digits-{reward}-{lam * ON_DIGITS[reward]:.4g}-ft" / "samples.png"
            shutil.copy(picture, out / f"{reward}-{lam:g}.png")
            metrics["captions"][f"{reward}-{lam:g}.png"] = (
                f"Base (two rows) and tuned to {reward}, λ = {lam:g}: one step."
            )
    _keep(out, "finetune-digits", metrics)


def _digits_tables(reward: str, by: dict[str, Any]) -> dict[str, Any]:
    """Quality of tuned and steered samples against the target, and what they cost."""
    classes = reward == "mixture"
    head = ["λ", "samples by", "λr", "margin", "half", "ink", "mean distance", "Vendi", "Fréchet to target",
            *(["class L2 to w", "to target"] if classes else []), "NFE a sample", "ms a sample"]  # fmt: skip
    rows: list[list[Any]] = []
    bills: list[list[Any]] = []
    for key, cell in by.items():
        target = cell["target"]

        def row(title: str, c: dict[str, Any], nfe: Any, ms: Any, key: str = key, target: Any = target) -> list[Any]:
            apart = None
            if "class_frequencies" in c:
                pairs = zip(c["class_frequencies"], target["class_frequencies"], strict=True)
                apart = sum((a - b) ** 2 for a, b in pairs) ** 0.5
            return [
                key.partition("-")[0], title, c.get("reward"), c.get("reward_margin"), c.get("reward_half"),
                c.get("reward_ink"), c.get("distance"), c.get("vendi"), c.get("frechet_to_target"),
                *([c.get("class_l2"), apart] if classes else []), nfe, ms,
            ]  # fmt: skip

        kind = key.partition("-")[2]
        words = {"": "tuned", "direct": "tuned in one stage", "low-rank": "tuned, rank 16", "snr": "self-normalised",
                 "adjoint": "adjoint matching", "draft": "DRaFT"}[kind]  # fmt: skip
        for name, c in cell["samplers"].items():
            rows.append(row(f"{words}, {name}", c, c["calls"], 1000 * c["seconds"]))
        for name, c in cell.get("steered", {}).items():
            rows.append(row(f"steered, {image_variant(name).title}", c, c["cost"]["nfe"], 1000 * c["cost"]["seconds"]))
            spent, base = cell["cost"], cell["samplers"]["map-1"]
            bills.append([key, image_variant(name).title, spent["nfe"] / 1e6, spent["seconds"],
                          spent["nfe"] / max(1e-9, c["cost"]["nfe"] - 1),
                          spent["seconds"] / max(1e-9, c["cost"]["seconds"] - base["seconds"])])  # fmt: skip
        if not kind:
            rows.append(row("base, ode-50", cell["base"]["ode-50"], 50, None))
            rows.append(row(f"what is asked for (from {target['ess']:.0f} base samples)", target, None, None))
    return {
        f"{reward}: tuned and steered": table(head, rows),
        f"{reward}: when tuning pays, one step of the tuned map against steering": table(
            ["λ", "against", "training, million NFE", "training, s", "pays after samples, by NFE", "by seconds"], bills
        ),
    }


def _bills(cell: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Calls before the first sample, and calls a sample."""
    bills = {"tuned, one step": (cell["cost"]["nfe"], 1.0), "tuned, 50 steps of the drift": (cell["cost"]["nfe"], 50.0)}
    by_cost: dict[float, list[str]] = {}
    for name, c in cell["steered"].items():
        by_cost.setdefault(c["cost"]["nfe"], []).append(image_variant(name).title)
    return bills | {"steered, " + " or\n".join(names): (0.0, nfe) for nfe, names in by_cost.items()}


def _steered(reward: str, strength: float) -> dict[str, Any]:
    """Steered samples of the base, judged as tuned ones are."""
    asked = Finetune(checkpoint="digits", reward=reward, strength=strength)
    subject, _ = choose_subject(OpenedModel.open("digits", "cpu"), asked)
    setup, judge = subject.setup, subject.judge
    judge.target(subject.base, 0, lambda n, g: {})
    out: dict[str, Any] = {}
    for name in STEERED:
        kept = PLACE / f"digits-{reward}-{strength:.4g}-steered-{name}.json"
        if not kept.exists():
            say(f"digits, {reward}, strength {strength:.4g}: steered by {name}")
            g = stream(0, "benchmark", reward, repr(strength), name)
            assert setup is not None
            process = ODE(steps=STEERED_STEPS)
            try:
                x, result = steered(setup, image_variant(name), subject.reward, STEERED_SAMPLES, process, g)
            except InputError as refused:  # rejection, of a reward that next to no sample meets: no row
                say(str(refused))
                continue
            kept.write_text(json.dumps({**judge([Drawn(x, {})]).to_json(), "cost": cost_of(result)}))
        out[name] = json.loads(kept.read_text())
    return out


# -- both ----------------------------------------------------------------------------------------------


def _run(
    base: str,
    reward: str,
    strength: float,
    name: str,
    given: dict[str, Any],
    settings: list[str],
    judged: TunedEvalConfig,
) -> dict[str, Any]:
    """A run of mfm finetune, or what it ended with."""
    asked = Finetune(checkpoint=base, reward=reward, strength=strength)
    subject, chosen = choose_subject(OpenedModel.open(base, "cpu"), asked)
    settings = [THREADS, "meters.every=1000", *settings]
    out = PLACE / f"{'gmm' if base != 'digits' else base}-{reward}-{strength:.4g}-{name}"
    say(f"{out.name}")
    command = typed_settings(f"finetune {base} --reward {reward} --strength {strength:.4g}", settings)
    context = Context(out=out, device="cpu", invocation=command)
    results = tune(subject, resolve(subject, chosen, given, tuple(settings), context), context, judged)
    return {**{k: results["metrics"].get(k) for k in ("samplers", "base", "target", "probe")}, "cost": results["cost"]}


def _keep(out: Path, name: str, metrics: dict[str, Any]) -> None:
    """results.json for mfm report, and a copy with its figures among the benchmarks' results."""
    results = {
        "schema": 1, "command": f"benchmark {name}", "invocation": f"python -m benchmarks {name}", "config": {},
        "metrics": metrics, "cost": {}, "environment": {**environment(0, "cpu"), **machine()},
    }  # fmt: skip
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    shutil.copy(out / "results.json", RESULTS / f"{name}.json")
    for picture in out.glob("*.png"):
        shutil.copy(picture, RESULTS / f"{name}-{picture.name}")
    say(f"wrote {RESULTS / name}.json at {time.strftime('%H:%M')}")
