"""Files of sequences: arrays (n, time, *event) with times or without, and folders of pictures, a frame each.

Each folder that holds pictures is a sequence, their frames in the order of the numbers in their names; frames are
square, in [−1, 1]. Where sequences are of different lengths the shorter ones end in NaN: what was not seen.
"""

import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metaflowmaps.data.limits import MAX_BYTES
from metaflowmaps.data.load import Images
from metaflowmaps.errors import InputError

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm")


class Timed(NamedTuple):
    """Sequences with the times at which they were seen."""

    values: Tensor  # (n, T, *event)
    times: Tensor  # (T,) or (n, T), increasing
    ends: Tensor  # (n,), how many of the T places each sequence has


def read_sequences(path: Path, size: int | None = None) -> Timed:
    """The sequences of a file or a folder, float32; times are sorted, paths of plain numbers get an axis.

    Args:
        path: an .npy or .npz, or a folder of frames.
        size: the side of frames; None: their own, at most 64.
    """
    if path.is_dir():
        return stacked(_frames(path, size), str(path))
    held = _arrays(path)
    if "values" not in held:
        raise InputError(f"{path} holds {', '.join(held) or 'nothing'}: call the array (n, time, …) values")
    values = torch.from_numpy(held["values"]).float()
    if values.ndim == 1:
        values = values[None]
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim < 3 or min(values.shape) < 1 or values.shape[1] < 2:
        raise InputError(f"{path} holds {tuple(values.shape)}: an array (n, time, …) of two times or more is needed")
    ends = torch.from_numpy(held.get("ends", np.full(len(values), values.shape[1]))).long()
    if "times" not in held:
        return Timed(values, torch.arange(float(values.shape[1])), ends)
    times, order = _times(held["times"], values, path).sort(-1)
    values = values[:, order] if times.ndim == 1 else values[torch.arange(len(values))[:, None], order]
    if bool((times.diff(dim=-1) <= 0).any()):
        raise InputError(f"{path}: two values of one path have the same time: keep one of them")
    if bool((times.float().diff(dim=-1) <= 0).any()):
        raise InputError(f"{path}: float32 does not tell all times apart: count them from the first, in larger units")
    return Timed(values, times.float(), ends)


def stacked(sequences: Iterable[Tensor], source: str) -> Timed:
    """Sequences (T_i, *event) of one event shape as one array; the shorter ones end in NaN.

    Args:
        sequences: one after the other; they are read once, and no more than fits.
        source: what a message calls them.
    """
    held: list[Tensor] = []
    size = 0
    for sequence in sequences:
        one = _as_sequence(sequence, f"{source}: sequence {len(held)}")
        if not one.numel() or (held and one.shape[1:] != held[0].shape[1:]):
            first = f" after one of {tuple(held[0].shape)}" if held else ""
            raise InputError(
                f"{source}: sequence {len(held)} has shape {tuple(one.shape)}{first}: give (time, *event), events alike"
            )
        size += 4 * one.numel()
        if size > MAX_BYTES:
            raise InputError(
                f"{source}: {len(held):,} sequences take {MAX_BYTES / 2**30:.3g} GiB, and there are more: give fewer"
            )
        held.append(one)
    length = max(map(len, held), default=0)
    if length < 2:
        raise InputError(f"{source} holds {len(held)} sequences, the longest of {length} times: two times are needed")
    values = torch.full((len(held), length, *held[0].shape[1:]), torch.nan)
    for row, one in zip(values, held, strict=True):
        row[: len(one)] = one
    return Timed(values, torch.arange(float(length)), torch.tensor([len(one) for one in held]))


def _as_sequence(given: Tensor, name: str) -> Tensor:
    """(time, *event), float32."""
    try:
        one = torch.as_tensor(given).detach().cpu().float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is no array of numbers ({error}): give (time, *event)") from None
    if not one.ndim:
        raise InputError(f"{name} is a number: give (time, *event)")
    return one[:, None] if one.ndim == 1 else one


def _frames(path: Path, size: int | None) -> Iterator[Tensor]:
    """The sequences of a folder of folders of pictures, each (T, C, H, W)."""
    from metaflowmaps.data.pictures import Folder  # brings Pillow

    for file in sorted(path.iterdir()):
        if file.suffix.lower() in VIDEOS:
            raise InputError(_unpack(file))
    reader = Folder(path, Images(path=str(path), size=size))
    sequences: dict[Path, list[int]] = {}
    for place, file in enumerate(reader.files):
        sequences.setdefault(file.parent, []).append(place)
    for places in sequences.values():
        places.sort(key=lambda place: _numbers(reader.files[place].name))
        yield reader.read(torch.tensor(places)).float() / 127.5 - 1


def _numbers(name: str) -> list[tuple[int, str]]:
    """What sorts frame-2 before frame-10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _unpack(video: Path) -> str:
    return f"{video} is a video: make a folder of its frames, ffmpeg -i {video.name} {video.stem}/%05d.png"


def _times(given: np.ndarray, values: Tensor, path: Path) -> Tensor:
    times = torch.from_numpy(given).double()
    if times.shape not in (values.shape[:2], values.shape[1:2]) or not bool(times.isfinite().all()):
        raise InputError(
            f"{path}: times must be finite, ({values.shape[1]},) or {tuple(values.shape[:2])}, got {tuple(times.shape)}"
        )
    return times


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name, float64."""
    if path.suffix.lower() in VIDEOS:
        raise InputError(_unpack(path))
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                return {name: np.asarray(file[name], dtype=np.float64) for name in file.files}
        return {"values": np.asarray(np.load(path), dtype=np.float64)}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read ({error}): give an .npy or .npz of numbers (n, time, …)") from None
