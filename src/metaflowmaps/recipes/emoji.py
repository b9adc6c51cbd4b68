"""The 32×32 emoji in colour that come with the package: a class-conditional map, and its two classifiers."""

from typing import Any

from metaflowmaps.data import Emoji
from metaflowmaps.networks import ConvClassifierConfig, PatchClassifierConfig, UNetConfig
from metaflowmaps.recipes.guide_and_judge import guide, judge
from metaflowmaps.recipes.images import TAUGHT
from metaflowmaps.training.train_config import (
    ClassifierConfig,
    ConditionConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)

DATA = Emoji(labels=True)
DATA_STD = 0.488  # of a pixel about the mean image
PATCHES = UNetConfig(patch=2, width=64, multipliers=(1, 2, 3), blocks=1, attention=(), num_classes=9)
PIXELS = UNetConfig(width=128, multipliers=(1, 2, 2), blocks=2, attention=(16, 8), num_classes=9, guidance=True)


def emoji(fast: bool = False) -> TrainConfig:
    """The map of 32×32 emoji: a U-Net of pixels for a GPU; --fast: one of 2 × 2 patches for two cores."""
    if fast:
        # 3,999 s on one core, 39 minutes of it the map: draws at t >= .4 are the emoji, samples of noise are sketches
        return _map(
            PATCHES,
            condition=ConditionConfig(dropout=0.3),
            drift_steps=4_000,
            drift_batch_size=64,
            steps=3_000,
            batch_size=64,
            optimizer=OptimizerConfig(name="adam", lr=2e-3, betas=(0.9, 0.99), warmup_steps=200, ema=0.999),
            sample_every=500,
            checkpoint_every=300,
        )
    # not yet run: it wants a GPU
    return _map(
        PIXELS,
        condition=ConditionConfig(guidance=(1.0, 2.0, 3.0)),
        drift_steps=40_000,
        drift_batch_size=256,
        steps=40_000,
        batch_size=256,
        optimizer=OptimizerConfig(name="adam", lr=2e-3, betas=(0.9, 0.99), warmup_steps=1_000, ema=0.9995),
        sample_every=5_000,
    )


def _map(network: UNetConfig, **settings: Any) -> TrainConfig:
    model = ModelConfig(data_mean="image", data_std=DATA_STD, network=network)
    return TrainConfig(recipe="emoji", data=DATA, model=model, **TAUGHT, precision="bf16", **settings)


def emoji_guide(fast: bool = False) -> ClassifierConfig:
    """The classifier of emoji that rewards are made of."""
    # fast: 601 s on a shared core, 76.9 % of the held-out emoji; 55 % are people
    return guide("emoji-guide", DATA, 300 if fast else 3_000).model_copy(
        update={"network": ConvClassifierConfig(width=16)}
    )


def emoji_judge(fast: bool = False) -> ClassifierConfig:
    """The classifier of emoji that samples are judged by: another architecture, another seed."""
    # fast: 1,694 s on a shared core, 85.8 % of the held-out emoji
    return judge("emoji-judge", DATA, 800 if fast else 3_000).model_copy(
        update={"network": PatchClassifierConfig(patch=4)}
    )
