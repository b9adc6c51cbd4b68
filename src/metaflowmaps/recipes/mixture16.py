"""A mixture in 16 dimensions with eight full covariances: where conclusions from the plane are tested again."""

import torch

from metaflowmaps.data import Mixture
from metaflowmaps.networks import MLPConfig
from metaflowmaps.random import stream
from metaflowmaps.training.train_config import ModelConfig, TimesConfig, TrainConfig

DIM, COMPONENTS = 16, 8


def _law() -> Mixture:
    """Means N(0, Id); covariances with random axes and eigenvalues log-uniform in [.05, .5]; uniform weights."""
    g = stream(0, "mixture-16d")
    means = torch.randn(COMPONENTS, DIM, generator=g, dtype=torch.float64)
    axes = torch.linalg.qr(torch.randn(COMPONENTS, DIM, DIM, generator=g, dtype=torch.float64)).Q
    eigenvalues = 0.05 * 10 ** torch.rand(COMPONENTS, DIM, generator=g, dtype=torch.float64)
    covariances = axes @ torch.diag_embed(eigenvalues) @ axes.mT
    return Mixture(means=means.tolist(), covariances=((covariances + covariances.mT) / 2).tolist())


LAW = _law()
DATA_STD = 1.1  # of a coordinate: √(1 + .2)


def mixture_16d(fast: bool = False) -> TrainConfig:
    """The meta flow map of a 16-dimensional mixture of eight full covariances, from its exact auxiliary drift."""
    return TrainConfig(
        recipe="mixture-16d",
        data=LAW,
        model=ModelConfig(data_std=DATA_STD, network=MLPConfig(width=256, depth=4)),
        times=TimesConfig(focus=(0.1, 0.6), focus_share=0.5),
        steps=3_000 if fast else 8_000,
        batch_size=512,
    )
