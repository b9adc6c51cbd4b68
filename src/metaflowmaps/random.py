r"""Randomness is an argument.

Nothing in the package samples from the global generator: a function that needs noise takes ``generator=``, and a loop
that needs many independent streams names them. ``stream(seed, "train", step)`` is a generator that depends on its
name only, so a run that resumes at step 1,000 draws the very numbers that an uninterrupted one draws there.

**Row by row.** A sample should not depend on the batch that it was made in: ``RowNoise(seeds, *name)`` stands for one
stream a row, each a function of the row's own seed. Such streams must be computed for all rows at once and without
a loop, so they count instead of stepping: word i of a row is SplitMix64's i-th,

    w_i = mix(start + i · increment),    start, increment (odd) = mix(seed · golden + h)    (arithmetic modulo 2⁶⁴)

with two h from a hash of the stream's name, and each call beginning at a multiple of 2⁴⁰. Integers make the words the
same on every machine. Box–Muller turns one word (float64: two) into two normals, √(−2 log u) · (cos θ, sin θ).
"""

import hashlib
import math

import torch
from torch import Tensor

from metaflowmaps._shapes import check_plain
from metaflowmaps.errors import InputError, unknown


def stream(seed: int, *name: str | float) -> torch.Generator:
    """A CPU generator that is a pure function of (seed, *name)."""
    return torch.Generator().manual_seed(int.from_bytes(_digest(int(seed), *name)[:8], "little") >> 1)


def _digest(*name: str | float) -> bytes:
    return hashlib.sha256(repr(name).encode()).digest()


# -- row by row ------------------------------------------------------------------------------------------------------


