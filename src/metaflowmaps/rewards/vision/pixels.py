r"""What a picture goes through before a vision tower reads it, in torch: batched and differentiable.

``x ∈ [−1, 1] → p = clip((x + 1)/2) → resize → clip → crop → (p − mean)/std``

Resizing is PIL's: a bicubic (a = −1/2) or bilinear kernel that widens where a picture shrinks (antialias), along rows
and then along columns. PIL rounds to 8 bits after each pass and this does not: a processor's result differs by at most
``(|K|₁ + 1)/2 · 1/255/std``, |K|₁ the sum of the kernel's absolute weights (bicubic 5/4, bilinear 1).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from metaflowmaps._files import read_regular
from metaflowmaps._shapes import check_state
from metaflowmaps.errors import InputError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FITS = ("shortest", "longest", "exact", "none")
FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
REFUSED = ("do_pad", "rescale_offset", "include_top", "do_flip_channel_order", "do_reduce_labels")


@dataclass(frozen=True)
class Pixels:
    """[−1, 1] pictures (B, 3, H, W), or grey ones (B, 1, H, W), as a vision tower reads them: (B, 3, h, w).

    Args:
        size: (h, w) after resizing.
        fit: the ``shortest`` side becomes size[0], the ``longest`` (black around it), both (``exact``), or ``none``.
        crop: (h, w) cut from the centre; None: no cut.
        mean: of a channel, subtracted.
        std: of a channel, divided by.
        resample: ``bicubic`` or ``bilinear``.
        scale: what [0, 1] is multiplied by before mean and std.
        clip: to [0, 1] after each pass of resizing, as 8 bits do.

    Examples:
        >>> pixels = mfm.rewards.Pixels(size=(32, 32), crop=(32, 32))
        >>> pixels(torch.zeros(2, 3, 48, 64)).shape
        torch.Size([2, 3, 32, 32])
    """

    size: tuple[int, int] = (224, 224)
    fit: str = "shortest"
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resample: str = "bicubic"
    scale: float = 1.0
    clip: bool = True

    def __post_init__(self) -> None:
        if self.fit not in FITS or self.resample not in FILTERS.values():
            raise InputError(
                f"fit must be one of {', '.join(FITS)} and resample bicubic or bilinear, got {self.fit!r} and "
                f"{self.resample!r}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise InputError(f"mean and std must be three numbers each, std above 0; got {self.mean} and {self.std}")

    def __call__(self, x: Tensor) -> Tensor:
        """Pictures (B, 1 or 3, H, W) as the tower reads them."""
        check_state(x)
        if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape[2:]:
            raise InputError(
                f"this reward looks at pictures (B, 3, H, W) in [−1, 1], got {tuple(x.shape)}: decode latents first, "
                "or reshape"
            )
        p = ((x.to(torch.promote_types(x.dtype, torch.float32)) + 1) / 2).clamp(0, 1)
        p = self._resized(p)
        if self.crop is not None:
            p = self._cropped(p, *self.crop)
        mean, std = (torch.tensor(v, dtype=p.dtype, device=p.device)[:, None, None] for v in (self.mean, self.std))
        return (self.scale * p - mean) / std  # grey becomes three channels here

    def _resized(self, p: Tensor) -> Tensor:
        height, width = p.shape[2:]
        if self.fit == "none":
            return p
        size = self.size
        if self.fit == "shortest":
            short = min(height, width)
            size = (int(self.size[0] * height / short), int(self.size[0] * width / short))
        elif self.fit == "longest":
            long = max(height, width)
            size = (max(1, round(self.size[0] * height / long)), max(1, round(self.size[0] * width / long)))
        if size != (height, width):
            # PIL's passes, rows first: what overshoots is clipped after each
            for goal in ((height, size[1]), size) if self.clip else (size,):
                p = interpolate(p, goal, mode=self.resample, antialias=True, align_corners=False)
                p = p.clamp(0, 1) if self.clip else p
        if self.fit == "longest":
            down, right = self.size[0] - size[0], self.size[0] - size[1]
            p = pad(p, (right // 2, right - right // 2, down // 2, down - down // 2))
        return p

    @staticmethod
    def _cropped(p: Tensor, height: int, width: int) -> Tensor:
        top, left = (p.shape[2] - height) // 2, (p.shape[3] - width) // 2
        if top < 0 or left < 0:
            raise InputError(
                f"a picture of {p.shape[2]} × {p.shape[3]} is smaller than the crop of {height} × {width}: give larger "
                'ones, or Pixels(fit="shortest", size=…)'
            )
        return p[:, :, top : top + height, left : left + width]

    @classmethod
    def of(cls, processor: Any) -> "Pixels":
        """What a processor of transformers, or the mapping in its preprocessor_config.json, asks for."""
        if isinstance(processor, Pixels):
            return processor
        inner = getattr(processor, "image_processor", processor)
        given = dict(inner) if isinstance(inner, Mapping) else inner.to_dict() if hasattr(inner, "to_dict") else None
        if given is None:
            raise InputError(
                f"processor must be a Pixels, an image processor of transformers or its configuration, got "
                f"{type(processor).__name__}"
            )
        given = {key: value for key, value in dict(given.get("image_processor") or given).items() if value is not None}
        refused = [key for key in REFUSED if given.get(key)]
        if refused:
            raise InputError(f"a processor with {', '.join(refused)} is not supported: give processor=Pixels(…)")
        size, fit, crop = _sizes(given)
        normalise = given.get("do_normalize", True)
        rescale = given.get("do_rescale", True)
        resample = int(given.get("resample", 2))
        if resample not in FILTERS:
            raise InputError(f"resample={resample} has no gradient here: give processor=Pixels(resample='bicubic', …)")
        return cls(
            size=size,
            fit=fit,
            crop=crop,
            mean=_three(given.get("image_mean", CLIP_MEAN)) if normalise else (0.0, 0.0, 0.0),
            std=_three(given.get("image_std", CLIP_STD)) if normalise else (1.0, 1.0, 1.0),
            resample=FILTERS[resample],
            scale=255 * float(given.get("rescale_factor", 1 / 255)) if rescale else 255.0,
        )

    @classmethod
    def from_file(cls, path: Path) -> "Pixels":
        """That of a preprocessor_config.json."""
        try:
            return cls.of(json.loads(read_regular(path)))
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} cannot be read ({error}): fetch it again, or give processor=Pixels(…)") from None


def _sizes(given: Mapping[str, Any]) -> tuple[tuple[int, int], str, tuple[int, int] | None]:
    """size, fit and crop; a bare number for size is the shortest side where a crop follows, else a square."""
    crops = bool(given.get("do_center_crop", False))
    crop = _pair(given.get("crop_size"), "crop_size") if crops else None
    if not given.get("do_resize", True):
        return crop or (224, 224), "none", crop
    size = given.get("size")
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else size if crops else None
    if given.get("crop_pct") is not None and isinstance(edge, int):
        if edge >= 384:  # the whole picture is squeezed
            return (edge, edge), "exact", crop
        larger = int(edge / given["crop_pct"])
        return (larger, larger), "shortest", (edge, edge)
    if isinstance(edge, int):
        return (edge, edge), "shortest", crop
    return _pair(size, "size"), "exact", crop


def _pair(size: Any, name: str) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise InputError(f"a processor with {name}={size} is not supported: give processor=Pixels(…) instead")


def _three(values: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in values) if isinstance(values, list | tuple) else (float(values),) * 3
