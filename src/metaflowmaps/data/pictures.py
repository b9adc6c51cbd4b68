r"""A user's own images: a folder of files, or one array.

Every image becomes a square by a centre crop, then Pillow's antialiased bicubic resize. Files are turned upright as
their EXIF says, laid over white where they are transparent, and animations give their first frame. Arrays are
(n, H, W), (n, H, W, C) or (n, C, H, W), C = 1 or 3, and their values say what they mean:

    uint8                              0..255
    float, no value below 0, none above 1     [0, 1]
    float, smallest value in [−1, −½]         [−1, 1]

Anything else is refused, as is what fits two readings: uint8 that never exceeds 1, floats that dip just below 0.
"""

import os
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from metaflowmaps.data.limits import MAX_BYTES, MAX_SIDE
from metaflowmaps.errors import InputError
from metaflowmaps.random import stream

if TYPE_CHECKING:
    from metaflowmaps.data.load import Images

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
LOOKED_AT = 2000  # files whose headers tell size and channels
GREY = ("1", "L", "LA")
DEEP = ("I", "F")  # modes of more than 8 bits begin so
Classes = tuple[Tensor | None, tuple[str, ...]]
LUMA = torch.tensor([0.299, 0.587, 0.114])  # Pillow's weights of red, green and blue


class PictureReader(Protocol):
    """Images that are read on demand, at one shape."""

    path: Path
    labels: Tensor | None
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def __len__(self) -> int: ...

    def read(self, index: Tensor) -> Tensor:
        """(k, C, H, W): uint8 0..255, or float32 in [−1, 1]."""


def open_pictures(config: "Images") -> PictureReader:
    """The folder or the array at the configuration's path."""
    if config.path is None:
        raise InputError("images need to know where they are: --set data.path=FOLDER, or an .npy or .npz file")
    path = Path(config.path).expanduser()
    if path.is_dir():
        return Folder(path, config)
    if not path.is_file():
        raise InputError(f"there is no file {path.absolute()}: --set data.path=FOLDER, or an .npy or .npz file")
    if path.suffix.lower() in (".npy", ".npz"):
        return Array(path, config)
    raise InputError(f"{path} is neither a folder of images nor an .npy or .npz file: --set data.path=FOLDER")


class Folder:
    """Image files under a folder, in the order of their names; its subfolders are the classes."""

    dtype = torch.uint8

    def __init__(self, path: Path, config: "Images") -> None:
        self.path = path
        names = sorted(map(Path, picture_files(path)))
        self.files = [path / name for name in names]
        _check_count(path, len(names), f"image files ({', '.join(s[1:] for s in SUFFIXES)})")
        classes: Classes = _classes_of_folders(path, names) if config.labels else (None, ())
        self.labels, self.class_names = classes
        common, channels = self._estimate() if config.size is None or config.channels is None else (0, 0)
        side = config.size or _capped(common)
        self.shape = (config.channels or channels, side, side)
        self._colour_is_a_surprise = config.channels is None and channels == 1

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: Tensor) -> Tensor:
        """uint8 (k, C, H, W)."""
        out = torch.empty((len(index), *self.shape), dtype=torch.uint8)
        for row, i in enumerate(index.tolist()):
            out[row] = self._decode(self.files[i])
        return out

    def _decode(self, file: Path) -> Tensor:
        try:
            with Image.open(file) as opened:
                mode = opened.mode
                image = None if mode.startswith(DEEP) else flat(opened, self.shape[0])
        except Exception as error:  # decoders meet damaged files with errors of every kind
            raise _unreadable(file, error) from None
        if image is None:
            raise InputError(f"{file} has more than 8 bits a channel (mode {mode}): convert it to 8 bits")
        if self._colour_is_a_surprise and mode not in GREY:
            raise InputError(f"{file} is in colour, the others are grey: --set data.channels=3 (or 1)")
        pixels = np.array(_square(image, self.shape[1]))
        return torch.from_numpy(pixels).reshape(*pixels.shape[:2], self.shape[0]).permute(2, 0, 1)

    def _estimate(self) -> tuple[int, int]:
        """The most common side and the number of channels, from the headers of up to LOOKED_AT files."""
        order = torch.randperm(len(self), generator=stream(0, "data-look"))[:LOOKED_AT].tolist()
        sides, colour = Counter[int](), False
        for i in order:
            try:
                with Image.open(self.files[i]) as image:
                    sides[min(image.size)] += 1
                    colour = colour or image.mode not in GREY
            except Exception as error:
                raise _unreadable(self.files[i], error) from None
        most = max(sides.values())
        return max(side for side, count in sides.items() if count == most), 3 if colour else 1


