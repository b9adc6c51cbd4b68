r"""LAION's improved aesthetic predictor: ``r(x) = λ h(f(x)/|f(x)|)``, f CLIP ViT-L/14 and h five linear layers.

It predicts how people rate a picture, from 1 to 10. There is no prompt.
"""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from metaflowmaps.errors import InputError
from metaflowmaps.rewards.micro import PerRow
from metaflowmaps.rewards.vision.clip import CLIP_L
from metaflowmaps.rewards.vision.picture_reward import PictureReward, embedded
from metaflowmaps.rewards.vision.weights import PublishedWeights, linear_chain, pretrained, read_tensors, transformers

FILE = "aesthetic-model.pth"
HUB = PublishedWeights("trl-lib/ddpo-aesthetic-predictor", "cf4bd10345610935a80a5d3be9a3133c50f121e4", FILE)


@dataclass(eq=False, repr=False)
class AestheticScore(PictureReward):
    """r(x) = strength · the rating a picture would get: (B,).

    Args:
        model: CLIP, or its vision tower.
        head: from the embedding (B, 768) to a rating (B, 1).

    Examples:
        >>> reward = mfm.rewards.AestheticScore.from_pretrained()  # doctest: +SKIP
        >>> reward(torch.zeros(2, 3, 512, 512))  # (2,)  # doctest: +SKIP
    """

    needs: ClassVar[tuple[str, ...]] = ("vision_model", "visual_projection")
    needed_kind: ClassVar[str] = "a CLIPVisionModelWithProjection or CLIPModel"

    model: nn.Module
    head: nn.Module
    processor: Any = None
    strength: float = 1.0
    _: KW_ONLY
    micro_batch: int | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.head, nn.Module):
            raise InputError(f"head must be a torch module, got {type(self.head).__name__}; or use from_pretrained(…)")
        self.head.eval().requires_grad_(False).to(self.device)

    def score(self, x: Tensor, rows: PerRow) -> Tensor:
        """The unscaled score, (b,)."""
        image = embedded(self.model, self.seen(x))
        rating: Tensor = self.head(image.to(next(self.head.parameters()).dtype))[:, 0]
        return rating

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, the head's too."""
        self.head.to(device)
        return super().to(device)

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path = HUB.hub,
        *,
        revision: str | None = None,
        file: str = FILE,
        clip: str | Path | None = None,
        clip_revision: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """The released head (``place`` may be the file, its folder or a hub id) on the CLIP it was fitted to.

        ``options``: strength, micro_batch, processor.
        """
        transformers(cls.__name__)
        state = read_tensors(HUB.path(place, revision, file), inside="state_dict")
        kind = "CLIPVisionModelWithProjection"
        model = pretrained(kind, *CLIP_L.at(clip, clip_revision), dtype=dtype or torch.float32)
        head = linear_chain(state, model.visual_projection.out_features, "the aesthetic predictor")
        return cls(model, head, dtype=dtype, **options)
