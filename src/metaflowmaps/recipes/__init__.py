"""Recipes: functions that return a complete, frozen configuration, with the figures it reached in a comment."""

import inspect
from collections.abc import Callable

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.recipes.digits import digits, digits_guide, digits_judge
from metaflowmaps.recipes.gmm import gmm, gmm_from_data
from metaflowmaps.recipes.imagenet import (
    Task,
    imagenet_b2,
    imagenet_fid,
    imagenet_posterior,
    imagenet_steer,
    imagenet_value,
    imagenet_xl2,
    imagenet_xl2_finetune,
    latents,
)
from metaflowmaps.recipes.images import images, images_guide, images_judge
from metaflowmaps.recipes.mixture16 import mixture_16d
from metaflowmaps.recipes.mnist import mnist, mnist_guide, mnist_judge
from metaflowmaps.training.config import ClassifierConfig, TrainConfig
from metaflowmaps.work.choices import outside

RECIPES: dict[str, Callable[..., TrainConfig | ClassifierConfig]] = {
    "gmm": gmm,
    "gmm-from-data": gmm_from_data,
    "mixture-16d": mixture_16d,
    "digits": digits,
    "digits-guide": digits_guide,
    "digits-judge": digits_judge,
    "mnist": mnist,
    "mnist-guide": mnist_guide,
    "mnist-judge": mnist_judge,
    "images": images,
    "images-guide": images_guide,
    "images-judge": images_judge,
    "latents": latents,
    "imagenet-b2": imagenet_b2,
    "imagenet-xl2": imagenet_xl2,
}


TASKS: dict[str, Callable[..., Task]] = {  # on a map: mfm run NAME CHECKPOINT
    "imagenet-xl2-finetune": imagenet_xl2_finetune,
    "imagenet-steer": imagenet_steer,
    "imagenet-posterior": imagenet_posterior,
    "imagenet-value": imagenet_value,
    "imagenet-fid": imagenet_fid,
}


def task(name: str, fast: bool = False) -> Task:
    """The task of that name."""
    if name not in TASKS:
        raise unknown("recipe to run on a map", name, TASKS)
    return TASKS[name](fast=fast)


def recipe(name: str, fast: bool = False, data: str | None = None) -> TrainConfig | ClassifierConfig:
    """The configuration of that name, on the files at ``data`` where it takes any.

    Args:
        name: one of :data:`RECIPES`, or ``file.py:name`` of a configuration, or of a function that returns one.
        fast: a fraction of the time; functions outside the package take it where they have such a parameter.
        data: where the files are.
    """
    config = _outside(name, fast) if ":" in name else _inside(name, fast)
    return config if data is None else config.model_copy(update={"data": config.data.moved(data)})


def _inside(name: str, fast: bool) -> TrainConfig | ClassifierConfig:
    if name in TASKS:
        raise InputError(f"{name} needs a map, and trains none from nothing: mfm run {name} CHECKPOINT")
    if name not in RECIPES:
        raise unknown("recipe", name, (*RECIPES, *TASKS, "file.py:name"))
    return RECIPES[name](fast=fast)


def _outside(name: str, fast: bool) -> TrainConfig | ClassifierConfig:
    made = outside(name)
    if callable(made):
        made = made(fast=fast) if "fast" in inspect.signature(made).parameters else made()
    if not isinstance(made, TrainConfig | ClassifierConfig):
        raise InputError(f"{name} is no recipe: let it be a TrainConfig, or a function that returns one")
    return made
