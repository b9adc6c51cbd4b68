"""Recipes: functions that return a complete, frozen configuration, with the figures it reached in a comment."""

import inspect
from collections.abc import Callable

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.recipes.digits import digits, digits_guide, digits_judge
from metaflowmaps.recipes.emoji import emoji, emoji_guide, emoji_judge
from metaflowmaps.recipes.gmm import gmm, gmm_from_data
from metaflowmaps.recipes.imagenet import (
    imagenet_b2,
    imagenet_xl2,
    latents,
)
from metaflowmaps.recipes.images import images, images_guide, images_judge
from metaflowmaps.recipes.mixture16 import mixture_16d
from metaflowmaps.recipes.mnist import mnist, mnist_guide, mnist_judge
from metaflowmaps.recipes.sequences import moving_digits, process, sequences, simulator
from metaflowmaps.training.train_config import ClassifierConfig, TrainConfig
from metaflowmaps.work.choices import outside

RECIPES: dict[str, Callable[..., TrainConfig | ClassifierConfig]] = {
    "gmm": gmm,
    "gmm-from-data": gmm_from_data,
    "mixture-16d": mixture_16d,
    "digits": digits,
    "digits-guide": digits_guide,
    "digits-judge": digits_judge,
    "emoji": emoji,
    "emoji-guide": emoji_guide,
    "emoji-judge": emoji_judge,
    "mnist": mnist,
    "mnist-guide": mnist_guide,
    "mnist-judge": mnist_judge,
    "images": images,
    "images-guide": images_guide,
    "images-judge": images_judge,
    "latents": latents,
    "sequences": sequences,
    "process": process,
    "simulator": simulator,
    "moving-digits": moving_digits,
    "imagenet-b2": imagenet_b2,
    "imagenet-xl2": imagenet_xl2,
}


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
    if name not in RECIPES:
        raise unknown("recipe", name, (*RECIPES, "file.py:name"))
    return RECIPES[name](fast=fast)


def _outside(name: str, fast: bool) -> TrainConfig | ClassifierConfig:
    made = outside(name)
    if callable(made):
        made = made(fast=fast) if "fast" in inspect.signature(made).parameters else made()
    if not isinstance(made, TrainConfig | ClassifierConfig):
        raise InputError(f"{name} is no recipe: let it be a TrainConfig, or a function that returns one")
    return made
