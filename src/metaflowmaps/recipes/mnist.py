"""MNIST from its IDX files (``--data-dir``): the map, and its two classifiers."""

from metaflowmaps.data import DataConfig
from metaflowmaps.recipes.classifiers import guide, judge
from metaflowmaps.training.config import (
    ClassifierConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    UNetConfig,
)

DATA = DataConfig(name="mnist")


def mnist(fast: bool = False) -> TrainConfig:
    """The map of 28×28 MNIST: a U-Net of 9 M parameters for a GPU; --fast: a small one for two cores."""
    return TrainConfig(
        recipe="mnist",
        data=DATA,
        model=ModelConfig(
            data_mean="image",
            data_std=0.5,
            network=UNetConfig(width=24, multipliers=(1, 2, 2), blocks=1, attention=(7,))
            if fast
            else UNetConfig(width=64, multipliers=(1, 2, 4), blocks=2, attention=(7,)),
        ),
        loss=LossConfig(diagonal="teacher", consistency="semigroup", diagonal_share=0.5),
        teacher="learned",
        start_from_drift=True,
        drift_steps=1_500 if fast else 30_000,
        drift_batch_size=128 if fast else 512,
        steps=1_500 if fast else 60_000,
        batch_size=128 if fast else 512,
        optimizer=OptimizerConfig(
            name="adam", lr=2e-3 if fast else 1e-3, betas=(0.9, 0.99), ema=0.998 if fast else 0.9995
        ),
        sample_every=500 if fast else 5_000,
        log_every=50 if fast else 100,
        precision="float32" if fast else "bf16",
    )


def mnist_guide(fast: bool = False) -> ClassifierConfig:
    """The classifier of MNIST that rewards are made of."""
    return guide("mnist-guide", DATA, 300 if fast else 2_000)


def mnist_judge(fast: bool = False) -> ClassifierConfig:
    """The classifier of MNIST that samples are judged by: another architecture, another seed."""
    return judge("mnist-judge", DATA, 300 if fast else 2_000)
