"""Runs as commands leave them, made up: results.json and pictures."""

import json
import tempfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from metaflowmaps.lab.figures.plots import new_figure, save

TIMES = ("0.0", "0.4", "0.95")
LONG = (
    "mfm eval generation "
    + "/some/where/with/a/very/long/path" * 6
    + " --set x=<b>&'\"</code><script>alert(1)</script>"
)


@cache
def drawn(width: float) -> bytes:
    figure, axes = new_figure(width, 2.0)
    axes[0, 0].plot([0, 1], [0, 1])
    with tempfile.TemporaryDirectory() as place:
        return save(figure, Path(place) / "x.png").read_bytes()


def picture(path: Path, width: float = 6.4) -> None:
    path.write_bytes(drawn(width))


def write(run: Path, command: str, metrics: dict, invocation: str = "", config: dict | None = None, **cost) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    results = {
        "schema": 1, "command": command, "invocation": invocation, "config": config or {}, "metrics": metrics,
        "cost": cost, "environment": {"torch": "2.13.0", "device": "cpu", "threads": 1, "commit": None, "seed": 0},
    }  # fmt: skip
    (run / "results.json").write_text(json.dumps(results))
    return run


def training(run: Path) -> Path:
    config = {"recipe": "gmm", "law": {"means": [[-3.0, -3.0], [0.0, 0.0]]}}
    write(run, "train", {"loss": 0.1234567, "parameters": 53122}, "mfm train gmm", config, seconds=67.2, steps=14000)
    picture(run / "training.png")
    return run


def fidelity(run: Path) -> Path:
    at = dict.fromkeys(TIMES, 0.1)
    metrics = {
        "relative_sw2": at, "floor": at, "ratio": {**at, "0.4": 1.25}, "spread": at, "by_sampler": {"map-1": at},
        "network_calls_per_draw": {"map-1": 1}, "floor_of_others": at,
        "glass_calls_to_match_one_map_step": dict.fromkeys(TIMES),
    }  # fmt: skip
    write(run, "eval posterior", metrics, "mfm eval posterior runs/gmm", {"law": "gmm"}, seconds=3.0)
    picture(run / "error-against-calls.png", 3.0)
    picture(run / "posteriors.png", 13.0)
    return run


def steering(run: Path) -> Path:
    cell = {
        "sw2": 0.2, "floor_sw2": 0.1, "mmd": 0.01, "mode_l1": 0.02, "reward": -1234.5, "samples": 4096, "seeds": 2,
        "cost": {"nfe": 250, "seconds": 9.0, "forwards": 4096000, "backwards": 0, "reward_calls": 8192},
    }  # fmt: skip
    better = {**cell, "sw2": 0.15}
    metrics = {
        "methods": {"none": {"0": cell}, "mfm-g": {"1": cell, "16": better}, "exact": {"0": {**cell, "sw2": 0.1}}},
        "floor": {"mode_l1": 0.01}, "exact_reward": -0.5,
    }  # fmt: skip
    return write(run, "eval steering", metrics, "mfm eval steering runs/gmm", {"task": "gmm-inverse"}, seconds=9.0)


def carrying(run: Path) -> Path:
    """A command nobody registered, whose metrics bring tables, captions and a summary of their own."""
    row = ["map", "one <step>", 3, None, True, *[0.123456] * 6]
    head = ["a sampler with a rather long name", "words", *(f"a wide column {i}" for i in range(9))]
    metrics = {
        "tables": {"Fréchet distances": {"head": head, "rows": [row]}},
        "captions": {"frontier.png": "Reward against diversity."},
        "summary": "One step of the map is as good as 30 of GLASS.",
        "hidden": 987654321,
    }
    write(run, "eval generation", metrics, LONG, {"task": "class-mixture"}, seconds=3700.0)
    picture(run / "a-first.png")
    picture(run / "frontier.png")
    return run


def unknown(run: Path) -> Path:
    return write(run, "dream", {"depth": {"mean": 2.5, "per_image": [1, 2, 3]}, "word": "blue"}, seconds=0.5)


def telling(run: Path, words: str = "lean") -> Path:
    """A story of two times, two noisy pictures with two draws each, and two methods with two samples each."""
    costs = {"reward": 0.25, "diversity": 3.0, "evaluations": 1000.0, "seconds": 0.5}
    best = {"title": "best of 4", "method": "best-of-n", "rewards": [0.5, None], **costs}
    ours = {"title": "MFM-GF", "method": "mfm-gf", "rewards": [1.5, -2.0], "seeds": [7, 2**63 - 1], "reward": 0.75,
            "diversity": 2.0, "evaluations": 50.0, "seconds": 0.0012}  # fmt: skip
    story = {
        "posterior": {"sentence": f"What it may be: {words}", "times": [0.0, 0.5], "seeds": [11, 12]},
        "steered": [{"wanted": words, "sentence": words, "methods": [best, ours], "first": 1}],
    }
    write(
        run,
        "demo",
        {"story": story, "summary": "Once.", "tables": {"All": {"head": ["method"], "rows": [["mfm-gf"]]}}},
        "mfm demo",
        seconds=1.0,
    )
    sizes = {"noisy": (2, 2), "draws": (2, 2, 2), "steered.0.0": (2,), "steered.0.1": (2,)}
    grey = {name: torch.full((*size, 1, 4, 4), 100, dtype=torch.uint8) for name, size in sizes.items()}
    save_file(grey, run / "story.safetensors")
    return run


def everything(place: Path) -> list[Path]:
    makers = (training, fidelity, steering, carrying, unknown)
    return [make(place / make.__name__) for make in makers]
