"""Figures recorded with version 0.1, which a rebuild must not move: tests/golden/figures.json.

Every section is a function that returns ``{case: {quantity: numbers}}``. Networks, states and times are written out by
formulas, so no section depends on how the package is laid out or on how torch fills tensors at random. Where noise
comes in, it comes by seed. Beside each tolerance stands its reason.

Recorded by ``python -m tests.golden.test_golden``, run with version 0.1 (commit c7d4d1f) on x86-64 with torch 2.13.0.
Record again only what is meant to change: ``python -m tests.golden.test_golden values`` writes that section.
"""

import contextlib
import hashlib
import io
import json
import math
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import metaflowmaps as mfm
from metaflowmaps import cli, losses
from metaflowmaps.checkpoint.shipped import FOLDER
from metaflowmaps.random import RowNoise, copy_seeds, fresh_seeds, noise, stream
from metaflowmaps.value import Gradient, GradientFree

FIGURES = Path(__file__).with_name("figures.json")
F64 = torch.float64
PATHS = {"linear": mfm.LinearPath(), "trigonometric": mfm.TrigonometricPath()}
PARAMETERIZATIONS = ("plain", "gaussian", "residual")
Figures = dict[str, dict[str, object]]


# -- what the figures are of -------------------------------------------------------------------------------------------


def waves(*shape: int, phase: float = 0.0) -> Tensor:
    """Numbers between −1 and 1 without pattern, the same on every machine: (*shape,) float64."""
    count = torch.arange(1, math.prod(shape) + 1, dtype=F64)
    return torch.sin(count * 12.9898 + 78.233 * phase).reshape(shape)


class Waves(nn.Module):
    """Two layers whose weights are written out: a smooth function of everything a network is given."""

    event_shape = (2,)
    num_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(waves(16, 7, phase=1.0))
        self.second = nn.Parameter(waves(2, 16, phase=2.0) / 4)

    def forward(
        self, z: Tensor, a: Tensor, b: Tensor, context: Tensor, context_time: Tensor, label: Tensor | None = None
    ) -> Tensor:
        inputs = torch.cat([z, context, torch.stack([a, b, context_time], 1)], 1)
        out = torch.tanh(inputs @ self.first.T) @ self.second.T
        return out if label is None else out + torch.sin(label)[:, None] / 4


def tiny_map(path: mfm.Path = PATHS["linear"], parameterization: str = "gaussian") -> mfm.MetaFlowMap:
    return mfm.MetaFlowMap(Waves(), path, parameterization, torch.tensor([0.3, -0.2], dtype=F64), 1.5)


def paper_law() -> mfm.GaussianMixture:
    return mfm.GaussianMixture(torch.tensor([[-3.0, -3], [0, 0], [3, 3]], dtype=F64), 0.5)


def digits() -> mfm.MetaFlowMap:
    """The shipped map, its weights widened to float64."""
    return mfm.MetaFlowMap.from_pretrained("digits").double()


def observed(strength: float = 1.0) -> Callable[..., Tensor]:
    """The paper's inverse problem."""
    return mfm.rewards.LinearGaussian(
        torch.tensor([[1.2, -0.8]], dtype=F64), torch.tensor([-1.0], dtype=F64), 0.2, strength
    )


