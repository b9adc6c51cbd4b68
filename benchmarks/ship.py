"""Put trained models into the package: ``python -m benchmarks.ship [RUNS]`` after the commands below, of those that are
in RUNS.

    mfm train digits        mfm train digits-guide        mfm train digits-judge
    mfm train emoji --fast  mfm train emoji-guide --fast  mfm train emoji-judge --fast

Each shipped checkpoint holds the averaged weights, the whole configuration with recipe and seed, and the command.
"""

import shutil
import sys
from pathlib import Path

import metaflowmaps
from metaflowmaps.checkpoint import export_run
from metaflowmaps.checkpoint.shipped import FOLDER
from metaflowmaps.work.claims import read_json

LIMIT = 10_000_000  # bytes, in all
MODELS = {
    "digits": "digits",
    "digits-drift": "digits/drift",
    "digits-guide": "digits-guide",
    "digits-judge": "digits-judge",
    "emoji": "emoji",
    "emoji-guide": "emoji-guide",
    "emoji-judge": "emoji-judge",
}


def main() -> None:
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    for name, place in MODELS.items():
        stage = place.partition("/")[0]
        if not (runs / stage / "results.json").exists():
            continue
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        results = read_json(runs / stage / "results.json")
        notes = {
            "command": results["invocation"].partition(" --out")[0],
            "seconds": results["cost"]["seconds"],
            "figures": {k: v for k, v in results["metrics"].items() if isinstance(v, int | float)},
            "environment": results["environment"],
        }
        export_run(runs / place, FOLDER / name, notes)
    total = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    print(f"{total:,} bytes in {FOLDER.relative_to(Path(metaflowmaps.__file__).parents[2])}")
    if total > LIMIT:
        sys.exit(f"more than {LIMIT:,} bytes: the package must stay small")


if __name__ == "__main__":
    main()
