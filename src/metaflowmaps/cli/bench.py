"""Measure a map's speed on this machine: samples, posterior draws and steered samples a second, utilisation, memory."""

import time

from pydantic import Field

from metaflowmaps.cli.context import Context, Results
from metaflowmaps.cli.drawing import ConditionOptions
from metaflowmaps.cli.results import Request
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.lab.throughput import Throughput

TIME = 0.4  # of the contexts that are drawn for; what a draw takes does not depend on it
TITLES = {"samples": "samples", "draws": "posterior draws", "steered": "steered samples"}


class Bench(ConditionOptions):
    """What is measured, and for how long."""

    calls: int = Field(4, ge=1, description="Network calls a sample.")
    steps: int = Field(50, ge=1, description="Steps of steering, by MFM-G with one draw each.")
    batch_size: int = Field(4096, ge=1, description="Rows of the largest batch that is tried.")
    seconds: float = Field(1.0, gt=0, description="For each batch that is tried.")

    def next_command(self, results: Results, folder: str) -> str:
        """The figures help to choose how many samples."""
        return f"mfm sample {self.named} --num 64"


def run(config: Bench, context: Context) -> Results:
    """The figures of a checkpoint, each at the batch that turns out fastest."""
    opened = OpenedModel.open(config.checkpoint, context.device)
    pictures = config.pictures(opened, config.batch_size)
    identity = config.identity(pictures, seed=context.seed or 0)
    if context.dry_run:
        return context.plan("bench", identity, opened.cost_of(config.calls))
    request = Request(context, "bench", identity, opened.beside("bench"))
    if (done := request.begin()) is not None:
        return done
    pictures.settle()
    told = pictures.pipe.use_compiled()
    if told is not None:
        context.say(f"network: {told}")
    began, throughput = time.perf_counter(), Throughput(pictures, config.batch_size, config.seconds)
    work = {
        "samples": lambda: throughput.samples(config.calls),
        "draws": lambda: throughput.draws(TIME),
        "steered": lambda: throughput.steered(config.steps),
    }
    found: dict[str, Results] = {}
    for name, measure in work.items():
        found[name] = measure()
        context.say(f"bench: {found[name]['per_second']:,.1f} {TITLES[name]} a second")
    metrics = {
        **opened.cost_of(config.calls),
        "compiled": told,
        **{f"{name}_per_second": each["per_second"] for name, each in found.items()},
        "by_work": found,
        "tables": {"Throughput": _table(found)},
    }
    return request.write(metrics, {"seconds": time.perf_counter() - began}, opened.device)


def _table(found: dict[str, Results]) -> Results:
    """The figures as they are printed."""
    head = ["what", "a second", "batch", "one alone, ms", "TFLOP/s", "MFU, %", "peak, MiB"]
    rows = [
        [
            TITLES[name],
            f"{each['per_second']:,.1f}",
            each["batch"],
            f"{1000 * each['latency_seconds']:.1f}",
            f"{each['tflops']:.3g}",
            None if each["mfu"] is None else f"{100 * each['mfu']:.0f}",
            f"{each['peak_memory_bytes'] / 2**20:,.0f}",
        ]
        for name, each in found.items()
    ]
    return {"head": head, "rows": rows}
