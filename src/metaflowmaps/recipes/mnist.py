"""MNIST from its IDX files (``--data-dir``): the map, and its two classifiers."""

from metaflowmaps.data import Mnist
from metaflowmaps.networks import MLPConfig, UNetConfig
from metaflowmaps.recipes.guide_and_judge import guide, judge
from metaflowmaps.recipes.images import TAUGHT
from metaflowmaps.training.train_config import ClassifierConfig, ModelConfig, OptimizerConfig, TrainConfig

DATA = Mnist()
DATA_STD = 0.518  # of a pixel about the mean image


def mnist(fast: bool = False) -> TrainConfig:
    """The map of 28×28 MNIST: a U-Net of 9 M parameters for a GPU; --fast: a perceptron for two cores."""
    if fast:
        # 860 s on a shared core: recognisable and noisy, 14.3 at t = 0 where the training images are at .98
        return TrainConfig(
            recipe="mnist",
            data=DATA,
            model=ModelConfig(
                data_mean="image", data_std=DATA_STD, network=MLPConfig(width=512, depth=6, modulation=True)
            ),
            **TAUGHT,
            drift_steps=3_000,
            drift_batch_size=256,
            steps=3_000,
            batch_size=256,
            optimizer=OptimizerConfig(name="adam", lr=1e-3, betas=(0.9, 0.99)),
            sample_every=1_000,
        )
    return TrainConfig(
        recipe="mnist",
        data=DATA,
        model=ModelConfig(
            data_mean="image", data_std=DATA_STD, network=UNetConfig(width=64, multipliers=(1, 2, 4), attention=(7,))
        ),
        **TAUGHT,
        drift_steps=30_000,
        drift_batch_size=512,
        steps=60_000,
        batch_size=512,
        optimizer=OptimizerConfig(name="adam", lr=5e-3, betas=(0.9, 0.99), warmup_steps=1_000, ema=0.9995),
        sample_every=5_000,
        precision="bf16",
    )


def mnist_guide(fast: bool = False) -> ClassifierConfig:
    """The classifier of MNIST that rewards are made of."""
    # fast, from 9,000 images: 242 s on a shared core, 97.7 % of the held-out images
    return guide("mnist-guide", DATA, 300 if fast else 2_000)


def mnist_judge(fast: bool = False) -> ClassifierConfig:
    """The classifier of MNIST that samples are judged by: another architecture, another seed."""
    # fast, from 9,000 images: 134 s on a shared core, 96.8 % of the held-out images
    return judge("mnist-judge", DATA, 300 if fast else 2_000)
