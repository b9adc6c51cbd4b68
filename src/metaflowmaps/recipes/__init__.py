"""Recipes: functions that return a complete, frozen configuration, with the figures it reached in a comment."""

from collections.abc import Callable

from metaflowmaps.errors import unknown
from metaflowmaps.recipes.gmm import gmm, gmm_from_data
from metaflowmaps.recipes.mixture16 import mixture_16d
from metaflowmaps.training.config import TrainConfig

RECIPES: dict[str, Callable[..., TrainConfig]] = {
    "gmm": gmm,
    "gmm-from-data": gmm_from_data,
    "mixture-16d": mixture_16d,
}


def recipe(name: str, fast: bool = False) -> TrainConfig:
    """The configuration of that name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name](fast=fast)
