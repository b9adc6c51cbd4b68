"""Recipes: functions that return a complete, frozen configuration, with the figures it reached in a comment."""

from collections.abc import Callable

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.recipes.digits import digits, digits_guide, digits_judge
from metaflowmaps.recipes.gmm import gmm, gmm_from_data
from metaflowmaps.recipes.imagenet import imagenet_b2, imagenet_xl2, latents
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


def recipe(name: str, fast: bool = False, data: str | None = None) -> TrainConfig | ClassifierConfig:
    """The configuration of that name, on the files at ``data`` where it takes any."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    config = RECIPES[name](fast=fast)
    if data is None:
        return config
    if config.data is None or config.data.name == "digits":
        raise InputError(f"recipe {name} takes no files: leave --data out, or train images --data {data}")
    return config.model_copy(update={"data": config.data.model_copy(update={"path": data})})
