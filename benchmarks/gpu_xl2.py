r"""Throughput and model-FLOP utilisation of the ImageNet family: ``python -m benchmarks.gpu_xl2 [--json FILE]``.

Made for one GPU with the XL/2 network on 32×32×4 latents (256 tokens) in bf16; ``--size nano --device cpu --quick``
runs all of it anywhere in seconds. Measured: the rate of a large matrix product, which no network exceeds; forward;
flow-matching step, without guidance: the step of a plain flow model; MFM step (guided teacher of the same size, three
quarters of the rows on the diagonal, central-difference Lagrangian or ``--loss``), each at the largest batch that fits,
by halves from ``--batch``; one-step draws; images steered by MFM-G with a reward of CLIP-L's size through a
decoder of the VAE's size; and the kernels that take the longest. Weights are random: time does not depend on them.

Model FLOPs are those of the matrix products and of attention alone, two a multiply-add. A call of a network without
gradient counts one forward a row and a call with gradient three, counted off hooks: one teacher call more is more model
FLOPs, a block computed again in the backward pass is not.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from metaflowmaps import MFMG, ODE, LinearPath, MetaFlowMap, steer
from metaflowmaps.lab.throughput import fits, peak_flops, timed, wait
from metaflowmaps.networks.compiling import use_compiled
from metaflowmaps.networks.dit import SIZES, DiTConfig
from metaflowmaps.networks.flops import forward_flops, on_meta
from metaflowmaps.training.derivative import prepare
from metaflowmaps.training.objective import Batch, Objective
from metaflowmaps.training.plan import Noise
from metaflowmaps.training.state import make_optimizer
from metaflowmaps.training.teachers import GlassTeacher
from metaflowmaps.training.train_config import ConditionConfig, LossConfig, OptimizerConfig, TimesConfig, TrainConfig

CLASSES = 1000
GUIDED, PLAIN = (1.0, 2.5), (1.0,)  # scales that rows are trained at
PARTS = ("ceiling", "forward", "flow-matching step", "MFM step", "one-step draws", "steered images")


class Decoder(nn.Module):
    """Convolutions in the sizes of the VAE's decoder (50 M parameters): (B, 4, h, h) -> (B, 3, 8h, 8h)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [4 * width, 4 * width, 2 * width, width]
        layers: list[nn.Module] = [nn.Conv2d(4, sizes[0], 3, padding=1), Residual(sizes[0], sizes[0])]
        for i, size in enumerate(sizes):
            before = sizes[max(i - 1, 0)]
            layers += [Residual(before, size), Residual(size, size), Residual(size, size)]
            if i < 3:
                layers += [nn.Upsample(scale_factor=2.0), nn.Conv2d(size, size, 3, padding=1)]
        self.layers = nn.Sequential(*layers, nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.layers(z)
        return out


class Residual(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(8, before), nn.GroupNorm(8, after)])
        self.shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(functional.silu(self.norms[0](x)))
        out: Tensor = self.shortcut(x) + self.second(functional.silu(self.norms[1](y)))
        return out


