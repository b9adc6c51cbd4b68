"""Memory of MFM-G with 4 and with 64 draws, on a small U-Net at 28×28: medians of five processes each."""

import statistics
import subprocess
import sys

import torch

from benchmarks.common import keep
from metaflowmaps import LinearPath, MetaFlowMap, steer
from metaflowmaps.networks import make_network

NETWORK = {"name": "unet", "channels": 1, "size": 28, "width": 16, "multipliers": [1, 2], "blocks": 1, "attention": []}


def peak(num_draws: int, blend: bool) -> float:
    """Growth of the peak resident size in bytes over three steps of 32 samples."""
    torch.set_num_threads(1)
    model = MetaFlowMap(make_network(NETWORK), LinearPath()).eval()
    direction = torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(0))
    result = steer(
        model, lambda x: (x * direction).flatten(1).sum(1) / 28, 32, "mfm-g", num_draws, 3, blend=blend,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return result.cost["peak_memory_bytes"]


def main() -> None:
    """benchmarks/results/memory.json: bytes by draws, plain and with recycling."""
    figures = {}
    for name, blend in (("plain", False), ("blended", True)):
        by_draws = {}
        for n in (4, 64):
            code = f"from benchmarks.memory import peak; print(peak({n}, {blend}))"
            command = [sys.executable, "-W", "ignore", "-c", code]
            # allocators differ from run to run
            runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(5)]
            by_draws[str(n)] = statistics.median(float(run.stdout) for run in runs)
        figures[name] = {**by_draws, "ratio": by_draws["64"] / by_draws["4"]}
    keep("memory", "python -m benchmarks memory", figures)


if __name__ == "__main__":
    main()
