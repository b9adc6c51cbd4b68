"""Samples on disk: what commands that draw write, and how they are read again.

``samples.safetensors`` (or ``samples.npz``, of ``--format npz``) holds samples (n, *event), their seeds (n,) and, where
they were steered, their rewards (n,); ``draws.*`` of ``mfm posterior`` holds draws in their place. Pictures are in
[−1, 1], channels first.
"""

import io
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from metaflowmaps._files import check_regular, write_tensors, write_whole
from metaflowmaps.errors import InputError, check_one_of

FORMATS = ("safetensors", "npz")
NAMES = tuple(f"{what}.{ending}" for what in ("samples", "draws") for ending in FORMATS)  # as they are looked for


class SavedSamples(NamedTuple):
    """Samples that were read from a file.

    Args:
        samples: (n, *event).
        seeds: (n,) int64, with which ``--only`` makes a sample again; None in a file that holds none.
        rewards: (n,), strength included; None where samples were not steered.

    Examples:
        >>> saved = mfm.SavedSamples(torch.zeros(3, 2), seeds=None, rewards=torch.zeros(3))
        >>> saved.samples.shape
        torch.Size([3, 2])
    """

    samples: Tensor
    seeds: Tensor | None
    rewards: Tensor | None


def write_samples(folder: Path, name: str, tensors: Mapping[str, Tensor], form: str) -> None:
    """Write ``name.form`` into a folder, whole or not at all.

    Args:
        folder: where.
        name: samples or draws.
        tensors: what it holds.
        form: one of :data:`FORMATS`.
    """
    check_one_of("format", form, FORMATS)
    if form == "safetensors":
        write_tensors(folder / f"{name}.safetensors", tensors)
        return
    encoded = io.BytesIO()
    np.savez(encoded, **{key: _array(value) for key, value in tensors.items()})  # type: ignore[arg-type]
    write_whole(folder / f"{name}.npz", encoded.getvalue())


def load_samples(path: str | PathLike[str]) -> SavedSamples:
    """The samples that ``mfm sample``, ``steer`` or ``posterior`` wrote, or :meth:`SteerResult.save`.

        samples, seeds, rewards = mfm.load_samples("runs/digits-steer-mfm-gf")

    Args:
        path: the folder of the command's results, its results.json, or a file of samples.

    Returns:
        Tensors on the CPU: samples (n, *event), seeds (n,) and rewards (n,), the last two None where there are none.

    Examples:
        >>> import tempfile, pathlib
        >>> model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-2.0, 0.0], [2.0, 0.0]], 0.25))
        >>> result = mfm.steer(model, lambda x: x[:, 0], 8, mfm.Unsteered(), mfm.ODE(steps=5), seed=0)
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "samples.safetensors"
        >>> result.save(file)
        >>> samples, seeds, rewards = mfm.load_samples(file)
        >>> samples.shape, seeds.shape, rewards.shape
        (torch.Size([8, 2]), torch.Size([8]), torch.Size([8]))
    """
    file = _found(Path(path).expanduser())
    try:
        check_regular(file)
        held = _read_npz(file) if file.suffix == ".npz" else load_file(file)
    except (SafetensorError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{file} cannot be read as samples ({type(error).__name__}): {_HINT}") from None
    samples = held.get("samples", held.get("draws"))
    if samples is None:
        raise InputError(f"{file} holds no samples, but {', '.join(sorted(held)) or 'nothing'}: {_HINT}")
    return SavedSamples(samples, held.get("seeds"), held.get("rewards"))


_HINT = "give the folder or the file that mfm sample, steer or posterior wrote"


def _found(path: Path) -> Path:
    """The file of samples that a path means."""
    folder = path.parent if path.name == "results.json" else path
    if not folder.is_dir():
        if not path.exists():
            raise InputError(f"there is no {path}: {_HINT}")
        return path
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder} holds none of {', '.join(NAMES)}: {_HINT}")


def _read_npz(file: Path) -> dict[str, Tensor]:
    with np.load(file, allow_pickle=False) as held:
        return {name: torch.from_numpy(np.ascontiguousarray(held[name])) for name in held.files}


def _array(value: Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.generic]]":
    """A tensor as numpy has it, which knows no bfloat16."""
    value = value.detach().cpu()
    array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]
    array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return array
