"""What --reward means: a task, a file's function, or a reward of images."""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from metaflowmaps.checkpoint import Checkpoint
from metaflowmaps.commands.images import open_stage
from metaflowmaps.errors import InputError
from metaflowmaps.evaluation.images.rewards import PIXELS, REWARDS, image_reward
from metaflowmaps.evaluation.images.stage import ImageEvalConfig
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.recipes.tasks import TASKS, steering_task
from metaflowmaps.rewards import LinearGaussian, Tempered


def chosen_reward(
    text: str | None, strength: float, found: Checkpoint
) -> tuple[Callable[..., Tensor] | None, LinearGaussian | None, str]:
    """The reward of ``--reward``; the linear-Gaussian one that it is, if it is one; and its name.

    A task's reward, ``file.py:function``, or, for maps of images, one of their rewards: None then, since it is made of
    the map's own data and classifiers (:func:`image_reward_of`).
    """
    images = found.config.get("training", {}).get("data") is not None
    text = text or (next(iter(REWARDS)) if images else next(iter(TASKS)))
    if images and text.partition(":")[0] in REWARDS:
        return None, None, text
    name, colon, attribute = text.rpartition(":")
    if not colon and text.endswith(".py"):
        raise InputError(f"--reward {text}: name the function too, {text}:my_reward")
    if (not colon and not images) or name in TASKS or text in TASKS:
        own = steering_task(name if colon else text).reward(attribute if colon else "")
        scaled = LinearGaussian(own.A, own.y, own.noise_std, own.strength * strength)
        return scaled, scaled, text
    file = Path(name if colon else text)
    if not file.is_file():
        raise InputError(f"--reward {text}: no file {file}; give {_known(images)} or file.py:function")
    spec = importlib.util.spec_from_file_location("mfm_user_reward", file)
    if spec is None or spec.loader is None:
        raise InputError(f"--reward {text}: {name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises is theirs to read, in one line
        raise InputError(f"--reward {text}: {name} fails with {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise InputError(f"--reward {text}: {name} has no {attribute}")
    attributed = getattr(module, attribute)
    if strength != 1:
        return Tempered(attributed, strength), None, text
    return attributed, None, text


def file_hash(reward: str) -> dict[str, str]:
    """What a reward's file held: another version of it is another run."""
    file = Path(reward.rpartition(":")[0])
    return {"reward_sha256": hashlib.sha256(file.read_bytes()).hexdigest()} if file.is_file() else {}


def image_reward_of(
    name: str, strength: float, checkpoint: str, found: Checkpoint, model: MetaFlowMap, data: str | None = None
) -> Any:
    """A reward of images, from the checkpoint's own guiding classifier and data (where they are now)."""
    if name in PIXELS:
        return PIXELS[name](strength)
    stage, _ = open_stage(checkpoint, found, model, ImageEvalConfig(judge="none", drift="none", data=data))
    return image_reward(stage, name, strength)


def _known(images: bool) -> str:
    return (
        f"a reward of images ({', '.join(REWARDS)}; margin:7 is that of a seven)"
        if images
        else (f"a task ({', '.join(TASKS)})")
    )
