r"""Text in pictures, read by an OCR network whose weights come as a package: a black box.

    r(x) = λ (1 − d(read, text)/longest)        d the edit distance, of letters and digits in lower case

What is read are the lines that rapidocr (Apache-2.0; PP-OCR's detection and recognition, 32 MB of ONNX) finds, from top
to bottom; 1 where they are the text, 0 where nothing is read. Between the two it moves by 1/longest: a map that never
writes a letter gives it nothing to choose by.
"""

import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaflowmaps._shapes import Cond, check_state
from metaflowmaps.errors import InputError
from metaflowmaps.rewards.black_box import BlackBox

EXTRA = "pip install 'metaflowmaps[ocr]'"
PARTS = ("Det", "Cls", "Rec")


class OCR(BlackBox):
    """r(x) = strength · how near the text in a picture is to the one that is asked for, from 0 to 1.

    Args:
        text: what ought to stand in the picture.
        strength: λ, which the reward is multiplied by.

    Examples:
        >>> reward = mfm.rewards.OCR("HELLO", strength=20)  # doctest: +SKIP
        >>> reward.read(torch.ones(1, 3, 64, 64))  # an empty page  # doctest: +SKIP
        ['']
    """

    def __init__(self, text: str, strength: float = 1.0) -> None:
        if not isinstance(text, str) or not plain(text):
            raise InputError(f"OCR needs a text with letters or digits, got {text!r}")
        self.text, self.reader = text, _reader()
        super().__init__(self._scores, strength)

    def read(self, x: Tensor) -> list[str]:
        """The text in each picture.

        Args:
            x: (B, 3, H, W) or (B, 1, H, W) in [−1, 1].
        """
        check_state(x)
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise InputError(f"OCR reads pictures (B, 3, H, W) in [−1, 1], got {tuple(x.shape)}: decode latents first")
        pictures = ((x.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        rows = pictures.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).flip(3).numpy()  # blue first, as OpenCV has it
        return [" ".join(self.reader(np.ascontiguousarray(row)).txts or ()) for row in rows]

    def _scores(self, x: Tensor, cond: Cond = None) -> list[float]:
        return [nearness(read, self.text) for read in self.read(x)]

    def __repr__(self) -> str:
        return f"OCR({self.text!r}, strength={self.strength:g})"


def nearness(read: str, text: str) -> float:
    """1 − d/longest of letters and digits.

    Args:
        read: what was found.
        text: what was asked for.
    """
    one, other = plain(read), plain(text)
    return 1 - edits(one, other) / max(len(one), len(other), 1)


def plain(text: str) -> str:
    """Letters and digits in lower case, without accents' variants."""
    return "".join(letter for letter in unicodedata.normalize("NFKC", text).casefold() if letter.isalnum())


def edits(one: str, other: str) -> int:
    """The least number of letters to add, take away or change."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, wanted in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != wanted))
    return row[-1]


def _reader() -> Any:
    """The network, of the package's own files: without them it would download others."""
    try:
        import onnxruntime  # noqa: F401
        import rapidocr
    except ImportError:
        raise InputError(f"OCR needs its network: {EXTRA}") from None
    folder = Path(rapidocr.__file__).parent / "models"
    files = {part: sorted(folder.glob(f"*_{part.lower()}_*.onnx")) for part in PARTS}
    missing = [part for part, found in files.items() if not found]
    if missing:
        raise InputError(
            f"rapidocr came without its models ({', '.join(missing)} in {folder}): {EXTRA} --force-reinstall"
        )
    paths = {f"{part}.model_path": str(found[-1]) for part, found in files.items()}
    return rapidocr.RapidOCR(params={"Global.log_level": "error", **paths})
