"""World size: the same run on 1, 2 and 4 ranks, sharded, copied and both; speed, and by how much the weights differ.

The yardstick is one rank that takes its batch in four pieces: what another order of the same sums does in float32.
A transformer with the eulerian loss (forward-mode derivatives, a frozen teacher), Adam; gloo ranks of one thread each.
On a machine with fewer cores than ranks the speeds say what talking costs, not what ranks bring.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import keep
from metaflowmaps.checkpoint import resolve_checkpoint
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks.dit import SIZES, DiTConfig
from metaflowmaps.path import LinearPath
from metaflowmaps.random import randn, stream
from metaflowmaps.recipes.gmm import gmm
from metaflowmaps.training.loop import Watch, train
from metaflowmaps.training.objective import Objective
from metaflowmaps.training.run_log import Record
from metaflowmaps.training.teachers import GlassTeacher
from metaflowmaps.training.train_config import LossConfig, TimesConfig, TrainConfig
from metaflowmaps.work import ranks

STEPS, BATCH = 20, 32
# (ranks, shard, micro-batches)
CASES = ((1, 1, 1), (1, 1, 4), (2, 1, 1), (2, 0, 1), (4, 1, 1), (4, 2, 1), (4, 0, 1))


class Pictures:
    """Noisy gradients, (n, 1, 8, 8)."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return randn((n, 1, 1, 8), generator) + 0.3 * randn((n, 1, 8, 8), generator)


def main() -> None:
    """Run every case in processes of its own; a table and a JSON file."""
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            _torchrun(case[0], number, Path(folder) / str(number))
        runs = [_read(Path(folder) / str(number)) for number in range(len(CASES))]
    whole, start = runs[0]["weights"], _build().state_dict()
    moved = _distance(whole, start)
    figures = []
    for (size, shard, pieces), run in zip(CASES, runs, strict=True):
        difference = _distance(run["weights"], whole)
        figures.append(
            {
                "ranks": size,
                "shard": shard,
                "micro_batches": pieces,
                "steps_per_second": run["steps_per_second"],
                "weight_difference": difference,
                "loss": run["loss"],
            }
        )
    print(f"\nthe largest movement of a weight in these {STEPS} steps: {moved:.1e}")
    keep("world-size", "python -m benchmarks world-size", {"steps": STEPS, "moved": moved, "cases": figures})


def _torchrun(size: int, number: int, out: Path) -> None:
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*call, "-m", "benchmarks.world_size", str(number), str(out)], check=True, env=environment)


def _read(out: Path) -> dict[str, Any]:
    # the first steps allocate and connect
    speeds = [float(line) for line in (out / "speeds").read_text().split()][4:]
    held = resolve_checkpoint(out)
    loss = held.document("position.json")["last_loss"]
    return {"weights": held.tensors("model.safetensors"), "loss": loss, "steps_per_second": statistics.median(speeds)}


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def _build() -> MetaFlowMap:
    """A map whose weights are all in play from the first step."""
    network, g = DiTConfig(**SIZES["nano"]).network((1, 8, 8)), stream(0, "world-size")
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.1 * randn(tuple(p.shape), g))
    return MetaFlowMap(network, LinearPath())


def worker(number: int, out: Path) -> None:
    """One rank of a case."""
    torch.set_num_threads(1)
    _, shard, pieces = CASES[number]
    data = gmm().model_dump()
    data.update(steps=STEPS, batch_size=BATCH, log_every=1, shard=shard, micro_batches=pieces, threads=1)
    data["loss"] = LossConfig(consistency="eulerian").model_dump()
    data["optimizer"].update(name="adam", lr=1e-3, warmup_steps=0)
    config, model = TrainConfig.model_validate(data), _build()
    frozen = _build().requires_grad_(False)
    teacher = GlassTeacher(LinearPath(), frozen.drift)
    objective = Objective(Pictures(), config.loss, TimesConfig(last=0.9), teacher, BATCH, 0)
    ends: list[float] = []

    def report(record: Record) -> None:
        ends.append(record.seconds)

    with ranks.session():
        train(model, objective, config, out, watch=Watch(lambda _, record: report(record)))
    if ends:
        speeds = [1 / (b - a) for a, b in pairwise(ends)]
        (out / "speeds").write_text("\n".join(map(str, speeds)))


if __name__ == "__main__":
    worker(int(sys.argv[1]), Path(sys.argv[2]))
