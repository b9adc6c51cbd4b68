"""The image experiments on the shipped digits map; results and figures under benchmarks/results/digits.

Each is the command ``mfm eval … digits --out runs/img/NAME`` with the settings below.
"""

import json
import shutil
from pathlib import Path

from benchmarks.common import RESULTS
from metaflowmaps.cli.context import Context, typed_settings
from metaflowmaps.cli.evaluate import measure_images
from metaflowmaps.lab.evaluate.images import experiments
from metaflowmaps.work.config import override

RUNS = Path("runs/img")
EXPERIMENTS: dict[str, tuple[str, list[str]]] = {
    "posterior": ("posterior", []),
    "generation": ("generation", []),
    "value": ("value", []),
    "race": ("race", ["strengths=[1,4,16,64]", "rescales=[0.5,1.0,1.5,2.0]"]),
    "mixture": ("class-mixture", ["steps=100", "budget=2e6"]),
    "inverse": ("inverse", []),
    # more samples for the figures that come nearest to their targets
    "posterior-16k": ("posterior", ["samples=16384", "glass_steps=[8,30]", "seed=1"]),
}
PICTURED = ("posterior", "generation", "value", "race", "mixture", "inverse")


def main() -> None:
    """All of them; those that are complete are only copied."""
    for name, (experiment, settings) in EXPERIMENTS.items():
        out = RUNS / name
        what = f"steering digits --task {experiment}" if experiment in experiments.STEERING else f"{experiment} digits"
        context = Context(out=out, device="cpu", invocation=typed_settings(f"eval {what}", settings))
        measure_images(experiment, "digits", override(experiments.EXPERIMENTS[experiment].config(), settings), context)
        place = RESULTS / "digits"
        place.mkdir(parents=True, exist_ok=True)
        results = json.loads((out / "results.json").read_text())
        (place / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        for picture in out.glob("*.png") if name in PICTURED else ():
            shutil.copy(picture, place / f"{name}-{picture.name}")
