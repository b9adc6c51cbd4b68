"""What the benchmarks share: a place for results, the machine's name, one way to train and judge."""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import RESULTS, commit_now
from metaflowmaps.cli.results import environment
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.posterior_error import PosteriorEvalConfig, PosteriorResult, evaluate_posterior
from metaflowmaps.recipes.gmm import paper_mixture
from metaflowmaps.training.loop import TrainResult
from metaflowmaps.training.train_config import TrainConfig
from metaflowmaps.training.training_run import run_training

RUNS = Path("runs") / "bench"


def say(line: str) -> None:
    """Progress, on stderr."""
    print(line, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """The machine the figures are from."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), **environment(0, "cpu")}


def keep(name: str, command: str, figures: dict[str, Any]) -> None:
    """Write benchmarks/results/NAME.json, with the commit that it is from."""
    RESULTS.mkdir(exist_ok=True)
    result = {"command": command, **commit_now(), "machine": machine(), **figures}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    say(f"wrote {RESULTS / name}.json")


def trained(config: TrainConfig, name: str) -> TrainResult:
    """Train in runs/bench/NAME, or take what is there; the directory is one configuration's."""
    out = RUNS / name
    out.mkdir(parents=True, exist_ok=True)
    mark, text = out / "bench-config.json", config.model_dump_json()
    if mark.exists() and mark.read_text() != text:
        raise SystemExit(f"{out} holds another configuration: remove it and run the benchmark again")
    mark.write_text(text)
    torch.set_num_threads(config.threads)
    return run_training(config, out)


def judged(result: TrainResult, config: PosteriorEvalConfig) -> PosteriorResult:
    """Posterior fidelity of a run's averaged weights on the paper's mixture."""
    return evaluate_posterior(MetaFlowMap.from_pretrained(result.checkpoint), paper_mixture(), config)


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; floats with two decimals."""
    cells = [[f"{c:.2f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
