"""Memory of MFM-G against draws and steps: medians of several processes each.

On a small U-Net at 28×28; and on the pipeline, where the gradient of a reward goes through a decoder: a transformer of
4.6 M parameters on latents 4×32×32, an autoencoder that makes 256×256 pictures of them, one picture at a time.
"""

import os
import statistics
import subprocess
import sys

import torch

from benchmarks.common import keep
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks import make_network
from metaflowmaps.path import LinearPath
from metaflowmaps.steering import MFMG, ODE, steer

NETWORK = {"name": "unet", "channels": 1, "size": 28, "width": 16, "multipliers": [1, 2], "blocks": 1, "attention": []}


def peak(num_draws: int, blend: bool) -> float:
    """Growth of the peak resident size in bytes over three steps of 32 samples."""
    torch.set_num_threads(1)
    model = MetaFlowMap(make_network(NETWORK), LinearPath()).eval()
    direction = torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(0))
    method = MFMG(num_draws, blend=blend)
    result = steer(model, lambda x: (x * direction).flatten(1).sum(1) / 28, 32, method, ODE(steps=3), seed=0)
    return result.cost["peak_memory_bytes"]


def peak_of_pipeline(num_draws: int, steps: int, micro_batch: int, checkpointing: bool) -> float:
    """Growth of the peak resident size in bytes while one picture is steered."""
    import warnings

    from tests.tiny_codec import tiny_codec

    from metaflowmaps.networks.dit import SIZES, DiTConfig
    from metaflowmaps.pipeline import Pipeline

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    network = DiTConfig(patch=2, num_classes=10, **SIZES["tiny"]).network((4, 32, 32))
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    codec = tiny_codec(micro_batch=micro_batch, checkpointing=checkpointing)
    pipe = Pipeline(MetaFlowMap(network, LinearPath(), "plain"), codec, progress=False)
    made = pipe.steer(1, lambda x: 100 * x[:, 0].mean((1, 2)), MFMG(num_draws), ODE(steps=steps), seed=0)
    return made.cost["peak_memory_bytes"]


def pipeline() -> None:
    """benchmarks/results/memory-pipeline.json: bytes by draws, by steps, and without what keeps them flat."""
    # small blocks go back to the system when they are freed: what is read is what is used
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

    def median(draws: int, steps: int, micro_batch: int = 1, checkpointing: bool = True) -> float:
        cell = f"{draws}, {steps}, {micro_batch}, {checkpointing}"
        code = f"from benchmarks.memory import peak_of_pipeline; print(peak_of_pipeline({cell}))"
        command = [sys.executable, "-W", "ignore", "-c", code]
        runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(3)]
        return statistics.median(float(run.stdout) for run in runs)

    draws = {str(n): median(n, 3) for n in (1, 4, 16, 64)}
    steps = {str(k): median(4, k) for k in (3, 12, 48)}
    figures = {
        "by_draws": draws,
        "by_steps": steps,
        "ratio_draws_4_to_64": draws["64"] / draws["4"],
        "ratio_steps_3_to_48": steps["48"] / steps["3"],
        "not_checkpointed_16_draws": median(16, 3, 16, False),
    }
    keep("memory-pipeline", "python -m benchmarks memory-pipeline", figures)


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
