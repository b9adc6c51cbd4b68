"""Randomness is an argument.

Nothing in the package samples from the global generator: a function that needs noise takes ``generator=``, and a loop
that needs many independent streams names them. ``stream(seed, "train", step)`` is a generator that depends on its
name only, so a run that resumes at step 1,000 draws the very numbers that an uninterrupted one draws there.
"""

import hashlib

import torch
from torch import Tensor

from metaflowmaps.errors import InputError, unknown


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


NOISES = ("independent", "antithetic", "quasi")


def noise(
    kind: str,
    num_draws: int,
    like: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noise for num_draws draws at each row of ``like``: (num_draws, B, *event), every draw N(0, Id) by itself.

    antithetic: ε and −ε in pairs. quasi: Sobol points, shifted by a uniform of their own for each row (modulo 1).
    """
    shape = (num_draws, *like.shape)
    if kind == "independent":
        return randn(shape, generator, like.dtype, like.device)
    if kind == "antithetic":
        half = randn((-(-num_draws // 2), *like.shape), generator, like.dtype, like.device)
        return torch.cat([half, -half])[:num_draws]
    if kind == "quasi":
        dim = like[0].numel()
        if dim > torch.quasirandom.SobolEngine.MAXDIM:
            raise InputError(f"quasi-random noise has at most {torch.quasirandom.SobolEngine.MAXDIM} dimensions")
        points = torch.quasirandom.SobolEngine(dim).draw(num_draws, dtype=torch.float64)
        shift = rand((len(like), dim), generator, torch.float64)
        uniform = (points[:, None] + shift).remainder(1.0).clamp(1e-12, 1 - 1e-12)
        normal: Tensor = torch.special.ndtri(uniform)
        return normal.reshape(shape).to(like)
    raise unknown("noise", kind, NOISES)
