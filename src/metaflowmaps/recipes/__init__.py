"""Recipes: functions that return a complete, frozen configuration, with the figures it reached in a comment."""

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
    """The configuration of that name, on the files at ``data`` where it takes any."""
    if name in TASKS:
        raise InputError(f"{name} needs a map, and trains none from nothing: mfm run {name} CHECKPOINT")
    if name not in RECIPES:
        raise unknown("recipe", name, (*RECIPES, *TASKS))
    config = RECIPES[name](fast=fast)
    if data is None:
        return config
    return config.model_copy(update={"data": config.data.moved(data)})
