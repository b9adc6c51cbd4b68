"""The self-normalised regression: MFM-FT with w = 1, whose bias of order 1/N is learned too."""

from dataclasses import dataclass
from typing import ClassVar

from metaflowmaps.finetuning.mfm_ft import MFMFT


@dataclass(frozen=True)
class SelfNormalised(MFMFT):
    """Regression on MFM-G's self-normalised target, all rows alike."""

    name: ClassVar[str] = "self-normalised"
    title: ClassVar[str] = "self-normalised"
    weighted: ClassVar[bool] = False