class Bench:
    """Everything that is measured, within a budget of seconds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.began, self.results, self.notes = time.perf_counter(), {}, []  # type: ignore[var-annotated]
        self.cuda, side = self.device.type == "cuda", 32 if not args.quick else 8
        if self.cuda:
            torch.set_float32_matmul_precision("high")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            student, frozen = (
                DiTConfig(patch=2, num_classes=CLASSES, guidance=True, **SIZES[args.size]).network((4, side, side))
                for _ in "ab"
            )
        self.model, self.teacher = (MetaFlowMap(n.to(self.device), LinearPath(), "plain") for n in (student, frozen))
        self.teacher.requires_grad_(False)
        self.network, self.frozen = student, frozen
        for network in (student, frozen):
            use_compiled(network, args.compile, self.device, "bf16")
        self.optimizer = make_optimizer(self.model, OptimizerConfig(name="adam", lr=1e-6))
        self.flops = forward_flops(on_meta(student.config, student.event_shape))
        name = torch.cuda.get_device_name(self.device) if self.cuda else "cpu"
        self.peak = peak_flops(self.device)
        self.figures: dict[str, Any] = {"device": name, "model_tflops": self.flops / 1e12, "torch": torch.__version__}

    # -- measuring ---------------------------------------------------------------------------------------------------

    @property
    def left(self) -> float:
        return float(self.args.budget - (time.perf_counter() - self.began))

    def timed(self, do: Callable[[], Any], seconds: float) -> float:
        """Median seconds of a call, for at most so long; of a rehearsal, of two calls."""
        quick = self.args.quick
        return timed(do, self.device, 0.0 if quick else min(seconds, max(self.left, 0.0)), 2 if quick else 3)

    def largest(self, make: Callable[[int], Callable[[], Any]]) -> tuple[int, Callable[[], Any]]:
        """The largest batch, from --batch down by halves, that runs twice within memory."""
        rows = self.args.batch
        while True:
            do = make(rows)
            if fits(do, self.device):
                return rows, do
            self.optimizer.zero_grad(set_to_none=True)
            if rows <= 4:
                raise SystemExit("not even 4 rows fit in memory: choose a smaller --size")
            rows //= 2

    def row(self, name: str, rows: int, seconds: float, forwards: float, unit: str = "rows/s") -> None:
        """One line of the table; ``forwards``: network forwards a row, in model FLOPs."""
        rate = rows / seconds
        achieved = rate * forwards * self.flops
        self.results[name] = {
            "batch": rows, "milliseconds": 1000 * seconds, unit: rate, "tflops": achieved / 1e12,
            **self.share(achieved),
        }  # fmt: skip
        say(f"{name}: {rate:,.1f} {unit}")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def share(self, achieved: float) -> dict[str, float | None]:
        """FLOP/s as shares of the data sheet's peak and of the matrix product's rate beside it."""
        ceiling = self.figures.get("ceiling_tflops")
        return {
            "mfu": achieved / self.peak if self.peak else None,
            "of_ceiling": achieved / 1e12 / ceiling if ceiling else None,
        }

    # -- what is measured --------------------------------------------------------------------------------------------

    def ceiling(self) -> None:
        """A square matrix product in bfloat16."""
        size = 64 if self.args.quick else 8192
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in "ab")
        a @ b
        rate = 2 * size**3 / self.timed(lambda: a @ b, 3)
        self.figures |= {"ceiling_tflops": rate / 1e12, "ceiling_size": size}
        say(f"matrix product of {size}: {rate / 1e12:,.3g} TFLOP/s")

    def forward(self) -> None:
        """The network without gradient: what sampling calls."""

        def make(rows: int) -> Callable[[], Any]:
            z, a = torch.randn(rows, *self.model.event_shape, device=self.device), torch.rand(rows, device=self.device)
            label = torch.zeros(rows, dtype=torch.int64, device=self.device)

            def do() -> None:
                with torch.no_grad(), self.autocast():
                    self.network(z, a, a, z, a, label)

            return do

        rows, do = self.largest(make)
        self.row("forward", rows, self.timed(do, 5), 1)

    def step(self, name: str, loss: dict[str, Any], scales: tuple[float, ...]) -> None:
        """A training step; ``forwards`` a row counted off hooks."""
        count = {"forwards": 0.0}

        def seen(module: nn.Module, _inputs: Any, out: Tensor) -> None:
            count["forwards"] += out.shape[0] * (3 if out.requires_grad else 1)

        def make(rows: int) -> Callable[[], Any]:
            objective, batch = self.objective(loss, rows, scales)

            def do() -> None:
                count["forwards"] = 0.0
                with self.autocast():
                    value = objective(self.model, batch).float().sum() / rows
                value.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.5)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)

            return do

        handles = [n.register_forward_hook(seen) for n in (self.network, self.frozen)]
        rows, do = self.largest(make)
        seconds = self.timed(do, 25)
        for handle in handles:
            handle.remove()
        self.row(name, rows, seconds, count["forwards"] / rows)
        if name == "MFM step":
            self.profile(do)

    def objective(self, loss: dict[str, Any], rows: int, scales: tuple[float, ...]) -> tuple[Objective, Batch]:
        """An objective and a batch of it on the device, the model prepared for it."""
        data, condition = Noise(self.model.event_shape, CLASSES), ConditionConfig(dropout=0.2, guidance=scales)
        glass = GlassTeacher(self.model.path, self.teacher.drift, CLASSES)
        made = Objective(data, LossConfig(**loss), TimesConfig(), glass, rows, 0, condition)  # type: ignore[arg-type]
        config = TrainConfig.model_construct(
            loss=made.loss, batch_size=rows, micro_batches=1, precision="bf16", compile=self.args.compile,
            checkpoint_activations=self.args.checkpoint,
        )  # fmt: skip
        told = prepare(self.model, config, self.device, made)
        self.notes = list(dict.fromkeys([str(made.differentiation), *told]))
        return made, made.batch(self.model, 0).to(self.device)

    def draws(self) -> None:
        """One-step posterior draws."""

        def make(rows: int) -> Callable[[], Any]:
            x = torch.randn(rows, *self.model.event_shape, device=self.device)
            cond = {"label": torch.zeros(rows, dtype=torch.int64, device=self.device)}
            generator = torch.Generator(self.device).manual_seed(0)

            def do() -> None:
                with torch.no_grad(), self.autocast():
                    self.model.draw(0.3, x, 1, generator=generator, cond=cond)

            return do

        rows, do = self.largest(make)
        self.row("one-step draws", rows, self.timed(do, 5), 1, "draws/s")

    def steering(self) -> None:
        """MFM-G, one draw a step, through the decoder and a reward of CLIP-L's size."""
        try:
            from transformers import CLIPVisionConfig, CLIPVisionModel
        except ImportError:
            say("steered images: left out, transformers is missing (pip install 'metaflowmaps[rewards]')")
            return
        quick = self.args.quick
        sizes = (
            {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
            if quick
            else {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tower = CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=14, **sizes))
            decoder = Decoder(8 if quick else 128)
        tower, decoder = (m.to(self.device).eval().requires_grad_(False) for m in (tower, decoder))

        def reward(z: Tensor) -> Tensor:
            picture = functional.interpolate(decoder(z / 0.18215).float(), size=224, mode="bilinear", antialias=True)
            return tower(pixel_values=picture).pooler_output.float().mean(1)

        rows, steps = (2, 2) if quick else (16, 10)
        cond = {"label": torch.zeros(rows, dtype=torch.int64, device=self.device)}

        def do() -> None:
            with self.autocast():
                process = ODE(steps=steps, renormalize="rescale")
                steer(self.model, reward, rows, MFMG(num_draws=1), process, cond=cond, seed=0)

        do()
        seconds = self.timed(do, 30)
        rate = rows / seconds * steps / 250
        self.results["steered images"] = {
            "batch": rows, "milliseconds": 1000 * seconds, "steps": steps, "images/s at 250 steps": rate,
        }  # fmt: skip
        say(f"steered images: {rate:.3f}/s at 250 steps")

    def profile(self, do: Callable[[], Any]) -> None:
        """The ten kernels (operators on a processor) that take the longest in a step."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities, acc_events=True) as made:
            do()
            wait(self.device)
        own = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        events = sorted(made.key_averages(), key=lambda e: -getattr(e, own))
        total = sum(getattr(e, own) for e in events) or 1
        self.figures["kernels"] = [
            {"name": e.key[:80], "share": getattr(e, own) / total, "calls": e.count} for e in events[:10]
        ]

    def run(self) -> dict[str, Any]:
        """All of it, in the order of what matters; what the budget does not reach is left out by name."""
        plain = {"diagonal": "data", "consistency": "none"}
        form = {} if self.args.derivative == "auto" else {"derivative": self.args.derivative}
        mfm = {"diagonal_share": 0.75, "consistency": {"name": self.args.loss, **form}}
        powers = {"adaptive_power_diagonal": 0.5, "adaptive_power_consistency": 1.0}
        parts: dict[str, Callable[[], None]] = {
            "ceiling": self.ceiling,
            "forward": self.forward,
            "flow-matching step": lambda: self.step("flow-matching step", plain, PLAIN),
            "MFM step": lambda: self.step("MFM step", mfm | powers, GUIDED),
            "one-step draws": self.draws,
            "steered images": self.steering,
        }
        left_out = []
        for name in self.args.parts or PARTS:
            if self.left > 0:
                parts[name]()
            else:
                left_out.append(name)
        if {"flow-matching step", "MFM step"} <= set(self.results):
            rates = [self.results[name]["rows/s"] for name in ("flow-matching step", "MFM step")]
            self.figures["MFM step over flow-matching step"] = rates[0] / rates[1]
        return {**self.figures, "notes": self.notes, "results": self.results, "left_out": left_out,
                "options": vars(self.args), "seconds": time.perf_counter() - self.began}  # fmt: skip


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def printed(figures: dict[str, Any]) -> str:
    """The one table, what it was made with, and the kernels."""
    lines = [
        *figures["notes"],
        "| | batch | ms | per second | TFLOP/s | MFU | of the matrix product |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, r in figures["results"].items():
        rate = next(v for k, v in r.items() if k.endswith("/s") or "images/s" in k)
        mfu, share = ("–" if r.get(k) is None else f"{100 * r[k]:.1f} %" for k in ("mfu", "of_ceiling"))
        speed = f"{r['tflops']:.2f}" if "tflops" in r else "–"
        lines.append(f"| {name} | {r['batch']} | {r['milliseconds']:.1f} | {rate:,.3f} | {speed} | {mfu} | {share} |")
    if "MFM step over flow-matching step" in figures:
        lines.append(f"a row of an MFM step: {figures['MFM step over flow-matching step']:.2f} × flow matching")
    lines += [f"{100 * k['share']:5.1f} %  {k['calls']:6d}  {k['name']}" for k in figures.get("kernels", [])]
    lines += [f"left out for time: {', '.join(figures['left_out'])}"] if figures["left_out"] else []
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="XL")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=512, help="the largest batch tried; halved until it fits")
    parser.add_argument("--loss", default="lagrangian-difference", help="loss.consistency of the MFM step")
    parser.add_argument("--derivative", choices=["auto", "forward", "fused", "difference"], default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--parts", nargs="*", choices=PARTS, help="these alone, in this order")
    parser.add_argument("--checkpoint", action="store_true", help="compute blocks again in the backward pass")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds; parts begun after it are left out")
    parser.add_argument(
        "--quick", action="store_true", help="8×8 latents, 8 rows, tiny decoder and reward: a rehearsal"
    )
    parser.add_argument("--json", default="benchmarks/results/gpu-xl2.json", help="where the figures go")
    args = parser.parse_args(argv)
    if args.quick:
        args.batch, args.budget = min(args.batch, 8), math.inf
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: --size nano --device cpu --quick rehearses without one")
    figures = Bench(args).run()
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")
    print(printed(figures))


if __name__ == "__main__":
    main()
