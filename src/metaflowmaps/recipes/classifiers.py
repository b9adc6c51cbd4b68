"""The two classifiers of a data set. They share nothing but the images: neither architecture nor seed nor order."""

from metaflowmaps.data import DataConfig
from metaflowmaps.training.config import ClassifierConfig, ConvClassifierConfig, OptimizerConfig, PatchClassifierConfig

OPTIMIZER = OptimizerConfig(name="adam", lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)


def guide(recipe: str, data: DataConfig, steps: int) -> ClassifierConfig:
    """Convolutions, for rewards."""
    return ClassifierConfig(
        recipe=recipe,
        data=data,
        network=ConvClassifierConfig(),
        steps=steps,
        batch_size=128,
        optimizer=OPTIMIZER,
        seed=1,
    )


def judge(recipe: str, data: DataConfig, steps: int) -> ClassifierConfig:
    """A mixer on patches, for judging."""
    return ClassifierConfig(
        recipe=recipe,
        data=data,
        network=PatchClassifierConfig(),
        steps=steps,
        batch_size=128,
        optimizer=OPTIMIZER,
        seed=2,
    )
