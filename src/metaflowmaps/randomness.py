"""Randomness is an argument.

Nothing in the package samples from the global generator: a function that needs noise takes ``generator=``, and a loop
that needs many independent streams names them. ``stream(seed, "train", step)`` is a generator that depends on its
name only, so a run that resumes at step 1,000 draws the very numbers that an uninterrupted one draws there.
"""

import hashlib

import torch
from torch import Tensor


def stream(seed: int, *name: str | int) -> torch.Generator:
    """A CPU generator that is a pure function of (seed, *name)."""
    text = repr((int(seed), *name)).encode()
    digest = hashlib.sha256(text).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def randn(
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise, drawn where the generator lives and moved to the device."""
    source = generator.device if generator is not None else torch.device(device)
    return torch.randn(shape, generator=generator, dtype=dtype, device=source).to(device)


def rand(
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform noise on [0, 1), drawn where the generator lives and moved to the device."""
    source = generator.device if generator is not None else torch.device(device)
    return torch.rand(shape, generator=generator, dtype=dtype, device=source).to(device)
