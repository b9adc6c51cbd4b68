"""Examples of any shape, taken from one array as they are: fields, chains of beads, latents of another's making."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from metaflowmaps.data.data_source import Parts
from metaflowmaps.data.image_set import ImageSet
from metaflowmaps.data.limits import MAX_BYTES
from metaflowmaps.data.load import ExampleSource, shuffled_split
from metaflowmaps.errors import InputError


class Arrays(ExampleSource):
    """An .npy of floats (n, *event), neither scaled nor cropped; a tenth is held out."""

    name: ClassVar[str] = "arrays"

    path: str | None = None  # the .npy file

    def read(self) -> Parts:
        """The examples, shuffled once."""
        if self.path is None:
            raise InputError("arrays need their file: --set data.path=FILE.npy")
        if self.labels:
            raise InputError(
                "an .npy has no labels: --set data.labels=false, or a data source of your own, file.py:Name"
            )
        examples = torch.from_numpy(np.array(open_array(Path(self.path).expanduser()), dtype=np.float32))
        if not bool(examples.isfinite().all()):
            raise InputError(f"{self.path} holds numbers that are not finite: leave such examples out")
        kept, held = shuffled_split(len(examples), self.held(max(1, len(examples) // 10), len(examples)), self.limit)
        return ImageSet("arrays", examples[kept]), ImageSet("arrays", examples[held])


def open_array(path: Path) -> np.ndarray:
    """The floats (n, *event) of an .npy file, mapped and not read.

    Args:
        path: of the file.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no .npy file of numbers ({error}): numpy.save one of floats (n, …)") from None
    if not isinstance(array, np.ndarray) or array.ndim < 2 or array.dtype.kind != "f" or len(array) < 2:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"{path} holds {found}: give an .npy of floats (n, …), at least two examples")
    if 4 * array.size > MAX_BYTES:
        raise InputError(
            f"{path} takes {4 * array.size / 2**30:.3g} GiB of memory, the bound is {MAX_BYTES / 2**30:.3g}"
        )
    return array
