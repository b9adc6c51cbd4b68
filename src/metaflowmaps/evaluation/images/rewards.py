r"""The rewards of the image experiments, by name.

``margin``   log-odds of one class under the guide: unlike log p it has no ceiling (``margin:7``: that class)
``slant``    lean to the right, from pixels          ``ink``   stroke weight, from pixels
``half``     log-likelihood of the left half of one held-out image
``mixture``  log Σ w_i p(y_i | x), w ∝ [0,1,0,1,0,2,0,2,0,4] (paper §7.1.2)

They disagree with each other, and none saturates on data but the last.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.evaluation.images.stage import Stage
from metaflowmaps.randomness import stream
from metaflowmaps.rewards import ClassifierMixture, Ink, InverseProblem, LogitMargin, Mask, Slant, Tempered

WEIGHTS = (0.0, 1.0, 0.0, 1.0, 0.0, 2.0, 0.0, 2.0, 0.0, 4.0)
LABEL = 3
NOISE = 0.3  # of the half that is seen
PART = 512  # images that a classifier sees at a time
RACE = ("margin", "slant", "half")


def _guide(stage: Stage, name: str) -> tuple[Any, int]:
    """The classifier, and how many classes it knows: its own number, for a map may be trained without any."""
    if stage.guide is None:
        raise InputError(
            f"reward {name} needs a guiding classifier: mfm train {stage.train.name}-guide makes one beside the run "
            "(mfm eval takes another with --set guide=RUN); slant, ink and half need none"
        )
    guide = stage.guide

    def logits(x: Tensor) -> Tensor:
        # many draws at once leave a processor's cache: in parts it takes half the time
        return torch.cat([guide(part) for part in x.split(PART)])

    return logits, int(getattr(guide, "num_classes", stage.train.num_classes))


def _margin(stage: Stage, label: str) -> Any:
    guide, classes = _guide(stage, "margin")
    if label and not (label.isdecimal() and int(label) < classes):
        raise InputError(f"margin:{label} names no class: give one of 0 … {classes - 1}, as in margin:{LABEL}")
    return LogitMargin(guide, int(label) if label else min(LABEL, classes - 1))


def _mixture(stage: Stage) -> Any:
    guide, classes = _guide(stage, "mixture")
    return ClassifierMixture(guide, weights(classes))


def _half(stage: Stage) -> Any:
    mask = torch.zeros(stage.model.event_shape)
    mask[..., : mask.shape[-1] // 2] = 1
    x, _ = stage.images(1, "half", 0)
    return InverseProblem.observe(Mask(mask), x, NOISE, stream(0, "half"))


PIXELS: dict[str, Callable[[float], Any]] = {"slant": Slant, "ink": Ink}  # they need no stage, but a strength
REWARDS: dict[str, Callable[[Stage, str], Any]] = {  # of a stage, and of what follows the colon
    "margin": _margin,
    "slant": lambda stage, label: Slant(),
    "half": lambda stage, label: _half(stage),
    "ink": lambda stage, label: Ink(),
    "mixture": lambda stage, label: _mixture(stage),
}


def image_reward(stage: Stage, name: str, strength: float = 1.0) -> Any:
    """The reward of that name, times its strength."""
    kind, _, label = name.partition(":")
    if kind not in REWARDS or (label and kind != "margin"):
        raise unknown("reward", name, REWARDS)
    made = REWARDS[kind](stage, label)
    return made if strength == 1 else Tempered(made, strength)


def weights(classes: int) -> list[float]:
    """The paper's w for ten classes; the same pattern, cut or repeated, for another number."""
    return [WEIGHTS[i % len(WEIGHTS)] for i in range(max(classes, 2))]


@torch.no_grad()
def scored(reward: Any, x: Tensor) -> Tensor:
    """r(x) in parts: (n,)."""
    return torch.cat([reward(part).cpu() for part in x.split(1024)])
