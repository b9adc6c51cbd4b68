"""The paper's two-dimensional mixture: three modes on a diagonal, every posterior known in closed form."""

import math

from metaflowmaps.data import Mixture
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.networks import MLPConfig
from metaflowmaps.training.train_config import ModelConfig, TimesConfig, TrainConfig

LAW = Mixture(means=[[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], covariances=0.5)
DATA_STD = math.sqrt(6.5)  # of a coordinate: 0.5 within a mode, 6 between them


def paper_mixture() -> GaussianMixture:
    """Means (−3,−3), (0,0), (3,3), equal weights, covariance 0.5 Id."""
    return LAW.law()


def gmm(fast: bool = False) -> TrainConfig:
    """The meta flow map of the mixture, from its exact auxiliary drift."""
    # python -m benchmarks fidelity, 2 cores: 132 s, at most 1.17 × floor at 65,536 samples, 1.02 × at 8,192;
    # fast: 50 s, at most 1.07 × at 8,192
    return TrainConfig(
        recipe="gmm",
        data=LAW,
        model=ModelConfig(data_std=DATA_STD, network=MLPConfig(width=128, depth=4)),
        # the posterior splits and merges around t = .2 to .5: half of the contexts go there
        times=TimesConfig(focus=(0.1, 0.6), focus_share=0.5),
        steps=5_500 if fast else 14_000,
        batch_size=512,
        sample_every=7_000,
    )


def gmm_from_data(fast: bool = False) -> TrainConfig:
    """The same map from samples alone: a drift is learned first by flow matching, GLASS on it teaches the map."""
    # python -m benchmarks fidelity, 2 cores: 122 s in all, at most 1.16 × floor at 8,192 samples
    drift_steps, steps = (1_500, 2_500) if fast else (6_000, 6_000)
    return gmm().model_copy(
        update={"recipe": "gmm-from-data", "teacher": "learned", "drift_steps": drift_steps, "steps": steps}
    )
