r"""How much a map makes a second on this machine: samples, posterior draws, steered samples.

The batch is chosen by measuring: four times as many rows while that fits in memory and brings a twentieth more.
Model FLOPs are those of the network's matrix products and convolutions, two a multiply-add, a backward pass counting
two calls; what an autoencoder or a reward computes is in the time and not in the FLOPs, so it lowers the utilisation.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaflowmaps.cost import Meter
from metaflowmaps.lab.sample_pictures import SamplePictures
from metaflowmaps.networks.flops import forward_flops
from metaflowmaps.steering import MFMG, ODE, steer
from metaflowmaps.work.memory import is_out_of_memory

# dense bfloat16 TFLOP/s by the makers' data sheets, of what a device calls itself
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}
GROWTH, GAIN = 4, 1.05  # rows from one trial to the next, and what they must bring
TRIALS = 50  # of a batch at most

Work = Callable[[], Any]


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of a device by its maker's data sheet, in bfloat16; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)


def wait(device: torch.device) -> None:
    """Until a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(do: Work, device: torch.device, seconds: float, least: int = 3) -> float:
    """Median seconds of a call, from calls for so many seconds, ``least`` of them in any case."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < until and len(times) < TRIALS):
        wait(device)
        began = time.perf_counter()
        do()
        wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def fits(do: Work, device: torch.device) -> bool:
    """Whether a call runs twice within memory: the first compiles and allocates."""
    try:
        do()
        do()
        wait(device)
    except (RuntimeError, ValueError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    if device.type == "cuda":  # outside of the handler, which holds on to the tensors of the attempt
        torch.cuda.empty_cache()
    return False


@dataclass(frozen=True)
class Rate:
    """What a batch of rows takes."""

    rows: int
    seconds: float

    @property
    def per_second(self) -> float:
        """Rows a second."""
        return self.rows / self.seconds


def rates(make: Callable[[int], Work], device: torch.device, most: int, seconds: float) -> Iterator[Rate]:
    """Of ever larger batches, while that pays and fits.

    Args:
        make: the work of so many rows.
        device: where it is done.
        most: rows of the largest batch that is tried.
        seconds: for each batch.
    """
    rows, best = 1, 0.0
    while True:
        do = make(rows)
        if not fits(do, device):
            return
        rate = Rate(rows, timed(do, device, seconds))
        yield rate
        if rate.per_second < GAIN * best or rows == most:
            return
        rows, best = min(GROWTH * rows, most), rate.per_second


class Throughput:
    """The figures of one map.

    Args:
        pictures: the map, what its samples are told, and their pictures.
        most: rows of the largest batch that is tried.
        seconds: for each batch that is tried.
    """

    def __init__(self, pictures: SamplePictures, most: int, seconds: float) -> None:
        self.pictures, self.most, self.seconds = pictures, most, seconds
        self.model, self.device = pictures.opened.model, pictures.opened.device
        self.flops, self.peak = forward_flops(self.model.network), peak_flops(self.device)

    def samples(self, calls: int) -> dict[str, Any]:
        """Samples by refinement of ``calls`` steps, and their pictures."""

        @torch.no_grad()
        def make(seeds: Tensor) -> Tensor:
            x = self.model.generate(len(seeds), calls, cond=self.pictures.rows(slice(len(seeds))), seeds=seeds)
            return self.pictures.decode(x) if self.pictures.latent and self.pictures.decodes else x

        return self.measured(lambda rows: lambda: make(torch.arange(rows)))

    def draws(self, t: float) -> dict[str, Any]:
        """One-step draws of the posterior at states of noise."""

        def make(rows: int) -> Work:
            x = torch.randn(rows, *self.model.event_shape, generator=torch.Generator().manual_seed(0)).to(self.device)
            source, cond = torch.Generator().manual_seed(0), self.pictures.rows(slice(rows))

            @torch.no_grad()
            def do() -> Tensor:
                return self.model.draw(t, x, 1, generator=source, cond=cond)

            return do

        return self.measured(make)

    def steered(self, steps: int) -> dict[str, Any]:
        """Samples by MFM-G with one draw a step, towards bright pictures."""
        reward = self.pictures.on_samples(lambda x: x.flatten(1).mean(1))

        def make(rows: int) -> Work:
            def do() -> None:
                with warnings.catch_warnings():  # of its cost alone is looked at
                    warnings.simplefilter("ignore", UserWarning)
                    method, process, cond = MFMG(num_draws=1), ODE(steps=steps), self.pictures.rows(slice(rows))
                    steer(self.model, reward, rows, method, process, cond=cond, seed=0, batch_size=rows)

            return do

        return self.measured(make)

    def measured(self, make: Callable[[int], Work]) -> dict[str, Any]:
        """The fastest batch, what it takes, and how long a single row waits."""

        def cast(rows: int) -> Work:
            do = make(rows)

            def done() -> None:
                with self.pictures.autocast():
                    do()

            return done

        tried = list(rates(cast, self.device, self.most, self.seconds))
        if not tried:
            raise torch.OutOfMemoryError("not even one row fits in memory")
        best = max(tried, key=lambda rate: rate.per_second)
        with Meter(self.model.network) as meter:
            cast(best.rows)()
        per_second = (meter.forwards + 2 * meter.backwards) * self.flops / best.seconds
        return {
            "per_second": best.per_second,
            "batch": best.rows,
            "latency_seconds": tried[0].seconds,
            "calls_per_row": (meter.forwards + 2 * meter.backwards) / best.rows,
            "tflops": per_second / 1e12,
            "mfu": None if self.peak is None else per_second / self.peak,
            "peak_memory_bytes": meter.peak_memory_bytes,
        }
