"""Rewards: ``reward(x, cond=None) -> (B,)``."""

from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.rewards.base import Reward

__all__ = ["LinearGaussian", "Reward"]
