"""Your own sequences (``--data FILE``), and a process whose posteriors are known: maps of general contexts."""

from typing import Any

from metaflowmaps.data import MovingDigits, Process, Sequences, Simulator
from metaflowmaps.networks import MLPConfig, ObservedConfig, UNetConfig
from metaflowmaps.training.train_config import LossConfig, ModelConfig, OptimizerConfig, TimesConfig, TrainConfig

MODEL = ModelConfig(network=ObservedConfig(body=MLPConfig(width=128, depth=4)))
# half of the noisy states are none at all: those of forecasts; the others are for steering
TAUGHT: dict[str, Any] = {
    "teacher": "learned",
    "loss": LossConfig(diagonal_share=0.25),
    "times": TimesConfig(context_at_zero=0.5, from_noise=0.8),
    "optimizer": OptimizerConfig(lr=2e-3),
}


def sequences(fast: bool = False) -> TrainConfig:
    """The map of your own sequences, from what was seen to any other time."""
    drift_steps, steps = (1_000, 1_000) if fast else (4_000, 4_000)
    return TrainConfig(
        recipe="sequences",
        data=Sequences(),
        model=MODEL,
        **TAUGHT,
        drift_steps=drift_steps,
        drift_batch_size=512,
        steps=steps,
        batch_size=256,
    )


def process(fast: bool = False) -> TrainConfig:
    """The map of a mixture of two Ornstein–Uhlenbeck processes, taught by its own posteriors."""
    return TrainConfig(
        recipe="process",
        data=Process(process="ou-mixture"),
        model=MODEL,
        teacher="exact",
        loss=LossConfig(diagonal_share=0.25),
        times=TimesConfig(context_at_zero=0.5),
        steps=1_500 if fast else 6_000,
        batch_size=256,
    )


def simulator(fast: bool = False) -> TrainConfig:
    """The posterior of a simulator's parameters given its output, from pairs that it made."""
    drift_steps, steps = (1_000, 1_000) if fast else (3_000, 3_000)
    return TrainConfig(
        recipe="simulator",
        data=Simulator(),
        model=MODEL,
        **TAUGHT,
        drift_steps=drift_steps,
        drift_batch_size=512,
        steps=steps,
        batch_size=256,
    )


def moving_digits(fast: bool = False) -> TrainConfig:
    """The next frame of two bouncing digits, from one to four past ones (``--data-dir``: MNIST's IDX files)."""
    body = UNetConfig(width=32, multipliers=(1, 2, 2), blocks=1, attention=(), patch=2)
    return TrainConfig(
        recipe="moving-digits",
        data=MovingDigits(),
        model=ModelConfig(network=ObservedConfig(body=body)),
        teacher="learned",
        start_from_drift=True,
        loss=LossConfig(diagonal_share=0.25),
        times=TimesConfig(context_at_zero=0.8, from_noise=0.8),
        optimizer=OptimizerConfig(name="adam", lr=2e-3, betas=(0.9, 0.99), ema=0.995),
        drift_steps=200 if fast else 3_000,
        drift_batch_size=32,
        steps=100 if fast else 1_500,
        batch_size=32,
        log_every=50,
    )