class Array:
    """The images of an .npy file (read in parts) or of an .npz file (images or x; optional labels or y)."""

    def __init__(self, path: Path, config: "Images") -> None:
        self.path = path
        images, labels = _load_arrays(path, config.labels)
        self.images, self.channels_last = _laid_out(path, images)
        self.scale, self.dtype = _scale(path, self.images)
        classes: Classes = (None, ()) if labels is None else _classes_of(path, labels, len(images))
        self.labels, self.class_names = classes
        channels = self.images.shape[3 if self.channels_last else 1]
        height, width = self.images.shape[1:3] if self.channels_last else self.images.shape[2:]
        side = config.size or _capped(min(height, width))
        self.shape = (config.channels or channels, side, side)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: Tensor) -> Tensor:
        """(k, C, H, W)."""
        out = torch.empty((len(index), *self.shape), dtype=self.dtype)
        for row, i in enumerate(index.tolist()):
            pixels = np.asarray(self.images[i])
            pixels = np.moveaxis(pixels, 2, 0) if self.channels_last else pixels
            kind = np.uint8 if self.dtype == torch.uint8 else np.float32
            planes = [np.array(_square(Image.fromarray(plane.astype(kind)), self.shape[1])) for plane in pixels]
            image = torch.from_numpy(np.stack(planes))
            if len(image) > self.shape[0]:
                image = torch.einsum("c,chw->hw", LUMA, image.float())[None]
                image = image.round() if self.dtype == torch.uint8 else image
            if self.scale is not None:  # bicubic overshoots
                image = (image * self.scale[0] + self.scale[1]).clamp(-1, 1)
            out[row] = image  # broadcasts grey to colour
        return out


# -- folders -----------------------------------------------------------------------------------------------------------


def picture_files(root: Path) -> dict[str, str]:
    """The picture files under a folder: name from there, with slashes -> path.

    Links are followed, and each folder is entered once, by the first of its names: two links to a folder above would
    be without end. What is no regular file is no picture, and what is hidden is none either. A folder that cannot be
    read is an error: left out, a class would be missing and others be numbered otherwise.
    """
    found: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    waiting = [(str(root), "")]
    while waiting:
        folder, base = waiting.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted((e for e in os.scandir(folder) if not e.name.startswith(".")), key=lambda e: e.name)
            folders = [entry for entry in entries if entry.is_dir()]
            found |= {base + e.name: e.path for e in entries if e.name.lower().endswith(SUFFIXES) and e.is_file()}
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read ({error.strerror}): check its permissions") from None
        waiting += [(entry.path, f"{base}{entry.name}/") for entry in reversed(folders)]
    return found


# -- one image -------------------------------------------------------------------------------------------------------


def flat(opened: Image.Image, channels: int) -> Image.Image:
    """Upright as its EXIF says, over white where it is transparent, grey or in colour."""
    image = ImageOps.exif_transpose(opened)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def _square(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    left, upper = (width - short) // 2, (height - short) // 2
    return image.crop((left, upper, left + short, upper + short)).resize((side, side), Image.Resampling.BICUBIC)


def _capped(side: int) -> int:
    if side > MAX_SIDE:
        warnings.warn(
            f"images of side {side} are resized to {MAX_SIDE}: --set data.size={side} keeps them as they are",
            stacklevel=2,
        )
    return min(side, MAX_SIDE)


# -- arrays ----------------------------------------------------------------------------------------------------------


def _load_arrays(path: Path, want_labels: bool) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        loaded: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if want_labels:
                raise InputError(f"{path} holds no labels: save images= and labels= in an .npz file")
            return loaded, None
        with loaded as archive:
            size = sum(member.file_size for member in archive.zip.infolist())
            if size > MAX_BYTES:
                raise InputError(
                    f"{path} unpacks to {size / 2**30:.3g} GiB, the bound is {MAX_BYTES / 2**30:.3g}: save the images "
                    f"as an .npy file, which is read in parts, and --set data.limit=N"
                )
            images = archive[_member(path, archive.files, "images", "x")]
            return images, archive[_member(path, archive.files, "labels", "y")] if want_labels else None
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, SyntaxError) as error:
        raise _unreadable(path, error) from None


