"""The 8×8 digits that come with the package: a map of images that a laptop trains, and its two classifiers."""

from metaflowmaps.data import Digits
from metaflowmaps.networks import MLPConfig
from metaflowmaps.recipes.guide_and_judge import guide, judge
from metaflowmaps.recipes.images import TAUGHT
from metaflowmaps.training.train_config import ClassifierConfig, ModelConfig, OptimizerConfig, TrainConfig

DATA = Digits()


def digits(fast: bool = False) -> TrainConfig:
    """The map of 8×8 digits, taught by a drift that is learned first."""
    # 2,316 s on one core: Fréchet distance of one-step draws 3.16, 3.44, 2.82, 1.28, .325 at t = 0, .1, .2, .5, .8
    # (GLASS with 30 calls 3.02, 3.09, 2.65, 1.18, .306; mfm eval posterior digits)
    return TrainConfig(
        recipe="digits",
        data=DATA,
        model=ModelConfig(data_mean="image", data_std=0.53, network=MLPConfig(width=256, depth=6, modulation=True)),
        **TAUGHT,
        drift_steps=1_000 if fast else 2_500,
        drift_batch_size=1024,
        steps=2_000 if fast else 30_000,
        batch_size=512,
        optimizer=OptimizerConfig(lr=2e-3),
        sample_every=3_000,
    )


def digits_guide(fast: bool = False) -> ClassifierConfig:
    """The classifier of digits that rewards are made of."""
    # 26 s on one core: 99.0 % of the held-out digits
    return guide("digits-guide", DATA, 400 if fast else 1_500)


def digits_judge(fast: bool = False) -> ClassifierConfig:
    """The classifier of digits that samples are judged by: another architecture, another seed."""
    # 106 s on one core: 99.7 % of the held-out digits
    return judge("digits-judge", DATA, 400 if fast else 1_500)
