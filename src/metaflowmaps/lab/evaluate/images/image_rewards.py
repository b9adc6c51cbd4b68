r"""The rewards of the image experiments, by name.

``margin``   log-odds of one class under the guide: unlike log p it has no ceiling (``margin:7``, ``margin:food``)
``slant``    lean to the right, from pixels          ``ink``   stroke weight, from pixels
``half``     log-likelihood of the left half of one held-out image
``mixture``  log Σ w_i p(y_i | x), w ∝ [0,1,0,1,0,2,0,2,0,4] (paper §7.1.2)
``colour``   how much of a colour (``colour:blue``)  ``symmetry``  left like right, both from pixels
``named``    log-odds, in the guide's features, of pictures whose name holds a word (``named:smil``)
``a+b``      the sum of two or more of these, each over its spread on the held-out images

They disagree with each other, and none but ``mixture`` saturates on data. A reward of another name is a judge of
pictures as ``--reward`` names it, such as ``clip@DIR:a red disc`` (:attr:`ImageSetup.named`).

All are rewards on pictures: on latents they are those of the decoded ones, unless the guide is a classifier of latents.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, select_cond
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.interop.autoencoder import Decoded
from metaflowmaps.lab.evaluate.images.judging import BATCH, PART, takes
from metaflowmaps.lab.evaluate.images.setup import ImageSetup
from metaflowmaps.random import stream
from metaflowmaps.rewards import (
    ClassifierMixture,
    Colour,
    Ink,
    InverseProblem,
    Likeness,
    LogitMargin,
    Mask,
    Slant,
    Symmetry,
    Tempered,
    WeightedSum,
)
from metaflowmaps.rewards.base import call_reward

WEIGHTS = (0.0, 1.0, 0.0, 1.0, 0.0, 2.0, 0.0, 2.0, 0.0, 4.0)
LABEL = 3
LEAST_NAMED = 5  # pictures that a name must hold for
NOISE = 0.3  # of the half that is seen
GUIDED = 512  # images that a classifier sees at a time
RACE = ("margin", "slant", "half")


def _guide(setup: ImageSetup, name: str) -> tuple[Any, int]:
    """The classifier, and how many classes it knows: its own number, for a map may be trained without any."""
    if setup.guide is None:
        raise InputError(
            f"reward {name} needs a guiding classifier: mfm train {setup.train.name}-guide makes one beside the run "
            f"(mfm eval takes another with --set guide=RUN); slant, ink and half need none{_prompts(setup)}"
        )
    guide = setup.guide

    def logits(x: Tensor) -> Tensor:
        # many draws at once leave a processor's cache: in parts it takes half the time
        return torch.cat([guide(part) for part in x.split(GUIDED)])

    return logits, int(getattr(guide, "num_classes", setup.train.num_classes))


def _margin(setup: ImageSetup, label: str) -> Any:
    guide, classes = _guide(setup, "margin")
    if label.isdecimal() and int(label) < classes:
        return LogitMargin(guide, int(label))
    names = setup.train.class_names
    meant = [i for i, name in enumerate(names) if label and name.casefold().startswith(label.casefold())]
    if label and len(meant) != 1:
        words = "" if all(name.isdecimal() for name in names) else f", or the beginning of one of {', '.join(names)}"
        raise InputError(f"margin:{label} names no class: give one of 0 … {classes - 1}, as in margin:{LABEL}{words}")
    return LogitMargin(guide, meant[0] if meant else min(LABEL, classes - 1))


def _named(setup: ImageSetup, word: str) -> Any:
    _guide(setup, "named")
    names = getattr(setup.train, "names", None)
    if names is None:
        raise InputError(f"named:{word} needs pictures that have names, as emoji have; {setup.train.name} have none")
    chosen = torch.tensor([word.casefold() in name.casefold() for name in names])
    if not word or int(chosen.sum()) < LEAST_NAMED:
        raise InputError(
            f"named:{word} holds for {int(chosen.sum()) if word else 'no'} pictures and takes {LEAST_NAMED}: "
            "give a part of a name that several have, such as named:smil"
        )
    x = setup.train.tensor()
    return Likeness(setup.guide.features, x[chosen], x[~chosen])  # type: ignore[union-attr, arg-type]


def _sum(setup: ImageSetup, name: str) -> Any:
    """Of parts that are as far apart on the held-out images as each other."""
    parts = [image_reward(setup, part, on_pictures=True) for part in name.split("+")]
    seen = setup.decode(setup.unseen)
    return WeightedSum([(1 / max(float(scored(part, seen).std()), 1e-6), part) for part in parts])


def _mixture(setup: ImageSetup) -> Any:
    guide, classes = _guide(setup, "mixture")
    return ClassifierMixture(guide, weights(classes))


def _half(setup: ImageSetup) -> Any:
    x = setup.decode(setup.images(1, "half", 0)[0])
    mask = torch.zeros(x.shape[1:])
    mask[..., : mask.shape[-1] // 2] = 1
    return InverseProblem.observe(Mask(mask), x, NOISE, stream(0, "half"))


# they need no setup, but a strength
PIXELS: dict[str, Callable[[float], Any]] = {"slant": Slant, "ink": Ink, "symmetry": Symmetry}
WORDED = ("margin", "colour", "named")  # something may follow their colon
REWARDS: dict[str, Callable[[ImageSetup, str], Any]] = {  # of a setup, and of what follows the colon
    "margin": _margin,
    "slant": lambda setup, label: Slant(),
    "half": lambda setup, label: _half(setup),
    "ink": lambda setup, label: Ink(),
    "mixture": lambda setup, label: _mixture(setup),
    "symmetry": lambda setup, label: Symmetry(),
    "colour": lambda setup, word: Colour(word or "blue"),
    "named": _named,
}


def image_reward(setup: ImageSetup, name: str, strength: float = 1.0, on_pictures: bool = False) -> Any:
    """The reward of that name, times its strength, on the map's samples or, if they are latents, on their pictures."""
    kind, _, label = name.partition(":")
    several = "+" in name and all(part.partition(":")[0] in REWARDS for part in name.split("+"))
    made = _sum(setup, name) if several else None if kind in REWARDS else setup.named(name)
    if made is None:
        if kind not in REWARDS or (label and kind not in WORDED):
            raise unknown("reward", name, (*REWARDS, *setup.kinds))
        made = REWARDS[kind](setup, label)
    by_guide = kind in ("margin", "mixture", "named") and not several and setup.guide is not None
    if setup.latent and not on_pictures and not (by_guide and takes(setup.guide, tuple(setup.model.event_shape))):
        made = Decoded(made, setup.codec)
    return made if strength == 1 else Tempered(made, strength)