class RowNoise:
    """A stream a row: what row i is given depends on (seeds[i], *name, how often it was asked before) alone.

    With ``mask`` (B, *event) normals are 0 where it is: padded samples get no noise there.
    """

    mask: Tensor | None = None

    def __init__(self, seeds: Tensor, *name: str | float) -> None:
        self.seeds, self.name, self.asked = seeds, name, 0
        digest, spread = _digest(*name), seeds * GOLDEN
        hashes = (int.from_bytes(part, "little", signed=True) for part in (digest[:8], digest[8:16]))
        self._start, increment = _mix(torch.stack([spread + h for h in hashes]))[..., None]
        self._increment = increment | 1

    def words(self, count: int, draws: int = 1) -> Tensor:
        """64 random bits each, of which fewer are the first of more: (draws, B, count) int64."""
        begin = self.asked * ASKING
        self.asked += 1
        counter = torch.arange(begin, begin + draws * count, device=self.seeds.device).reshape(draws, 1, count)
        return _mix((counter * self._increment).add_(self._start))

    def normal(
        self, event_shape: tuple[int, ...], draws: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Standard normals: (B, *event) or (draws, B, *event). Draw n is the same however many are asked for."""
        size = math.prod(event_shape)
        pairs = -(-size // 2)
        wide = dtype == torch.float64
        words = self.words(2 * pairs if wide else pairs, draws or 1)
        if wide:  # 53 bits each
            words.bitwise_right_shift_(11)
            angle = words[..., pairs:].to(dtype).mul_(math.pi * 2.0**-52)
            u = _open_unit(words[..., :pairs], 53, dtype)
        else:  # the lower 32 bits for the angle, the upper 31 for the radius
            angle = words.to(torch.int32).to(torch.float32).mul_(math.pi * 2.0**-31)
            u = _open_unit(words.bitwise_right_shift_(33), 31, torch.float32)
        radius = u.log_().mul_(-2).sqrt_()
        out = torch.empty(*words.shape[:2], 2 * pairs, dtype=u.dtype, device=u.device)
        torch.mul(radius, angle.cos(), out=out[..., :pairs])
        torch.mul(radius, angle.sin_(), out=out[..., pairs:])
        return self.masked(self._shaped(out[..., :size], event_shape, draws).to(dtype))

    def masked(self, normals: Tensor) -> Tensor:
        """Normals (…, B, *event) with 0 where rows are padded."""
        return normals if self.mask is None else normals * self.mask.to(normals)

    def uniform(
        self, event_shape: tuple[int, ...] = (), draws: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Uniform numbers on [0, 1): (B, *event) or (draws, B, *event)."""
        bits = 1 - round(math.log2(torch.finfo(dtype).eps))  # as many as the dtype has: none rounds up to 1
        words = self.words(math.prod(event_shape), draws or 1)
        wide = torch.promote_types(dtype, torch.float32)
        unit = (words >> (64 - bits)).bitwise_and_(2**bits - 1).to(wide).mul_(2.0**-bits)
        return self._shaped(unit, event_shape, draws).to(dtype)

    def integers(self, high: int) -> Tensor:
        """One of 0 … high − 1 a row, each as often as the others but for a share of high/2³²: (B,) int64."""
        words = self.words(1)[0, :, 0]
        return (words >> 32).bitwise_and_(2**32 - 1).mul_(high).bitwise_right_shift_(32)

    def generator(self) -> torch.Generator:
        """For what cannot draw row by row: a generator for all rows, which depends on the first one's seed."""
        made = stream(int(self.seeds[0]), *self.name, self.asked)
        self.asked += 1
        return made

    def _shaped(self, out: Tensor, event_shape: tuple[int, ...], draws: int | None) -> Tensor:
        return out.reshape(*(() if draws is None else (draws,)), len(self.seeds), *event_shape)


Source = torch.Generator | RowNoise


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


ASKING = 2**40  # more words than one call can want
GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(word: Tensor) -> Tensor:
    """SplitMix64's finalizer, in place; torch shifts the sign in, a mask takes it out again."""
    other = (word >> 30).bitwise_and_(2**34 - 1)
    word.bitwise_xor_(other).mul_(_FIRST)
    torch.bitwise_right_shift(word, 27, out=other)
    word.bitwise_xor_(other.bitwise_and_(2**37 - 1)).mul_(_SECOND)
    torch.bitwise_right_shift(word, 31, out=other)
    return word.bitwise_xor_(other.bitwise_and_(2**33 - 1))


def _open_unit(bits: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The lowest ``count`` bits as a number of (0, 1]: never 0, whose logarithm is asked for."""
    return bits.bitwise_and_(2**count - 1).to(dtype).add_(0.5).mul_(2.0**-count)


def fresh_seeds(count: int, generator: torch.Generator | None = None) -> Tensor:
    """count seeds >= 0, for which the generator is asked once; fewer are the first of more: (count,) int64."""
    one = torch.randint(2**62, (1,), generator=generator, device=generator.device if generator else "cpu")
    return RowNoise(one.cpu(), "seeds").words(count)[0, 0] & (2**63 - 1)


def copy_seeds(seeds: Tensor, copies: int) -> Tensor:
    """Seeds for copies of each row, whose first copy is the row itself: (copies · B,), copy m of row i at m·B + i."""
    if copies == 1:
        return seeds
    made = RowNoise(seeds, "copy").words(1, copies)[..., 0]
    made[0] = seeds
    return made.flatten()


def check_seeds(seeds: Tensor, count: int, each: str = "a sample") -> Tensor:
    """seeds, refused unless they are (count,) int64."""
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.shape != (count,):
        given = f"{seeds.dtype}, shape {tuple(seeds.shape)}" if isinstance(seeds, Tensor) else type(seeds).__name__
        raise InputError(
            f"seeds must be an int64 tensor of shape ({count},), one {each}, got {given}; e.g. torch.arange({count})"
        )
    check_plain(seeds, "seeds")
    return seeds


Seed = int | Tensor | torch.Generator | None


def as_seeds(seed: Seed, count: int, name: str, each: str = "a sample") -> Tensor:
    """Seeds of ``count`` samples: as given, or chosen by a number, a generator, or (None) the global one.

    Args:
        seed: (count,) int64, a whole number, a generator or None.
        count: how many.
        name: the purpose, for a number's stream.
        each: what has a seed, for messages.
    """
    if isinstance(seed, Tensor):
        return check_seeds(seed, count, each)
    if isinstance(seed, int) and not isinstance(seed, bool):
        return fresh_seeds(count, stream(seed, name))
    if seed is None or isinstance(seed, torch.Generator):
        return fresh_seeds(count, seed)
    raise InputError(f"seed is a whole number, a torch.Generator or an int64 tensor, got {type(seed).__name__}")


# -- either way ------------------------------------------------------------------------------------------------------


def randn(
    shape: tuple[int, ...],
    generator: Source | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise, drawn where the generator lives and moved to the device; None: left there."""
    if isinstance(generator, RowNoise):
        return _of_rows(generator, shape[0]).normal(shape[1:], None, dtype).to(device)
    return torch.randn(shape, generator=generator, dtype=dtype, device=_home(generator, device)).to(device)


def rand(
    shape: tuple[int, ...],
    generator: Source | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform noise on [0, 1), drawn where the generator lives and moved to the device; None: left there."""
    if isinstance(generator, RowNoise):
        return _of_rows(generator, shape[0]).uniform(shape[1:], None, dtype).to(device)
    return torch.rand(shape, generator=generator, dtype=dtype, device=_home(generator, device)).to(device)


def _home(generator: torch.Generator | None, device: torch.device | str | None) -> torch.device:
    """Where numbers are drawn: where the generator lives, or else where they are wanted."""
    if generator is None:
        return torch.device(device or "cpu")
    if not isinstance(generator, torch.Generator):
        raise InputError(
            f"generator must be a torch.Generator, got {type(generator).__name__}: torch.Generator().manual_seed(0)"
        )
    return generator.device


def _of_rows(noise: RowNoise, rows: int) -> RowNoise:
    if len(noise.seeds) != rows:
        raise InputError(f"noise for {len(noise.seeds)} rows was asked for {rows}: give one seed a row")
    return noise


NOISES = ("independent", "antithetic", "quasi")


def noise(
    kind: str,
    num_draws: int,
    like: Tensor,
    generator: Source | None = None,
) -> Tensor:
    """Noise for num_draws draws at each row of ``like``: (num_draws, B, *event), every draw N(0, Id) by itself.

    antithetic: ε and −ε in pairs. quasi: Sobol points, shifted by a uniform of their own for each row (modulo 1).
    """
    shape = (num_draws, *like.shape)

    def normals(draws: int) -> Tensor:
        if isinstance(generator, RowNoise):
            return _of_rows(generator, len(like)).normal(tuple(like.shape[1:]), draws, like.dtype).to(like.device)
        return randn((draws, *like.shape), generator, like.dtype, like.device)

    if kind == "independent":
        return normals(num_draws)
    if kind == "antithetic":
        half = normals(-(-num_draws // 2))
        return torch.cat([half, -half])[:num_draws]
    if kind == "quasi":
        dim = like[0].numel()
        if dim > torch.quasirandom.SobolEngine.MAXDIM:
            raise InputError(f"quasi-random noise has at most {torch.quasirandom.SobolEngine.MAXDIM} dimensions")
        points = torch.quasirandom.SobolEngine(dim).draw(num_draws, dtype=torch.float64)
        shift = rand((len(like), dim), generator, torch.float64, "cpu")
        uniform = (points[:, None] + shift).remainder(1.0).clamp(1e-12, 1 - 1e-12)
        normal: Tensor = torch.special.ndtri(uniform).reshape(shape).to(like)
        return generator.masked(normal) if isinstance(generator, RowNoise) else normal
    raise unknown("noise", kind, NOISES)
