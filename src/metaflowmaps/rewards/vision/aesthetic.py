r"""LAION's improved aesthetic predictor: ``r(x) = λ h(f(x)/|f(x)|)``, f CLIP ViT-L/14 and h five linear layers.

It predicts how people rate a picture, from 1 to 10. There is no prompt.
"""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from metaflowmaps.errors import InputError
from metaflowmaps.rewards.micro import PerRow
from metaflowmaps.rewards.vision.clip import CLIP_L
from metaflowmaps.rewards.vision.picture_reward import PictureReward, unit
from metaflowmaps.rewards.vision.pixels import Pixels
from metaflowmaps.rewards.vision.weights import linear_chain, loading, published, read_tensors, transformers

HUB = ("trl-lib/ddpo-aesthetic-predictor", "cf4bd10345610935a80a5d3be9a3133c50f121e4")
FILE = "aesthetic-model.pth"
PARTS = ("vision_model", "visual_projection")


class AestheticScore(PictureReward):
    """r(x) = strength · the rating a picture would get: (B,).

    Args:
        model: CLIP, or its vision tower.
        head: from the embedding (B, 768) to a rating (B, 1).
        processor: how it sees pictures; None: as CLIP does.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        processor: Any = None,
        strength: float = 1.0,
        *,
        micro_batch: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, Pixels() if processor is None else processor, strength, micro_batch, dtype)
        if not all(hasattr(model, part) for part in PARTS):
            raise InputError(f"model must be a CLIPVisionModelWithProjection or CLIPModel, got {type(model).__name__}")
        if not isinstance(head, nn.Module):
            raise InputError(f"head must be a torch module, got {type(head).__name__}; or use from_pretrained(…)")
        self.head = head.eval().requires_grad_(False).to(self.device)

    def score(self, x: Tensor, rows: PerRow) -> Tensor:
        """The unscaled score, (b,)."""
        network: Any = self.model
        image = unit(network.visual_projection(network.vision_model(pixel_values=self.seen(x)).pooler_output))
        rating: Tensor = self.head(image.to(next(self.head.parameters()).dtype))[:, 0]
        return rating

    def to(self, device: torch.device | str) -> Self:
        """Move the weights, the head's too."""
        self.head.to(device)
        return super().to(device)

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path = HUB[0],
        *,
        revision: str | None = None,
        file: str = FILE,
        clip: str | Path = CLIP_L[0],
        clip_revision: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """The released head (``place`` may be the file, its folder or a hub id) on the CLIP it was fitted to.

        ``options``: strength, micro_batch, processor.
        """
        package = transformers(cls.__name__)
        clip_revision = CLIP_L[1] if str(clip) == CLIP_L[0] and clip_revision is None else clip_revision
        state = read_tensors(published(place, file, revision, HUB), inside="state_dict")
        with loading(clip):
            model = package.CLIPVisionModelWithProjection.from_pretrained(
                clip, revision=clip_revision, dtype=dtype or torch.float32
            )
        head = linear_chain(state, model.visual_projection.out_features, "the aesthetic predictor")
        return cls(model, head, dtype=dtype, **options)