def _member(path: Path, names: list[str], *wanted: str) -> str:
    for name in wanted:
        if name in names:
            return name
    raise InputError(f"{path} holds {', '.join(names) or 'nothing'}: {wanted[0]} (or {wanted[1]}) is needed")


def _laid_out(path: Path, images: np.ndarray) -> tuple[np.ndarray, bool]:
    """(n, H, W, C) and True, or (n, C, H, W) and False."""
    _check_count(path, len(images) if images.ndim else 0, "images")
    if images.ndim == 3 and images.size:
        return images[:, None], False
    last, first = (images.ndim == 4 and images.size and images.shape[i] in (1, 3) for i in (3, 1))
    if last and first:
        raise InputError(
            f"{path} of shape {images.shape} can be read as channels first or last: save (n, H, W) or larger images"
        )
    if not last and not first:
        raise InputError(f"{path} has shape {images.shape}: (n, H, W), (n, H, W, C) or (n, C, H, W), C = 1 or 3")
    return images, bool(last)


def _scale(path: Path, images: np.ndarray) -> tuple[tuple[float, float] | None, torch.dtype]:
    """What takes the values to [−1, 1] (None: uint8 is kept), and the type they are kept in."""
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise InputError(f"{path} holds {images.dtype}: save uint8 in 0..255, or floats in [0, 1] or [−1, 1]")
    parts = [images[start : start + 256] for start in range(0, len(images), 256)]
    low, high = (float(bound([bound(part) for part in parts])) for bound in (np.min, np.max))  # NaN shows in both
    if not np.isfinite([low, high]).all():
        raise InputError(f"{path} holds NaN or infinite values: remove them")
    if images.dtype == np.uint8:
        if high <= 1:
            raise InputError(f"{path} holds uint8 that never exceeds 1: multiply by 255, or save floats in [0, 1]")
        return None, torch.uint8
    if low >= 0 and high <= 1:
        return (2.0, -1.0), torch.float32
    if -1 <= low <= -0.5 and high <= 1:
        return (1.0, 0.0), torch.float32
    raise InputError(
        f"{path} holds floats from {low:.6g} to {high:.6g}, neither [0, 1] nor [−1, 1] (smallest value −½ or less): "
        f"clip or rescale them, or save uint8"
    )


# -- classes ---------------------------------------------------------------------------------------------------------


def _classes_of_folders(path: Path, names: list[Path]) -> Classes:
    for name in names:
        if len(name.parts) < 2:
            raise InputError(
                f"labels=true takes the class from the subfolder, and {path / name} lies in none: move it into one, "
                f"or --set data.labels=false"
            )
    return _numbered(np.array([name.parts[0] for name in names]))


def _classes_of(path: Path, labels: np.ndarray, count: int) -> Classes:
    if labels.shape != (count,) or labels.dtype.kind not in "iuU":
        raise InputError(
            f"{path}: labels of shape {labels.shape} and type {labels.dtype} for {count} images: "
            f"one whole number or string an image is needed"
        )
    return _numbered(labels)


def _numbered(labels: np.ndarray) -> Classes:
    names, index = np.unique(labels, return_inverse=True)
    return torch.from_numpy(index.astype(np.int64)), tuple(map(str, names.tolist()))


def _check_count(path: Path, count: int, kind: str) -> None:
    if count < 2:
        raise InputError(f"{count} {kind} in {path.absolute()}, at least 2 are needed: --set data.path=FOLDER")


def _unreadable(file: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).replace(str(file), "it").split())
    return InputError(f"{file} cannot be read ({type(error).__name__}: {reason[:120]}): replace or remove it")
