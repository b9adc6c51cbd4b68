"""Your own images (``--data DIR``): spread measured, network sized to them; classifiers where there are labels."""

from typing import Any

from metaflowmaps.data import Images
from metaflowmaps.recipes.guide_and_judge import guide, judge
from metaflowmaps.training.train_config import (
    ClassifierConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TimesConfig,
    TrainConfig,
)

DATA = Images()
# how a map of images is taught: by a drift that is learned first, from whose weights it starts (docs/log.md)
TAUGHT: dict[str, Any] = {
    "loss": LossConfig(diagonal_share=0.25),
    "times": TimesConfig(from_noise=0.8),
    "teacher": "learned",
    "start_from_drift": True,
}


def images(fast: bool = False) -> TrainConfig:
    """The map of your own images: a folder, or an .npy or .npz array."""
    return TrainConfig(
        recipe="images",
        data=DATA,
        model=ModelConfig(data_mean="image", data_std=None, network=None),
        **TAUGHT,
        drift_steps=1_500 if fast else 6_000,
        drift_batch_size=128,
        steps=1_500 if fast else 6_000,
        batch_size=128,
        optimizer=OptimizerConfig(name="adam", lr=1e-3, betas=(0.9, 0.99)),
        sample_every=500 if fast else 2_000,
        log_every=50,
    )


def images_guide(fast: bool = False) -> ClassifierConfig:
    """The classifier of your own labelled images that rewards are made of."""
    return guide("images-guide", DATA.model_copy(update={"labels": True}), 400 if fast else 2_000)


def images_judge(fast: bool = False) -> ClassifierConfig:
    """The classifier of your own labelled images that samples are judged by."""
    return judge("images-judge", DATA.model_copy(update={"labels": True}), 400 if fast else 2_000)