def _prompts(setup: ImageSetup) -> str:
    return ", nor do judges of pictures such as clip:PROMPT" if setup.latent else ""


def short(names: Iterable[str]) -> dict[str, str]:
    """Names as figures and files have them: without the place that a judge of pictures is read from."""
    out: dict[str, str] = {}
    for name in names:
        head, colon, words = name.partition(":")
        brief = head.partition("@")[0] + colon + words
        out[name] = name if brief in out.values() else brief
    return out


def weights(classes: int) -> list[float]:
    """The paper's w for ten classes; the same pattern, cut or repeated, for another number."""
    return [WEIGHTS[i % len(WEIGHTS)] for i in range(max(classes, 2))]


@torch.no_grad()
def scored(reward: Any, x: Tensor, cond: Cond = None) -> Tensor:
    """r(x) in parts: (n,)."""
    return scores_of({"": reward}, x, cond)[""]


@torch.no_grad()
def scores_of(rewards: Mapping[str, Any], x: Tensor, cond: Cond = None) -> dict[str, Tensor]:
    """Several rewards of x (n, *event) in parts, (n,) each; what all look at is decoded once."""
    codec = next((r.codec for r in rewards.values() if isinstance(r, Decoded)), None)
    size = BATCH if codec is None else PART
    parts: dict[str, list[Tensor]] = {name: [] for name in rewards}
    for begin in range(0, len(x), size):
        part = x[begin : begin + size]
        told = select_cond(cond, slice(begin, begin + size))
        pictures = part if codec is None else codec.decode(part)
        for name, reward in rewards.items():
            looks = isinstance(reward, Decoded)
            one, seen = (reward.reward, pictures) if looks else (reward, part)
            parts[name].append((one(seen) if told is None else call_reward(one, seen, told)).cpu())
    return {name: torch.cat(values) for name, values in parts.items()}
