r"""Any image classifier of transformers as a reward for a class y.

``"log-probability"``   r(x) = λ log p(y | x)
``"margin"``            r(x) = λ log p(y | x)/(1 − p(y | x)), which has no ceiling at 0
"""

import itertools
from dataclasses import KW_ONLY, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond
from metaflowmaps.errors import InputError, check_one_of
from metaflowmaps.rewards.micro import PerRow
from metaflowmaps.rewards.vision.picture_reward import PictureReward, exact
from metaflowmaps.rewards.vision.pixels import Pixels
from metaflowmaps.rewards.vision.prompts import labels_of
from metaflowmaps.rewards.vision.weights import PREPROCESSOR, PublishedWeights, fetched, pretrained, transformers

HUB = PublishedWeights("google/vit-base-patch16-224", "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3")
KINDS = ("log-probability", "margin")


@dataclass(eq=False, repr=False)
class ImageClassifierReward(PictureReward):
    """r(x) = strength · the log-probability or log-odds of a class, given by number or name; None: cond["label"].

    Args:
        model: gives logits (B, classes).
        label: the class; None: each row's own.
        processor: how it sees pictures.
        kind: ``log-probability`` or ``margin`` (log-odds, without a ceiling).

    Examples:
        >>> reward = mfm.rewards.ImageClassifierReward.from_pretrained(label="tabby")  # doctest: +SKIP
        >>> reward(torch.zeros(2, 3, 512, 512))  # (2,)  # doctest: +SKIP
    """

    own_pixels: ClassVar[None] = None  # every classifier has its own

    model: nn.Module
    label: int | str | None
    processor: Any
    strength: float = 1.0
    _: KW_ONLY
    kind: str = "log-probability"
    micro_batch: int | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("kind", self.kind, KINDS)
        names = getattr(getattr(self.model, "config", None), "id2label", None) or {}
        self.names = {int(number): str(name) for number, name in names.items()}
        self.label = None if self.label is None else class_number(self.label, self.names)

    def per_row(self, x: Tensor, cond: Cond) -> PerRow:
        """The label of each row."""
        if self.label is None:
            return {"label": labels_of(x, cond, len(self.names))}
        return {"label": torch.full((len(x),), int(self.label), dtype=torch.long, device=x.device)}

    def score(self, x: Tensor, rows: PerRow) -> Tensor:
        """The unscaled score, (b,)."""
        logits = exact(self.model(pixel_values=self.seen(x)).logits)
        y = rows["label"][:, None]
        if self.kind == "log-probability":
            return logits.log_softmax(1).gather(1, y)[:, 0]
        others = logits.scatter(1, y, -torch.inf)
        return logits.gather(1, y)[:, 0] - others.logsumexp(1)

    def _shown(self) -> str:
        return f'cond["label"], {self.kind}, ' if self.label is None else f"label={self.label}, {self.kind}, "

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path = HUB.hub,
        label: int | str | None = None,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """The classifier in a folder or on the hub. ``options``: strength, kind, micro_batch, processor."""
        transformers(cls.__name__)
        name, revision = HUB.at(place, revision)
        if "processor" not in options:
            options["processor"] = Pixels.from_file(fetched(name, revision, PREPROCESSOR))
        kind = "AutoModelForImageClassification"
        return cls(pretrained(kind, name, revision, dtype=dtype or torch.float32), label, dtype=dtype, **options)


def class_number(label: int | str, names: dict[int, str]) -> int:
    """The number of a class given by number or by name; of "tabby, tabby cat" either synonym will do."""
    if isinstance(label, str) and not label.isdecimal():
        word = label.strip().lower()
        known = {number: [name.lower(), *name.lower().replace(", ", ",").split(",")] for number, name in names.items()}
        meant = [number for number, synonyms in known.items() if word in synonyms]
        if len(meant) > 1:
            raise InputError(f"{label!r} may be class {' or '.join(map(str, meant))}: give the number")
        if not meant:
            near = get_close_matches(word, itertools.chain(*known.values()), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "give its number"
            raise InputError(f"the classifier has no class {label!r} among its {len(names)}: {hint}")
        return meant[0]
    number = int(label) if isinstance(label, str) or int(label) == label else -1
    if number < 0 or (names and number >= len(names)):
        raise InputError(f"label {label} is not among 0 … {len(names) - 1}, the classes of the classifier")
    return number
