"""MNIST from its IDX files (``--data-dir``): the map, and its two classifiers."""

from typing import Any

from metaflowmaps.data import Mnist
from metaflowmaps.networks import UNetConfig
from metaflowmaps.recipes.guide_and_judge import guide, judge
from metaflowmaps.recipes.images import TAUGHT
from metaflowmaps.training.train_config import ClassifierConfig, ModelConfig, OptimizerConfig, TrainConfig

DATA = Mnist()
DATA_STD = 0.518  # of a pixel about the mean image
PATCHES = UNetConfig(patch=2, width=64, multipliers=(1, 2), blocks=1, attention=())
PIXELS = UNetConfig(width=64, multipliers=(1, 2, 4), attention=(7,))


def mnist(fast: bool = False) -> TrainConfig:
    """The map of 28×28 MNIST: a U-Net of pixels for a GPU; --fast: one of 2 × 2 patches for two cores."""
    if fast:
        # 28 minutes of one core, from 9,000 images: draws at t >= .2 are digits, of samples of noise most are
        return _map(
            PATCHES,
            drift_steps=3_200,
            drift_batch_size=64,
            steps=2_200,
            batch_size=64,
            optimizer=OptimizerConfig(name="adam", lr=2e-3, betas=(0.9, 0.99), warmup_steps=200, ema=0.999),
            sample_every=550,
            checkpoint_every=300,
        )
    return _map(
        PIXELS,
        drift_steps=30_000,
        drift_batch_size=512,
        steps=60_000,
        batch_size=512,
        optimizer=OptimizerConfig(name="adam", lr=5e-3, betas=(0.9, 0.99), warmup_steps=1_000, ema=0.9995),
        sample_every=5_000,
    )


def _map(network: UNetConfig, **settings: Any) -> TrainConfig:
    model = ModelConfig(data_mean="image", data_std=DATA_STD, network=network)
    return TrainConfig(recipe="mnist", data=DATA, model=model, **TAUGHT, precision="bf16", **settings)


def mnist_guide(fast: bool = False) -> ClassifierConfig:
    """The classifier of MNIST that rewards are made of."""
    # fast, from 9,000 images: 242 s on a shared core, 97.7 % of the held-out images
    return guide("mnist-guide", DATA, 300 if fast else 2_000)


def mnist_judge(fast: bool = False) -> ClassifierConfig:
    """The classifier of MNIST that samples are judged by: another architecture, another seed."""
    # fast, from 9,000 images: 134 s on a shared core, 96.8 % of the held-out images
    return judge("mnist-judge", DATA, 300 if fast else 2_000)