def bright_top(x: Tensor) -> Tensor:
    """Of images: the upper half near .5."""
    return -0.5 * (x[:, :, :4].flatten(1) - 0.5).square().sum(1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(x: Tensor) -> list:
    return x.detach().tolist()


# -- sections ----------------------------------------------------------------------------------------------------------


def randomness() -> Figures:
    rows = RowNoise(torch.tensor([0, 1, 2**62 + 5]), "golden", 0.25)
    return {
        "stream": {"seed": stream(3, "train", 7).initial_seed()},
        "words": {"first": numbers(rows.words(3, draws=2)), "asked again": numbers(rows.words(2))},
        "seeds": {
            "fresh": numbers(fresh_seeds(4, seeded(5))),
            "copies": numbers(copy_seeds(torch.tensor([7, 8]), 3)),
        },
    }


def noises() -> Figures:
    rows, like = torch.tensor([3, 4]), torch.zeros(2, 3, dtype=F64)
    return {
        kind: {"draws": numbers(noise(kind, 3, like, RowNoise(rows, kind)))}
        for kind in ("independent", "antithetic", "quasi")
    } | {
        "uniform": {"rows": numbers(RowNoise(rows, "uniform").uniform((3,), dtype=F64))},
        "generator": {"normal": numbers(torch.randn(3, generator=stream(1, "golden"), dtype=F64))},
    }


def checkpoints() -> Figures:
    names = ("digits", "digits-drift", "digits-guide", "digits-judge")
    return {
        name: {"sha256": hashlib.sha256((FOLDER / name / "model.safetensors").read_bytes()).hexdigest()}
        for name in names
    }


def maps() -> Figures:
    figures: Figures = {}
    x, x_s = 2 * waves(5, 2), waves(5, 2, phase=3.0)
    s, u, t = (
        torch.tensor(v, dtype=F64) for v in ([0, 0.2, 0.3, 0, 0.7], [1, 0.5, 0.3, 0.4, 1], [0, 0.1, 0.6, 1, 0.9])
    )
    for name, path in PATHS.items():
        for parameterization in PARAMETERIZATIONS:
            model = tiny_map(path, parameterization)
            seeds = torch.tensor([11, 12, 13])
            figures[f"{name} {parameterization}"] = {
                "velocity": numbers(model.velocity(s, u, x_s, t, x)),
                "map": numbers(model(s, u, x_s, t, x)),
                "drift": numbers(model.drift(t.clamp_max(0.95), x)),
                "draw": numbers(model.draw(0.4, x, 2, steps=2, generator=seeded(1))),
                "generate": numbers(model.generate(3, steps=2, generator=seeded(2))),
                "generate by seeds": numbers(model.generate(3, steps=2, seeds=seeds)),
            }
    return figures


def shipped_map() -> Figures:
    model = digits()
    x, times = waves(2, 1, 8, 8), torch.tensor([0.0, 0.6], dtype=F64)
    return {
        "double": {
            "velocity": numbers(model.velocity(0.0, 1.0, waves(2, 1, 8, 8, phase=1.0), times, x)[:, 0, 3]),
            "drift": numbers(model.drift(times, x)[:, 0, 3]),
            "draw": numbers(model.draw(times, x, 2, generator=seeded(3))[:, :, 0, 3]),
            "generate": numbers(model.generate(2, steps=4, seeds=torch.tensor([1, 2]))[:, 0, 3]),
        }
    }


def shipped_map_float32() -> Figures:
    model = mfm.MetaFlowMap.from_pretrained("digits")
    x, times = waves(2, 1, 8, 8).float(), torch.tensor([0.0, 0.6])
    return {
        "float32": {
            "velocity": numbers(model.velocity(0.0, 1.0, 0.5 * x, times, x)[:, 0, 3]),
            "generate": numbers(model.generate(2, steps=4, seeds=torch.tensor([1, 2]))[:, 0, 3]),
        }
    }


def regressions() -> Figures:
    """Every loss and its gradient in the weights, in the chart of each parameterisation."""
    figures: Figures = {}
    x, z, c = 2 * waves(6, 2), waves(6, 2, phase=4.0), waves(6, 2, phase=5.0)
    t = torch.tensor([0, 0.1, 0.4, 0.6, 0.8, 0.9], dtype=F64)
    a = torch.tensor([0, 0.1, 0.2, 0.5, 0, 0.99], dtype=F64)
    b = torch.tensor([1, 0.1, 0.6, 0.9, 0.3, 1], dtype=F64)
    gamma = torch.tensor([0, 0.5, 0.3, 1, 0.7, 0.2], dtype=F64)

    def velocity(a: Tensor, z: Tensor) -> Tensor:
        return torch.cos(z + a[:, None])

    forms: dict[str, Callable[..., Tensor]] = {
        "diagonal": lambda flow: losses.diagonal(flow, a, z, c),
        "eulerian": lambda flow: losses.eulerian(flow, a, b, z, velocity(a, z)),
        "eulerian, self": lambda flow: losses.eulerian(flow, a, b, z, flow(a, a, z)),
        "eulerian, differences": lambda flow: losses.eulerian(flow, a, b, z, velocity(a, z), 5e-3),
        "mean-flow": lambda flow: losses.eulerian(flow, a, b, z, c),
        "lagrangian": lambda flow: losses.lagrangian(flow, a, b, z, velocity),
        "lagrangian, self": lambda flow: losses.lagrangian(flow, a, b, z, lambda a, z: flow(a, a, z)),
        "lagrangian-difference": lambda flow: losses.lagrangian_difference(flow, a, b, z, velocity),
        "semigroup": lambda flow: losses.semigroup(flow, a, b, z, gamma),
    }
    for parameterization in PARAMETERIZATIONS:
        for form, loss in forms.items():
            model = tiny_map(parameterization=parameterization)
            rows = loss(model.anchor(t, x))
            first, second = torch.autograd.grad(rows.sum(), [model.network.first, model.network.second])
            figures[f"{form} {parameterization}"] = {
                "losses": numbers(rows),
                "gradient norms": [float(first.norm()), float(second.norm())],
                "gradient": [*numbers(first[0, :4]), *numbers(second[1, :4])],
            }
    weight = losses.adaptive_weight(torch.tensor([0.0, 0.5, 40.0], dtype=F64), 0.01, 1.0)
    figures["adaptive weight"] = {"weight": numbers(weight)}
    return figures


def values() -> Figures:
    figures: Figures = {}
    x, t = 2 * waves(3, 2), torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    model, law, path = tiny_map(), paper_law(), PATHS["linear"]
    glass = mfm.GlassPosterior(path, lambda t, x, cond=None: law.drift(path, t, x), steps=4, data_std=None)
    cases = {
        "gradient": (model, Gradient()),
        "gradient, two passes": (model, Gradient(passes=2)),
        "gradient, jackknife": (model, Gradient(correction="jackknife")),
        "gradient, glass": (glass, Gradient()),
        "gradient-free": (model, GradientFree()),
        "gradient-free, centred": (model, GradientFree(centre="denoise")),
        "gradient-free, antithetic": (model, GradientFree(noise="antithetic")),
        "gradient-free, exact draws": (mfm.ExactPosterior(path, law), GradientFree()),
    }
    for name, (posterior, estimator) in cases.items():
        estimate = mfm.value_gradient(posterior, observed(0.2), t, x, 5, estimator, seeded(7))
        figures[name] = {
            field: numbers(getattr(estimate, field))
            for field in ("value", "gradient", "ess", "std_err", "gradient_std_err", "rewards")
        }
    return figures


SIX = torch.arange(100, 106)  # seeds


def _steered(model: object, reward: Callable[..., Tensor], method: object, process: object, **options: object) -> dict:
    """Samples, rewards, seeds and cost of six samples, and what was seen on the way, averaged over steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few draws of a sharp reward: said, and meant
        seed = options.pop("seed", SIX)
        result = mfm.steer(model, reward, len(SIX), method, process, seed=seed, **options)
    samples = result.samples.flatten(1)
    seen = {name: float(result.info[name].mean()) for name in ("ess", "value", "drift_norm") if name in result.info}
    return {
        "mean": numbers(samples.mean(0)[:8]),
        "rows": numbers(samples[:2, :8]),
        "rewards": numbers(result.rewards),
        "seeds": [str(seed) for seed in result.seeds.tolist()],
        "cost": {name: count for name, count in result.cost.items() if name not in ("seconds", "peak_memory_bytes")},
        "info": seen,
    }


def steering() -> Figures:
    """Every method, on the paper's mixture where exact draws will do and on a small map where gradients are needed."""
    law, small, ode = mfm.ExactModel(PATHS["linear"], paper_law()), tiny_map(), mfm.ODE(steps=8)
    curved = mfm.ExactModel(PATHS["trigonometric"], paper_law())
    glass = mfm.Glass(num_draws=2, glass_steps=3, data_std=None)
    cases = {
        "none": (law, mfm.Unsteered(), ode),
        "none, sde": (law, mfm.Unsteered(), mfm.SDE(steps=8, integrator="heun")),
        "mfm-gf": (law, mfm.MFMGF(num_draws=4), ode),
        "mfm-gf, sde": (law, mfm.MFMGF(num_draws=2), mfm.SDE(steps=8)),
        "mfm-gf, trigonometric": (curved, mfm.MFMGF(num_draws=4), mfm.SDE(steps=8)),
        "mfm-gf, as published": (law, mfm.MFMGF(num_draws=3, recycle=1, centre="denoise"), ode),
        "mfm-gf, jackknife": (law, mfm.MFMGF(num_draws=3, recycle=2, correction="jackknife"), ode),
        "mfm-gf, filled": (law, mfm.MFMGF(num_draws=1, recycle=4, fill=True), mfm.ODE(steps=8, grid="power")),
        "mfm-gf, clipped": (law, mfm.MFMGF(num_draws=4), mfm.ODE(steps=8, renormalize="clip")),
        "mfm-gf, map": (small, mfm.MFMGF(num_draws=4, noise="antithetic", map_steps=2), ode),
        "mfm-g": (small, mfm.MFMG(num_draws=2), ode),
        "mfm-g, sde": (small, mfm.MFMG(num_draws=2, noise="quasi"), mfm.SDE(steps=8, integrator="heun")),
        "mfm-g, as published": (small, mfm.MFMG(num_draws=2, blend=False), mfm.ODE(steps=8, renormalize="rescale")),
        "mfm-g, two passes": (small, mfm.MFMG(num_draws=4, passes=2), mfm.ODE(steps=8, integrator="midpoint")),
        "mfm-search": (law, mfm.Search(num_draws=2), ode),
        "mfm-search, particle": (
            small, mfm.Search(num_draws=2, particles=3, selection="particle", transition="deterministic"),
            mfm.ODE(steps=8, grid=[0.01, 0.1, 0.3, 0.6, 0.8, 1.0]),
        ),
        "mfm-smc": (law, mfm.SMC(num_draws=2), mfm.SDE(steps=8)),
        "mfm-smc, one of each": (law, mfm.SMC(num_draws=2, particles=3, returns="one", guide="none"), mfm.SDE(steps=8)),
        "mfm-smc, gradients": (small, mfm.SMC(num_draws=2, guide="mfm-g", resampler="residual"), mfm.SDE(steps=8)),
        "dps": (law, mfm.DPS(), ode),
        "tds": (law, mfm.TDS(particles=3), mfm.SDE(steps=8)),
        "best-of-n": (law, mfm.BestOfN(n=3), ode),
        "glass": (law, glass, ode),
        "glass, gradients": (law, replace(glass, estimator=mfm.MFMG(recycle=2)), ode),
        "exact": (law, mfm.Exact(), mfm.ODE(steps=8, integrator="rk4")),
        "exact, sde": (law, mfm.Exact(), mfm.SDE(steps=8)),
    }  # fmt: skip
    reward = observed(0.2)
    seeds = {"mfm-smc": SIX[:1], "mfm-smc, gradients": SIX[:1], "tds": SIX[:2]}  # one a system of particles
    figures = {name: _steered(model, reward, *how, seed=seeds.get(name, SIX)) for name, (model, *how) in cases.items()}
    labels = {"label": torch.tensor([0, 1, 2, 3, 1, 2])}
    figures["labels"] = _steered(small, reward, mfm.MFMG(num_draws=2), mfm.SDE(steps=8), cond=labels)
    figures["a generator"] = _steered(law, reward, mfm.MFMGF(num_draws=2), ode, seed=seeded(3))
    figures["batches"] = _steered(small, reward, mfm.MFMGF(num_draws=2), ode, batch_size=4)
    return figures


def steering_digits() -> Figures:
    """The shipped map."""
    model, ode = digits(), mfm.ODE(steps=4)
    cases = {
        "mfm-g": (mfm.MFMG(num_draws=2), ode),
        "mfm-gf": (mfm.MFMGF(num_draws=4), mfm.SDE(steps=4)),
        "mfm-search": (mfm.Search(num_draws=2, particles=2), ode),
        "mfm-smc": (mfm.SMC(num_draws=2, particles=2, returns="one"), mfm.SDE(steps=4)),
        "dps": (mfm.DPS(), ode),
        "best-of-n": (mfm.BestOfN(n=3), ode),
        "none": (mfm.Unsteered(), mfm.SDE(steps=4)),
    }
    return {name: _steered(model, bright_top, *how) for name, how in cases.items()}


def _train(out: Path, *options: str) -> list[dict[str, float]]:
    """``mfm train gmm``, 8 steps, a checkpoint at the fourth: the records of its steps."""
    settings = (
        "batch_size=64",
        "threads=1",
        "log_every=1",
        "checkpoint_every=4",
        "keep_best=false",
        "sample_every=0",
        *options,
    )
    arguments = ["train", "gmm", "--max-steps", "8", "--seed", "0", "--device", "cpu", "--out", str(out), "--json"]
    for setting in settings:
        arguments += ["--set", setting]
    _command(arguments)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def _command(arguments: list[str]) -> None:
    given, sys.argv = sys.argv, ["mfm", *arguments]
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()) as said,
            pytest.raises(SystemExit) as ended,
        ):
            cli.main()
    finally:
        sys.argv = given
    assert not ended.value.code, said.getvalue()


