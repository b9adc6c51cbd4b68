"""Rewards: ``reward(x, cond=None) -> (B,)``."""

from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.rewards.base import Reward, call_reward, is_differentiable
from metaflowmaps.rewards.black_box import BlackBox
from metaflowmaps.rewards.classifier import ClassifierMixture, LogitMargin
from metaflowmaps.rewards.compose import Tempered, WeightedSum
from metaflowmaps.rewards.density import LogDensity
from metaflowmaps.rewards.inverse import InverseProblem
from metaflowmaps.rewards.operators import Blur, Downsample, Mask
from metaflowmaps.rewards.style import Ink, Slant

__all__ = [
    "BlackBox",
    "Blur",
    "ClassifierMixture",
    "Downsample",
    "Ink",
    "InverseProblem",
    "LinearGaussian",
    "LogDensity",
    "LogitMargin",
    "Mask",
    "Reward",
    "Slant",
    "Tempered",
    "WeightedSum",
    "call_reward",
    "is_differentiable",
]
