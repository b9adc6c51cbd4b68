"""Rewards: ``reward(x, cond=None) -> (B,)``."""

from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.rewards.base import Reward, call_reward, is_differentiable
from metaflowmaps.rewards.black_box import BlackBox
from metaflowmaps.rewards.class_rewards import ClassifierMixture, LogitMargin
from metaflowmaps.rewards.compose import Tempered, WeightedSum
from metaflowmaps.rewards.density import LogDensity
from metaflowmaps.rewards.inverse import InverseProblem
from metaflowmaps.rewards.likeness import Likeness
from metaflowmaps.rewards.micro import MicroBatched
from metaflowmaps.rewards.operators import Blur, Downsample, Mask
from metaflowmaps.rewards.style import Colour, Ink, Slant, Symmetry
from metaflowmaps.rewards.vision import (
    OCR,
    AestheticScore,
    ClipScore,
    HPSv2,
    ImageClassifierReward,
    ImageNetClassifier,
    ImageReward,
    ImageRewardNetwork,
    PickScore,
    Pixels,
)

__all__ = [
    "OCR",
    "AestheticScore",
    "BlackBox",
    "Blur",
    "ClassifierMixture",
    "ClipScore",
    "Colour",
    "Downsample",
    "HPSv2",
    "ImageClassifierReward",
    "ImageNetClassifier",
    "ImageReward",
    "ImageRewardNetwork",
    "Ink",
    "InverseProblem",
    "Likeness",
    "LinearGaussian",
    "LogDensity",
    "LogitMargin",
    "Mask",
    "MicroBatched",
    "PickScore",
    "Pixels",
    "Reward",
    "Slant",
    "Symmetry",
    "Tempered",
    "WeightedSum",
    "call_reward",
    "is_differentiable",
]
