"""What --reward means: a task, a file's function, a reward of images, or a preference model with its prompt."""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from metaflowmaps.checkpoint import Checkpoint
from metaflowmaps.commands.stage import open_stage
from metaflowmaps.data import read_examples
from metaflowmaps.data.imagenet import class_names
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.images.image_rewards import PIXELS, REWARDS, image_reward
from metaflowmaps.lab.evaluate.images.stage import ImageEvalConfig
from metaflowmaps.recipes.tasks import TASKS, steering_task
from metaflowmaps.rewards import (
    AestheticScore,
    ClipScore,
    HPSv2,
    ImageClassifierReward,
    ImageReward,
    LinearGaussian,
    PickScore,
    Tempered,
)
from metaflowmaps.rewards.vision import Judge
from metaflowmaps.rewards.vision.prompts import SLOT

PROMPTED: dict[str, type[ClipScore | PickScore | HPSv2 | ImageReward]] = {
    "clip": ClipScore,
    "pickscore": PickScore,
    "hpsv2": HPSv2,
    "imagereward": ImageReward,
}
JUDGES = (*PROMPTED, "aesthetic", "classifier")
IMAGENET = 1000


def chosen_reward(
    text: str | None, strength: float, found: Checkpoint
) -> tuple[Callable[..., Tensor] | None, LinearGaussian | None, str]:
    """The reward of ``--reward``; the linear-Gaussian one that it is, if it is one; and its name.

    A task's reward, ``file.py:function``, a preference model (:func:`judge`), or, for maps of images, one of their
    rewards: None then, since it is made of the map's own data and classifiers (:func:`image_reward_of`).
    """
    images = read_examples(found.config.get("training", {})) is not None
    text = text or (next(iter(REWARDS)) if images else next(iter(TASKS)))
    if images and text.partition(":")[0] in REWARDS:
        return None, None, text
    if text.partition(":")[0].partition("@")[0] in JUDGES:
        return judge(text, strength, found), None, text
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


def judge(text: str, strength: float, found: Checkpoint) -> Judge:
    """``pickscore:a photo of a cat``, ``aesthetic``, ``classifier:tabby``; ``clip@FOLDER-OR-HUB-ID[@REVISION]:…``.

    ``{label}`` in a prompt stands for the class of each sample, where the classes are ImageNet's.
    """
    head, _, words = text.partition(":")
    kind, _, source = head.partition("@")
    place, _, revision = source.partition("@")
    options: dict[str, Any] = {"strength": strength}
    options |= {name: value for name, value in (("place", place), ("revision", revision)) if value}
    if kind == "aesthetic":
        if words:
            raise InputError(f"--reward {text}: aesthetic takes no prompt, it looks at the picture alone: leave it out")
        return AestheticScore.from_pretrained(**options)
    if not words.strip():
        example = "classifier:tabby" if kind == "classifier" else f"'{head}:a photo of a tabby cat'"
        raise InputError(f"--reward {text}: say what for, as in --reward {example}")
    if kind == "classifier":
        return ImageClassifierReward.from_pretrained(label=words, **options)
    if SLOT in words:
        network = found.config.get("network", {})
        if not isinstance(network, dict) or network.get("num_classes") != IMAGENET:
            raise InputError(f"--reward {text}: {SLOT} needs a map of ImageNet's classes; type the name of the class")
        options["classes"] = [names.split(",")[0] for names in class_names()]
    return PROMPTED[kind].from_pretrained(prompt=words, **options)


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
    return image_reward(stage, name, strength, on_pictures=True)


def _known(images: bool) -> str:
    own = (
        f"a reward of images ({', '.join(REWARDS)}; margin:7 is that of a seven)"
        if images
        else (f"a task ({', '.join(TASKS)})")
    )
    return f"{own}, a model that judges pictures ({', '.join(JUDGES)}; pickscore:PROMPT)"
