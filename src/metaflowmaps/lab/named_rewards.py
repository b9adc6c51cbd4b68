"""What ``--reward`` means: each named reward is an object with its spelling; a function of your own is file.py:name."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from metaflowmaps.data import read_examples
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.imagenet_names import class_names
from metaflowmaps.lab.evaluate.images.assemble import open_setup
from metaflowmaps.lab.evaluate.images.image_rewards import PIXELS, image_reward
from metaflowmaps.lab.evaluate.images.setup import ImageEvalConfig
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.recipes.tasks import steering_task
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
from metaflowmaps.rewards.vision.prompts import SLOT
from metaflowmaps.work.choices import outside

IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class AskedReward:
    """A reward as it is typed: ``kind[@place[@revision]][:words]``, for a map, at a strength."""

    text: str
    opened: OpenedModel
    strength: float = 1.0
    data: str | None = None  # where the images are now that it is made of

    @property
    def kind(self) -> str:
        """What stands first."""
        return self.text.partition(":")[0].partition("@")[0]

    @property
    def words(self) -> str:
        """What stands after the colon."""
        return self.text.partition(":")[2]

    @property
    def source(self) -> dict[str, Any]:
        """Where its weights are, and its strength, as the classes take them."""
        place, _, revision = self.text.partition(":")[0].partition("@")[2].partition("@")
        given = {name: value for name, value in (("place", place), ("revision", revision)) if value}
        return {**given, "strength": self.strength}


@dataclass(frozen=True)
class NamedReward:
    """A reward that has a name.

    Args:
        spelling: how it is typed.
        of: what it is about: mixtures, images (made of the map's own data and classifiers) or pictures.
        make: the reward.
    """

    spelling: str
    of: str
    make: Callable[[AskedReward], Callable[..., Tensor]]

    @property
    def name(self) -> str:
        """What a text of it begins with."""
        return self.spelling.partition(":")[0].partition("[")[0]


@dataclass(frozen=True)
class ChosenReward:
    """A reward with its name and, where another version of it would be another run, the hash of its file."""

    reward: Callable[..., Tensor]
    name: str
    sha256: str | None = None

    @property
    def known(self) -> LinearGaussian | None:
        """The reward, where mixtures can be tilted by it exactly."""
        return self.reward if isinstance(self.reward, LinearGaussian) else None


def choose_reward(text: str | None, opened: OpenedModel, strength: float, data: str | None = None) -> ChosenReward:
    """The reward that ``--reward`` names, times its strength.

    Args:
        text: one of :data:`REWARDS` as it is spelled, or ``file.py:function``; None for the first that fits the map.
        opened: the map.
        strength: λ.
        data: where the images are now, for rewards that are made of them.
    """
    images = _of_data(opened) == "images"
    fitting = [r for r in REWARDS.values() if r.of in ("pictures", _of_data(opened))]
    asked = AskedReward(text or fitting[0].name, opened, strength, data)
    named = REWARDS.get(asked.kind.partition("+")[0])  # a sum is of its first part's kind
    if named is not None and named.of == "images" and not images:
        named = None
    if data is not None and (named is None or named.of != "images"):
        raise InputError(f"data={data} is for rewards that are made of images, not for {asked.text}: leave it out")
    if named is not None:
        made = named.make(asked)
        return ChosenReward(made, _with_class(asked.text, made))
    if asked.text.endswith(".py"):
        raise InputError(f"--reward {asked.text}: name the function too, {asked.text}:my_reward")
    if "." not in asked.kind or ":" not in asked.text:
        raise unknown("--reward", asked.text, [*(r.spelling for r in fitting), "file.py:function"])
    own, file = outside(asked.text), Path(asked.text.rpartition(":")[0]).expanduser()
    digest = sha256(file.read_bytes()).hexdigest() if file.is_file() else None
    return ChosenReward(own if strength == 1 else Tempered(own, strength), asked.text, digest)


def offered_rewards(opened: OpenedModel) -> list[NamedReward]:
    """The named rewards that a map of images has with it: of its own data and classifiers, nothing else is read."""
    return [reward for reward in REWARDS.values() if reward.of == _of_data(opened) == "images"]


def _of_data(opened: OpenedModel) -> str:
    """What rewards must be about, to be made of what the map was trained on."""
    return "mixtures" if read_examples(opened.checkpoint.config.get("training", {})) is None else "images"


def _with_class(text: str, reward: Any) -> str:
    """The text; of a bare ``margin`` with the class that was picked, which results then say."""
    while hasattr(reward, "reward"):
        reward = reward.reward
    return f"{text}:{reward.label}" if text == "margin" else text


def judge_of_pictures(text: str, opened: OpenedModel) -> Callable[..., Tensor] | None:
    """A reward on any pictures, of the user's own as ``file.py:name``; None where the text names no such."""
    if ".py:" in text:
        own: Callable[..., Tensor] = outside(text)
        return own
    asked = AskedReward(text, opened)
    named = REWARDS.get(asked.kind)
    return named.make(asked) if named is not None and named.of == "pictures" else None


# -- how each is made --------------------------------------------------------------------------------------------------


def _of_task(asked: AskedReward) -> LinearGaussian:
    own, shape = steering_task(asked.kind).reward(asked.words), tuple(asked.opened.model.event_shape)
    if shape != own.A.shape[1:]:
        raise InputError(
            f"--reward {asked.text} is of samples {tuple(own.A.shape[1:])} and this map makes {shape}: give one that "
            "fits, or a function of your own as file.py:function"
        )
    return LinearGaussian(own.A, own.y, own.noise_std, own.strength * asked.strength)


def _of_images(asked: AskedReward) -> Any:
    """From the checkpoint's own guiding classifier and data."""
    if asked.text in PIXELS:
        return PIXELS[asked.text](asked.strength)
    stage, _ = open_setup(asked.opened, ImageEvalConfig(judge="none", drift="none", data=asked.data))
    return image_reward(stage, asked.text, asked.strength, on_pictures=True)


def _aesthetic(asked: AskedReward) -> Any:
    if asked.words:
        raise InputError(f"--reward {asked.text}: aesthetic takes no prompt, it looks at the picture alone")
    return AestheticScore.from_pretrained(**asked.source)


def _classifier(asked: AskedReward) -> Any:
    if not asked.words.strip():
        raise InputError(f"--reward {asked.text}: say what for, as in --reward classifier:tabby")
    return ImageClassifierReward.from_pretrained(label=asked.words, **asked.source)


def _prompted(kind: type[ClipScore | PickScore | HPSv2 | ImageReward]) -> Callable[[AskedReward], Any]:
    """A preference model; ``{label}`` in its prompt stands for each sample's class, where they are ImageNet's."""

    def make(asked: AskedReward) -> Any:
        if not asked.words.strip():
            head = asked.text.partition(":")[0]
            raise InputError(f"--reward {asked.text}: say what for, as in --reward '{head}:a photo of a tabby cat'")
        options = asked.source
        if SLOT in asked.words:
            if asked.opened.checkpoint.config.get("network", {}).get("num_classes") != IMAGENET_CLASSES:
                raise InputError(
                    f"--reward {asked.text}: {SLOT} needs a map of ImageNet's classes; type the name of the class"
                )
            options["classes"] = [names.split(",")[0] for names in class_names()]
        return kind.from_pretrained(prompt=asked.words, **options)

    return make


_LIST = (
    NamedReward("gmm-inverse[:NOISE]", "mixtures", _of_task),
    NamedReward("mixture-16d[:NOISE]", "mixtures", _of_task),
    NamedReward("margin[:CLASS]", "images", _of_images),
    NamedReward("slant", "images", _of_images),
    NamedReward("half", "images", _of_images),
    NamedReward("ink", "images", _of_images),
    NamedReward("mixture", "images", _of_images),
    NamedReward("colour[:NAME]", "images", _of_images),
    NamedReward("symmetry", "images", _of_images),
    NamedReward("named:WORD", "images", _of_images),
    NamedReward("clip:PROMPT", "pictures", _prompted(ClipScore)),
    NamedReward("pickscore:PROMPT", "pictures", _prompted(PickScore)),
    NamedReward("hpsv2:PROMPT", "pictures", _prompted(HPSv2)),
    NamedReward("imagereward:PROMPT", "pictures", _prompted(ImageReward)),
    NamedReward("aesthetic", "pictures", _aesthetic),
    NamedReward("classifier:CLASS", "pictures", _classifier),
)
REWARDS = {reward.name: reward for reward in _LIST}
JUDGES = tuple(reward.name for reward in _LIST if reward.of == "pictures")
REWARD_HELP = "file.py:function, or " + "; ".join(
    f"{of}: {', '.join(reward.spelling for reward in _LIST if reward.of == of)}{', or a+b' * (of == 'images')}"
    for of in ("mixtures", "images", "pictures")
)
