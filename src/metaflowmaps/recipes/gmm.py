"""The paper's two-dimensional mixture: three modes on a diagonal, every posterior known in closed form."""

import math

from metaflowmaps.mixture import GaussianMixture
from metaflowmaps.training.config import LawConfig, ModelConfig, NetworkConfig, TrainConfig

LAW = LawConfig(means=[[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], covariances=0.5)
DATA_STD = math.sqrt(6.5)  # of a coordinate: 0.5 within a mode, 6 between them


def paper_mixture() -> GaussianMixture:
    """Means (−3,−3), (0,0), (3,3), equal weights, covariance 0.5 Id."""
    return LAW.build()


def gmm(fast: bool = False) -> TrainConfig:
    """The meta flow map of the mixture, from its exact auxiliary drift."""
    return TrainConfig(
        recipe="gmm",
        law=LAW,
        model=ModelConfig(data_std=DATA_STD, network=NetworkConfig(width=128, depth=4)),
        steps=8_000 if fast else 22_000,
        batch_size=512,
    )