def commands() -> Figures:
    """What commands leave in their folders, and what they count: on the shipped digits."""
    usual = ("--seed", "5", "--device", "cpu", "--json")
    cases = {
        "sample": "sample digits --num 2 --steps 2",
        "posterior": "posterior digits --t 0.4 --num-draws 3",
        "steer, mfm-gf": "steer digits --reward ink --method mfm-gf --num-draws 2 --steps 4 --num 3",
        "steer, mfm-g": "steer digits --reward margin:7 --strength 2 --method mfm-g --num-draws 2 --steps 4 --num 2",
        "steer, sde": "steer digits --reward ink --method dps --steps 4 --process sde --num 2",
    }
    figures: Figures = {}
    for name, line in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            _command([*line.split(), *usual, "--out", f"{folder}/run"])
            (file,) = Path(folder, "run").glob("*.safetensors")
            tensors = load_file(file)
            cost = json.loads(Path(folder, "run", "results.json").read_text())["cost"]
        seeds = tensors.pop("seeds")
        figures[name] = {
            **{key: numbers(tensor.flatten()[:: max(1, tensor.numel() // 24)]) for key, tensor in tensors.items()},
            "seeds": [str(seed) for seed in seeds.tolist()],
            "cost": {key: int(cost[key]) for key in ("forwards", "backwards", "reward_calls", "reward_backwards")},
        }
    return figures


def training() -> Figures:
    """Adam, for whose first steps rounding is harmless: SOAP turns by eigenvectors, which machines disagree about."""
    figures: Figures = {}
    cases = {
        "semigroup": ["loss.consistency=semigroup"],
        "mean-flow": ["loss.consistency=mean-flow", "loss.diagonal=data"],
        "lagrangian": ["loss.consistency.name=lagrangian", "loss.consistency.velocity=self"],
        "lagrangian-difference": ["loss.consistency=lagrangian-difference"],
        "eulerian": [
            "loss.consistency=eulerian", "loss.warmup_steps=2", "loss.anneal_steps=4", "model.path=trigonometric",
            "loss.adaptive_power_consistency=1", "model.parameterization=plain",
        ],
    }  # fmt: skip
    for name, options in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            records = _train(Path(folder) / "run", "optimizer.name=adam", "optimizer.lr=1e-3", *options)
        figures[name] = {key: [record[key] for record in records] for key in ("loss", "grad_norm")}
    return figures


def finetuning() -> Figures:
    """The losses of the first steps are those of the targets of tiny batches; each form of the paper's objective."""
    figures: Figures = {}
    small = {
        "steps": 3, "batch_size": 16, "threads": 1, "log_every": 1, "map": "none", "chunk": 8,
        "states": {"pool": 64, "pool_steps": 2, "replay_pool": 64, "replay_steps": 2}, "meters": {"every": 0},
        "optimizer": {"name": "adam", "lr": 1e-3},
    }  # fmt: skip
    cases = {
        "blend": {"form": "blend"},
        "gradient": {"form": "gradient"},
        "gradient-free": {"form": "gradient-free", "num_draws": 2},
        "self-normalised": {"method": "self-normalised", "form": "gradient"},
        "adjoint-matching": {"method": "adjoint-matching", "adjoint_steps": 4},
        "draft": {"method": "draft"},
        "baseline of draws": {"form": "gradient-free", "baseline": {"kind": "draws"}},
        "learned baseline": {"form": "gradient-free", "baseline": {"kind": "learned"}},
    }
    base = mfm.MetaFlowMap.from_pretrained("digits")
    for name, options in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            tuned = mfm.finetune(base, bright_top, f"{folder}/run", **{**small, **options})
            records = [json.loads(line) for line in next(Path(folder).rglob("metrics.jsonl")).read_text().splitlines()]
        figures[name] = {
            "loss": [record["loss"] for record in records],
            "grad_norm": [record["grad_norm"] for record in records],
            "drift": numbers(tuned.drift(0.5, waves(2, 1, 8, 8).float())[:, 0, 3]),
        }
    return figures


# -- the comparison ----------------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """How a section is computed and how near it must come, relative to the largest number of a quantity."""

    figures: Callable[[], Figures]
    tolerance: float
    reason: str


SECTIONS = {
    "randomness": Section(randomness, 0.0, "integers"),
    "checkpoints": Section(checkpoints, 0.0, "the bytes that are shipped"),
    "noises": Section(noises, 1e-12, "float64 logarithms, cosines and inverse normals of libraries that may differ"),
    "maps": Section(maps, 1e-9, "float64; a few hundred roundings, and sums in another order on other processors"),
    "shipped_map": Section(shipped_map, 1e-9, "the same, with weights that are exact in float16"),
    "shipped_map_float32": Section(shipped_map_float32, 1e-5, "float32; sums of 256 in another order, 4 calls deep"),
    "regressions": Section(regressions, 1e-9, "float64; differences of step 5e-3 lose three digits of fifteen"),
    "values": Section(values, 1e-9, "float64; the sharp reward multiplies the roundings of a draw by 1e2"),
    "steering": Section(
        steering, 1e-8, "float64; eight steps under a reward whose gradient grows errors tenfold a step"
    ),
    "steering_digits": Section(steering_digits, 1e-8, "the same"),
    "commands": Section(commands, 1e-4, "float32; four steps, each of which multiplies a rounding by a few"),
    "training": Section(training, 1e-4, "float32; eight steps of Adam, whose first divides a gradient by its size"),
    "finetuning": Section(finetuning, 1e-4, "float32; three steps of Adam on weighted targets"),
}


def differences(new: object, old: object, tolerance: float, where: str = "") -> list[str]:
    """What differs, in lines: names and lengths exactly, numbers to ``tolerance`` of their list's largest."""
    if isinstance(old, dict):
        if not isinstance(new, dict) or sorted(new) != sorted(old):
            return [f"{where}: {sorted(new) if isinstance(new, dict) else new} for {sorted(old)}"]
        return [line for key in old for line in differences(new[key], old[key], tolerance, f"{where}/{key}")]
    if isinstance(old, list) and tolerance and not isinstance(old[0], str):
        mine, theirs = (torch.as_tensor(v, dtype=F64) for v in (new, old))
        if mine.shape != theirs.shape:
            return [f"{where}: shape {tuple(mine.shape)} for {tuple(theirs.shape)}"]
        size = float(theirs[theirs.isfinite()].abs().max()) if bool(theirs.isfinite().any()) else 0.0
        near = torch.isclose(mine, theirs, rtol=0.0, atol=tolerance * size, equal_nan=True)
        return (
            []
            if bool(near.all())
            else [f"{where}: off by {float((mine - theirs).abs().max() / size):.2g} of {size:.4g}"]
        )
    if isinstance(old, float) and tolerance:
        return differences([new], [old], tolerance, where)
    return [] if new == old else [f"{where}: {new} for {old}"]


@pytest.mark.parametrize("name", SECTIONS)
def test_the_figures_of_version_01_stand(name):
    section = SECTIONS[name]
    recorded = json.loads(FIGURES.read_text())[name]
    computed = json.loads(json.dumps(section.figures()))
    assert not differences(computed, recorded, section.tolerance, name)


def test_a_resumed_run_ends_with_the_bytes_of_one_never_stopped(tmp_path):
    """To the bit, on one machine with one thread; by SOAP, which keeps the most state."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    _train(whole)
    (first, last) = sorted((whole / "checkpoints").iterdir())
    shutil.copytree(first, resumed / "checkpoints" / first.name)
    for file in ("run.json", "metrics.jsonl"):
        shutil.copy(whole / file, resumed / file)
    _train(resumed)
    ends = [folder / "checkpoints" / last.name / "model.safetensors" for folder in (whole, resumed)]
    assert hashlib.sha256(ends[0].read_bytes()).digest() == hashlib.sha256(ends[1].read_bytes()).digest()
    assert ends[0].read_bytes() != (first / "model.safetensors").read_bytes()  # the second half did train


def record(names: list[str]) -> None:
    """Write these sections, or all, with the figures of the code that is imported."""
    torch.set_num_threads(1)
    held = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name in names or SECTIONS:
        held[name] = SECTIONS[name].figures()
    FIGURES.write_text("{\n" + ",\n".join(f" {json.dumps(k)}: " + _cases(v) for k, v in held.items()) + "\n}\n")


def _cases(figures: Figures) -> str:
    """A line a case."""
    lines = (f"  {json.dumps(name)}: {json.dumps(case)}" for name, case in figures.items())
    return "{\n" + ",\n".join(lines) + "\n }"


if __name__ == "__main__":
    record(sys.argv[1:])
