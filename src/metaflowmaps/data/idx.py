r"""MNIST's IDX files, read strictly: whatever is wrong is one line that names the file.

An IDX file is big-endian: two zero bytes, the type (8: unsigned byte), the number of dimensions, one 32-bit size per
dimension, then the values and nothing after them. Gzip is told by its first bytes, not by the file's name.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from metaflowmaps.data.limits import MAX_BYTES
from metaflowmaps.errors import InputError

PARTS = ("train", "t10k")
REMEDY = "fetch the file again, or choose another folder with --set data.path=FOLDER"


def read_mnist(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The parts that the folder holds: name -> images (n, 1, H, W) uint8, labels (n,) int64."""
    found = {}
    for part in PARTS:
        file = _find(folder, f"{part}-images", 3)
        if file is None:
            continue
        labels_file = _find(folder, f"{part}-labels", 1)
        if labels_file is None:
            raise InputError(
                f"{file} has no labels beside it: put {part}-labels-idx1-ubyte (or .gz) into {file.parent}, "
                f"or choose another folder with --set data.path=FOLDER"
            )
        images, labels = read_idx(file, 3), read_idx(labels_file, 1)
        if len(images) != len(labels):
            raise _damaged(labels_file, f"{len(labels):,} labels for the {len(images):,} images of {file.name}")
        if labels.max() > 9:
            raise _damaged(labels_file, f"holds the label {int(labels.max())}, MNIST's are 0 to 9")
        found[part] = images[:, None], labels.long()
    if not found:
        raise InputError(
            f"no MNIST images in {folder.absolute()}: looked for train-images-idx3-ubyte and t10k-images-idx3-ubyte, "
            f"with and without .gz: --set data.path=FOLDER"
        )
    return found


def read_idx(file: Path, dims: int) -> Tensor:
    """The unsigned bytes of an IDX file with so many dimensions."""
    try:
        with file.open("rb") as raw:
            compressed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not compressed:
                return _parse(file, raw, dims)
            with gzip.GzipFile(fileobj=raw) as stream:
                return _parse(file, stream, dims)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(file, f"damaged gzip ({error})") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error}): --set data.path=FOLDER") from None


def _parse(file: Path, stream: BinaryIO | gzip.GzipFile, dims: int) -> Tensor:
    header = stream.read(4 + 4 * dims)
    if len(header) < 4 + 4 * dims:
        raise _damaged(file, f"truncated within its header ({len(header)} bytes)")
    magic = bytes((0, 0, 8, dims))
    if header[:4] != magic:
        raise _damaged(file, f"not IDX bytes in {dims} dimensions (begins {header[:4].hex()}, not {magic.hex()})")
    shape = struct.unpack(f">{dims}I", header[4:])
    size = math.prod(shape)
    if size == 0 or size > MAX_BYTES:
        raise _damaged(file, f"impossible dimensions {'×'.join(map(str, shape))}")
    content = stream.read(size + 1)  # one more: whatever follows is an error, and gzip checks its sum at the end
    if len(content) != size:
        fault = "truncated" if len(content) < size else "trailing bytes"
        raise _damaged(file, f"{fault} ({'×'.join(map(str, shape))} declared, {size:,} bytes)")
    return torch.from_numpy(np.frombuffer(bytearray(content), np.uint8).reshape(shape))


def _find(folder: Path, stem: str, dims: int) -> Path | None:
    names = (f"{stem}{mark}idx{dims}-ubyte{end}" for mark in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _damaged(file: Path, what: str) -> InputError:
    return InputError(f"{file.absolute()}: {what}: {REMEDY}")
