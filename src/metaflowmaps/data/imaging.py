"""Pictures in and out: tensors in [−1, 1] (B, C, H, W), numpy arrays (H, W, C) or (B, H, W, C), PIL images.

In numpy, uint8 means 0…255 and floats mean [0, 1], as matplotlib has it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaflowmaps.errors import InputError


def to_tensor(pictures: Any, channels: int = 3) -> Tensor:
    """One picture or several, of any kind, as float32 (B, C, H, W) in [−1, 1] on CPU; tensors stay where they are."""
    if isinstance(pictures, Tensor):
        x = pictures if pictures.ndim == 4 else pictures[None]
        if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
            raise InputError(
                f"a tensor of pictures must be floats in [-1, 1], (B, {channels}, H, W); got {tuple(pictures.shape)} "
                f"of {pictures.dtype}"
            )
        if not len(x):
            raise InputError("no picture was given")
        if not bool((x.abs() <= 1.001).all()):  # rounding may carry a value past 1
            raise InputError("a tensor of pictures must lie in [-1, 1]: 2 * x - 1 if yours lie in [0, 1]")
        return x
    parts = list(pictures) if isinstance(pictures, Sequence) and not isinstance(pictures, str) else [pictures]
    if not parts:
        raise InputError("no picture was given")
    if all(isinstance(part, Tensor) for part in parts):
        if len({part.shape for part in parts}) > 1:
            raise InputError("the pictures have different sizes: resize them to one")
        return to_tensor(torch.stack(parts) if parts[0].ndim == 3 else torch.cat(parts), channels)
    arrays = [_array(part, channels) for part in parts]
    if len({array.shape[-3:] for array in arrays}) > 1:
        sizes = ", ".join(sorted({f"{a.shape[-2]}×{a.shape[-3]}" for a in arrays}))
        raise InputError(f"the pictures have different sizes ({sizes}): resize them to one")
    stacked = torch.from_numpy(np.concatenate([a if a.ndim == 4 else a[None] for a in arrays]))
    return stacked.permute(0, 3, 1, 2).contiguous() * 2 - 1


def _array(picture: Any, channels: int) -> Any:
    """(H, W, C) or (B, H, W, C) float32 in [0, 1]."""
    if hasattr(picture, "convert"):  # PIL
        if picture.mode[0] in "IF":  # of 16 bits and more, or of floats: PIL would cut them off at 255
            raise InputError(f"a picture of mode {picture.mode} has no 0…255: convert it to RGB or L first")
        if picture.has_transparency_data:
            picture = _on_white(picture.convert("RGBA"))
        picture = np.asarray(picture.convert("RGB" if channels == 3 else "L"))
    array = np.asarray(picture)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim not in (3, 4) or array.shape[-1] != channels:
        raise InputError(
            f"a picture is a PIL image, an array (H, W, {channels}) or a tensor ({channels}, H, W); got "
            f"{type(picture).__name__} of shape {array.shape}"
        )
    if not array.size:
        raise InputError("no picture was given")
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    if not np.issubdtype(array.dtype, np.floating) or not bool(((array >= 0) & (array <= 1)).all()):
        raise InputError(f"an array of a picture is uint8 in 0…255 or floats in [0, 1]; got {array.dtype}")
    return array.astype(np.float32)


def _on_white(picture: Any) -> Any:
    """What is transparent shows white, as in ``mfm encode-latents``."""
    from PIL import Image

    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def from_tensor(x: Tensor) -> list[Any]:
    """(B, C, H, W) in [−1, 1] as PIL images."""
    from PIL import Image

    unit = ((x.detach().float().cpu().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1)
    whole = (unit * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in whole]
