"""Error of each form of a loss's derivative against float64, by precision and step: where the default steps are from.

A small transformer is trained on the 8×8 digits first, since an untrained one has hardly a derivative in its times. On
a batch of training inputs each form's error is measured as the root mean square over rows and pixels, relative to that
of what the loss compares it with: for the Eulerian ``(b − a)(∂_a + c·∇)F`` against ``F``, for the Lagrangian ``∂_b Z``
against itself. bf16 is float32 weights under autocast, and ``bf16, times too`` what autocast makes of it by itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.common import keep, say, trained
from metaflowmaps._shapes import expand_time
from metaflowmaps.data import Digits
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.losses import _difference_along
from metaflowmaps.networks import DiTConfig, dit
from metaflowmaps.training.objective import Batch, _at
from metaflowmaps.training.train_config import LossConfig, ModelConfig, OptimizerConfig, TimesConfig, TrainConfig
from metaflowmaps.training.training_run import build_objective

STEPS = (1e-4, 1e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)


def config() -> TrainConfig:
    """MeanFlow on digits: both the Eulerian and the Lagrangian derivative of the result are of the usual sizes."""
    return TrainConfig(
        recipe="precision",
        data=Digits(),
        model=ModelConfig(data_std=0.75, network=DiTConfig(width=64, depth=4, heads=4, encoder_depth=3)),
        loss=LossConfig(diagonal="data", consistency="mean-flow", diagonal_share=0.5),
        times=TimesConfig(from_noise=0.3),
        teacher="none",
        optimizer=OptimizerConfig(name="adam", lr=1e-3, betas=(0.9, 0.99)),
        steps=800,
        threads=1,
        batch_size=64,
        log_every=100,
    )


def main() -> None:
    """Train, measure, print and keep the table."""
    run = trained(config(), "precision")
    model = MetaFlowMap.from_pretrained(run.checkpoint).requires_grad_(False)
    objective = build_objective(config(), None)
    batch = objective.batch(model, 10**6)
    batch = batch.rows(batch.diagonal_rows, len(batch))
    exact = {name: form(model.double(), double(batch), None) for name, form in FORMS.items()}
    model.float()
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for precision, context in PRECISIONS.items():
        for name, form in FORMS.items():
            say(f"precision: {precision}, {name}")
            part = figures.setdefault(precision, {})[name] = {}
            for h in (None, *STEPS):
                with context():
                    value, _ = form(model, batch, h)
                part["JVP" if h is None else f"{h:g}"] = relative(value, *exact[name])
    keep("precision", "python -m benchmarks precision", {"relative_errors": figures})


def relative(value: Tensor, exact: Tensor, scale: Tensor) -> float:
    """Root mean square of the error over that of the scale."""
    return float(((value.double() - exact).square().mean() / scale.square().mean()).sqrt())


def eulerian(model, batch: Batch, h: float | None) -> tuple[Tensor, Tensor]:  # noqa: ANN001
    """(b − a)(∂_a + c·∇)F with c = data, and F."""
    flow, z, c = _at(model, batch)
    a, b = batch.a, batch.b
    f = flow(a, b, z)
    if h is None:
        slope = torch.func.jvp(lambda a, z: flow(a, b, z), (a, z), (torch.ones_like(a), c))[1]
    else:
        slope = _difference_along(flow, a, b, z, c, f, h)
    return expand_time(b - a, z) * slope, f


def lagrangian(model, batch: Batch, h: float | None) -> tuple[Tensor, Tensor]:  # noqa: ANN001
    """∂_b Z = F + (b − a) ∂_b F, twice; where b ± h leaves [a, 1] the loss moves b, so those rows are left out."""
    flow, z, _ = _at(model, batch)
    a, b = batch.a, batch.b.clamp(max=1 - STEPS[-1])
    b = torch.maximum(b, a + STEPS[-1]).clamp(max=1 - STEPS[-1])
    a = torch.minimum(a, b - STEPS[-1])
    if h is None:
        f, slope = torch.func.jvp(lambda b: flow(a, b, z), (b,), (torch.ones_like(b),))
    else:
        ahead, behind = flow(torch.cat([a, a]), torch.cat([b + h, b - h]), torch.cat([z, z])).chunk(2)
        f, slope = (ahead + behind) / 2, (ahead - behind) / (2 * h)
    value = f + expand_time(b - a, z) * slope
    return value, value


def double(batch: Batch) -> Batch:
    """The batch in float64."""
    parts = {k: v.double() for k, v in vars(batch).items() if isinstance(v, Tensor) and v.is_floating_point()}
    return Batch(**{**vars(batch), **parts})


@contextmanager
def bf16() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def bf16_throughout() -> Iterator[None]:
    """Autocast as it comes, times and all."""

    @contextmanager
    def as_they_come(*inputs: Tensor) -> Iterator[tuple[Tensor, ...]]:
        yield inputs

    ours, dit.unrounded = dit.unrounded, as_they_come  # type: ignore[assignment]
    try:
        with bf16():
            yield
    finally:
        dit.unrounded = ours


@contextmanager
def float32() -> Iterator[None]:
    yield


FORMS: dict[str, Callable] = {"Eulerian": eulerian, "Lagrangian": lagrangian}
PRECISIONS = {"float32": float32, "bf16": bf16, "bf16, times too": bf16_throughout}
