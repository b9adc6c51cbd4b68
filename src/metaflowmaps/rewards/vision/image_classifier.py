r"""Any image classifier of transformers as a reward for a class y.

``"log-probability"``   r(x) = λ log p(y | x)
``"margin"``            r(x) = λ log p(y | x)/(1 − p(y | x)), which has no ceiling at 0
"""

import operator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from metaflowmaps._shapes import Cond
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.rewards.micro import PerRow
from metaflowmaps.rewards.vision.picture_reward import PictureReward, exact
from metaflowmaps.rewards.vision.pixels import Pixels
from metaflowmaps.rewards.vision.weights import PREPROCESSOR, fetched, loading, transformers

HUB = ("google/vit-base-patch16-224", "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3")
KINDS = ("log-probability", "margin")


class ImageClassifierReward(PictureReward):
    """r(x) = strength · the log-probability or log-odds of a class, given by number or name; None: cond["label"].

    Args:
        model: gives logits (B, classes).
        label: the class; None: each row's own.
        processor: how it sees pictures.
        kind: ``log-probability`` or ``margin`` (log-odds, without a ceiling).
    """

    def __init__(
        self,
        model: nn.Module,
        label: int | str | None,
        processor: Any,
        strength: float = 1.0,
        *,
        kind: str = "log-probability",
        micro_batch: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, processor, strength, micro_batch, dtype)
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS)
        config: Any = getattr(model, "config", None)
        self.names: dict[int, str] = {int(k): str(v) for k, v in dict(getattr(config, "id2label", None) or {}).items()}
        self.kind = kind
        self.label = None if label is None else class_number(label, self.names)

    def per_row(self, x: Tensor, cond: Cond) -> dict[str, Tensor]:
        """The label of each row."""
        if self.label is not None:
            return {"label": torch.full((len(x),), self.label, dtype=torch.long, device=x.device)}
        label = None if cond is None else cond.get("label")
        if label is None or label.shape != x.shape[:1]:
            raise InputError(f'without a label of its own this reward needs cond["label"], shape ({len(x)},), int64')
        if self.names and bool(((label < 0) | (label >= len(self.names))).any()):
            raise InputError(
                f'cond["label"] must lie in 0 … {len(self.names) - 1}, the classes of the classifier; '
                f"got {int(label.min())} … {int(label.max())}"
            )
        return {"label": label.long()}

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
        place: str | Path = HUB[0],
        label: int | str | None = None,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """The classifier in a folder or on the hub. ``options``: strength, kind, micro_batch, processor."""
        package = transformers(cls.__name__)
        revision = HUB[1] if str(place) == HUB[0] and revision is None else revision
        if "processor" not in options:
            options["processor"] = Pixels.from_file(fetched(place, PREPROCESSOR, revision))
        with loading(place):
            model = package.AutoModelForImageClassification.from_pretrained(
                place, revision=revision, dtype=dtype or torch.float32
            )
        return cls(model, label, dtype=dtype, **options)


def class_number(label: int | str, names: dict[int, str]) -> int:
    """The number of a class given by number or by name; of "tabby, tabby cat" either synonym will do."""
    if isinstance(label, str) and not label.isdecimal():
        known: dict[str, set[int]] = {}
        for number, name in names.items():
            for synonym in (name, *name.split(",")):
                known.setdefault(synonym.strip().lower(), set()).add(number)
        meant = sorted(known.get(label.strip().lower(), ()))
        if len(meant) > 1:
            raise InputError(f"{label!r} may be class {' or '.join(map(str, meant))}: give the number")
        if meant:
            return meant[0]
        near = get_close_matches(label.strip().lower(), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "give its number"
        raise InputError(f"the classifier has no class {label!r} among its {len(names)}: {hint}")
    try:
        number = int(label) if isinstance(label, str) else operator.index(label)
    except TypeError:
        raise InputError(f"label must be the number or the name of a class, got {label!r}") from None
    if number < 0 or (names and number >= len(names)):
        raise InputError(f"label {number} is not among 0 … {len(names) - 1}, the classes of the classifier")
    return number
