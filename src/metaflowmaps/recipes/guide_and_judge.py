"""The two classifiers of a data set. They share nothing but the images: neither architecture nor seed nor order."""

from metaflowmaps.data import DataSource
from metaflowmaps.networks import ClassifierNetworkConfig, ConvClassifierConfig, PatchClassifierConfig
from metaflowmaps.training.train_config import ClassifierConfig, OptimizerConfig

OPTIMIZER = OptimizerConfig(name="adam", lr=2e-3, betas=(0.9, 0.99), weight_decay=0.0)


def guide(recipe: str, data: DataSource, steps: int) -> ClassifierConfig:
    """Convolutions, for rewards."""
    return _classifier(recipe, data, steps, ConvClassifierConfig(), seed=1)


def judge(recipe: str, data: DataSource, steps: int) -> ClassifierConfig:
    """A mixer on patches, for judging."""
    return _classifier(recipe, data, steps, PatchClassifierConfig(), seed=2)


def _classifier(
    recipe: str, data: DataSource, steps: int, network: ClassifierNetworkConfig, seed: int
) -> ClassifierConfig:
    return ClassifierConfig(
        recipe=recipe, data=data, network=network, steps=steps, batch_size=128, optimizer=OPTIMIZER, seed=seed
    )
