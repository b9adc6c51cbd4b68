"""The features that FID is measured in: the 2,048 of Inception v3, as torch-fidelity has them (extra ``metrics``).

Pictures are rounded to eight bits first, as they would be stored; resizing to 299 pixels is the extractor's own.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps.errors import InputError
from metaflowmaps.metrics.finite import check_finite


class Inception(nn.Module):
    """(B, 3, H, W) in [−1, 1] -> (B, 2048). ``weights``: torch-fidelity's file; None: it fetches its own."""

    name = "inception"

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        if weights is not None and not Path(weights).is_file():
            raise InputError(f"{weights}: no such file; give torch-fidelity's Inception weights, or none to fetch them")
        self.extractor = _extractor(weights).eval().requires_grad_(False)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2048)."""
        if x.ndim != 4 or x.shape[1] != 3:
            raise InputError(f"Inception sees colour pictures (B, 3, H, W), got {tuple(x.shape)}")
        check_finite(x, "pictures")
        whole = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        (out,) = self.extractor(whole)
        features: Tensor = out.float()
        return features


def _extractor(weights: str | Path | None) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # torchvision without its torch raises the latter
        raise InputError(
            f"FID needs torch-fidelity and a torchvision that fits torch ({type(error).__name__}): "
            "pip install 'metaflowmaps[metrics]'"
        ) from None
    path = None if weights is None else str(weights)
    return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path)
