"""Noise row by row: the published generator, a function of its row alone, and as random as it must be.

Statistical bounds are at z = 4.5 to 5.5 for fixed seeds and names: each test says how many numbers it looks at.
"""

import math

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, ks_bound, ks_distance
from metaflowmaps.random import (
    GOLDEN,
    RowNoise,
    _mix,
    _open_unit,
    check_seeds,
    copy_seeds,
    fresh_seeds,
    noise,
    rand,
    randn,
    stream,
)

DTYPES = [torch.float32, F64, torch.bfloat16]
KINDS = ("independent", "antithetic", "quasi")


def unsigned(words):
    return [int(w) % 2**64 for w in words.flatten()]


def test_the_words_are_splitmix64s():
    """The published sequence from state 1234567, whose increment is the golden one."""
    states = torch.tensor([1234567]) + GOLDEN * torch.arange(1, 6)
    assert unsigned(_mix(states)) == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_words_by_hand():
    """start + i · increment in integers of any size, and the finalizer by its definition."""

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    seeds = torch.tensor([0, 5, -3, 2**63 - 1])
    source = RowNoise(seeds, "by hand", 7)
    start, increment = (unsigned(v) for v in (source._start, source._increment))
    assert all(k % 2 == 1 for k in increment)  # else the sequence would miss states
    assert len(set(start + increment)) == 8
    for asked in range(3):
        words = source.words(3, 2)  # (draws, B, count)
        for n in range(2):
            for b in range(4):
                expected = [mix((start[b] + (asked * 2**40 + 3 * n + i) * increment[b]) % 2**64) for i in range(3)]
                assert unsigned(words[n, b]) == expected


# -- a function of its row -------------------------------------------------------------------------------------------


def ask(seeds, dtype, event=(5,), draws=3, name=("x",)):
    """Two calls of each kind."""
    made = []
    for method in ("normal", "uniform"):
        source = RowNoise(seeds, *name, method)
        made += [getattr(source, method)(event, draws, dtype), getattr(source, method)(event, draws, dtype)]
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("event", [(1,), (2,), (3, 5, 7), ()])
def test_a_row_does_not_depend_on_its_batch(dtype, event):
    """Bit for bit, for batches that end anywhere: no vector unit may treat its last elements otherwise."""
    seeds = fresh_seeds(150, stream(0))
    whole = ask(seeds, dtype, event)
    for begin, end in ((0, 1), (149, 150), (3, 7), (20, 41), (64, 150)):
        for all_rows, rows in zip(whole, ask(seeds[begin:end], dtype, event), strict=True):
            assert torch.equal(rows, all_rows[:, begin:end])
    order = torch.randperm(150, generator=stream(1))
    for all_rows, rows in zip(whole, ask(seeds[order], dtype, event), strict=True):
        assert torch.equal(rows, all_rows[:, order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_are_the_first_of_more(dtype):
    seeds = torch.arange(6)
    for few, many in zip(ask(seeds, dtype, draws=2), ask(seeds, dtype, draws=9), strict=True):
        assert torch.equal(few, many[:2])
    one = RowNoise(seeds, "x").normal((5,), None, dtype)
    assert torch.equal(one, RowNoise(seeds, "x").normal((5,), 4, dtype)[0])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_an_odd_number_of_normals_are_the_first_of_one_more(dtype):
    """A word, or two, make a pair of normals, of which the last is left out."""
    odd, even = (RowNoise(torch.arange(5), "odd").normal((size,), dtype=dtype) for size in (3, 4))
    assert torch.equal(odd, even[:, :3])


def test_normals_in_float64_are_no_rounded_ones():
    """One of 53 bits is a float32 by a chance of 2^−29."""
    z = RowNoise(torch.arange(50), "wide").normal((20,), dtype=F64)
    assert bool((z != z.float()).all())


def test_seed_name_and_call_all_matter():
    seeds = torch.tensor([0, 1, 2**40, -1])
    made = [x[0] for name in (("x",), ("y",), ("x", 0.5), ("x", 1)) for x in ask(seeds, F64, name=name)]
    values = torch.cat([x.flatten() for x in made])
    assert len(values.unique()) == len(values)
    for again, before in zip(ask(seeds, F64), ask(seeds, F64), strict=True):
        assert torch.equal(again, before)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_every_kind_is_row_by_row(kind):
    seeds, like = fresh_seeds(40, stream(0)), torch.empty(40, 3, 2, dtype=F64)
    whole = noise(kind, 5, like, RowNoise(seeds, "draws"))
    assert whole.shape == (5, 40, 3, 2)
    part = noise(kind, 5, like[7:19], RowNoise(seeds[7:19], "draws"))
    assert torch.equal(part, whole[:, 7:19])
    if kind != "antithetic":  # its second half mirrors the first
        assert torch.equal(noise(kind, 3, like, RowNoise(seeds, "draws")), whole[:3])
    else:
        assert torch.equal(whole[3:], -whole[:2])


def test_other_functions_take_it_as_a_generator():
    seeds = torch.arange(4)
    assert torch.equal(randn((4, 2, 3), RowNoise(seeds, "a"), F64), RowNoise(seeds, "a").normal((2, 3), dtype=F64))
    assert torch.equal(rand((4,), RowNoise(seeds, "a")), RowNoise(seeds, "a").uniform())
    for wrong in (
        lambda s: randn((3, 2), s),
        lambda s: rand((3,), s),
        lambda s: noise("quasi", 2, torch.ones(3, 2), s),
    ):
        with pytest.raises(mfm.InputError, match="noise for 4 rows was asked for 3"):
            wrong(RowNoise(seeds, "a"))


def test_a_generator_for_what_is_not_row_by_row():
    """A function of the first seed, of the name and of the call."""
    seeds = torch.tensor([3, 4])

    def numbers(seeds, name, calls=1):
        source = RowNoise(seeds, name)
        return [torch.rand(2, generator=source.generator()).tolist() for _ in range(calls)][-1]

    assert numbers(seeds, "a") == numbers(seeds[:1], "a")
    others = [numbers(seeds, "a"), numbers(seeds[1:], "a"), numbers(seeds, "b"), numbers(seeds, "a", 2)]
    assert len({tuple(pair) for pair in others}) == 4


# -- seeds -----------------------------------------------------------------------------------------------------------


def test_fresh_seeds():
    g, h = stream(3), stream(3)
    many, few = fresh_seeds(100_000, g), fresh_seeds(5, h)
    assert torch.equal(few, many[:5])
    assert torch.equal(g.get_state(), h.get_state())  # asked once, however many
    assert many.dtype == torch.int64
    assert int(many.min()) >= 0
    assert len(many.unique()) == len(many)
    assert not (fresh_seeds(5, g) == few).any()


def test_copies_have_seeds_of_their_own():
    """Copy m of row i at m·B + i; the first copy is the row."""
    seeds = torch.arange(1000)
    made = copy_seeds(seeds, 8)
    assert torch.equal(made[:1000], seeds)
    assert torch.equal(copy_seeds(seeds, 3), made[:3000])
    assert torch.equal(copy_seeds(seeds[10:20], 8), made.reshape(8, 1000)[:, 10:20].flatten())
    assert len(made.unique()) == 8000
    assert copy_seeds(seeds, 1) is seeds


@pytest.mark.parametrize(
    "wrong", [[1, 2], torch.arange(3), torch.ones(2), torch.arange(2).int(), torch.ones(2, 1).long()]
)
def test_wrong_seeds(wrong):
    with pytest.raises(mfm.InputError, match=r"seeds must be an int64 tensor of shape \(2,\), one a sample") as caught:
        check_seeds(wrong, 2)
    assert "\n" not in str(caught.value)


# -- how random ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("event", [(1,), (64,)])
def test_normals_are_normal(dtype, event):
    """2 M numbers of consecutive seeds: distribution at level 1e-5, four moments, and tails."""
    n = 2**21
    x = RowNoise(torch.arange(n // event[0]), "law").normal(event, dtype=dtype).flatten().double()
    one = torch.ones(1, dtype=F64)
    for part in (x, x[: n // 2], x[::7]):
        assert ks_distance(part, 0 * one, one, one) < ks_bound(len(part), 1e-5)
    # Var[x^k] = E[x^2k] − E[x^k]²: 1, 2, 15, 96; 4.5 standard errors
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - mean) < 4.5 * math.sqrt(variance / n)
    for bound in (3.0, 4.0, 4.4):  # 5,662, 133 and 23 are expected
        expected = n * math.erfc(bound / math.sqrt(2))
        assert abs(int((x.abs() > bound).sum()) - expected) < 4.5 * math.sqrt(expected)
    assert float(x.abs().max()) < (6.7 if dtype == torch.float32 else 8.7)  # √(2 · 32 log 2), √(2 · 54 log 2)


def test_no_logarithm_of_zero():
    """All bits of the radius 0, and all 1."""
    ends = torch.tensor([0, -1])
    for bits, dtype in ((31, torch.float32), (53, F64)):
        u = _open_unit(ends.clone(), bits, dtype)
        assert 0 < float(u[0]) < float(u[1]) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniforms_are_uniform(dtype):
    n = 2**20
    x = RowNoise(torch.arange(n // 16), "law").uniform((16,), dtype=dtype).flatten()
    assert x.dtype == dtype
    assert float(x.min()) >= 0
    assert float(x.max()) < 1
    steps = torch.arange(n + 1, dtype=F64) / n
    ordered = x.double().sort().values
    distance = torch.maximum((ordered - steps[:-1]).abs(), (ordered - steps[1:]).abs()).max()
    grid = torch.finfo(dtype).eps / 2
    assert float(distance) < ks_bound(n, 1e-5) + grid


def rows_of(what, count=256, width=4096, dtype=torch.float32):
    """count rows that differ in one thing only."""
    if what == "seed":
        return RowNoise(torch.arange(count), "x").normal((width,), dtype=dtype)
    if what == "far seed":  # they differ in one bit each, the others in the lowest
        return RowNoise(2 ** torch.arange(63), "x").normal((width,), dtype=dtype)
    if what == "copy":
        return RowNoise(copy_seeds(torch.tensor([5]), count), "x").normal((width,), dtype=dtype)
    if what == "draw":
        return RowNoise(torch.tensor([5]), "x").normal((width,), count, dtype)[:, 0]
    if what == "call":
        source = RowNoise(torch.tensor([5]), "x")
        return torch.cat([source.normal((width,), dtype=dtype) for _ in range(count)])
    return torch.cat([RowNoise(torch.tensor([5]), "x", k).normal((width,), dtype=dtype) for k in range(count)])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("what", ["seed", "far seed", "copy", "draw", "call", "name"])
def test_rows_are_independent(what, dtype):
    """Correlations of all pairs of rows, of their squares and of one row shifted against another.

    Each is N(0, 1/4096): 32,640 pairs, three times, beyond 5.5 standard errors in 4e-3 of all seeds.
    """
    x = rows_of(what, dtype=dtype).double()
    assert len(torch.unique(x, dim=0)) == len(x)
    root = math.sqrt(x.shape[1])
    square = (x.square() - 1) / math.sqrt(2)
    pairs = torch.ones(len(x), len(x)).triu(1).bool()
    for a, b in ((x, x), (square, square), (x, x.roll(1, 1))):
        assert float((a @ b.T / root)[pairs].abs().max()) < 5.5


def test_numbers_of_a_row_are_independent():
    """Within a row: cosine and sine of a pair, neighbours, and elements a power of two apart; 4 M products each."""
    x = RowNoise(torch.arange(4096), "row").normal((1024,)).double()
    for lag in (1, 2, 3, 16, 256, 512):  # 512: the other one of the pair
        for y in (x, x.square() - 1):
            product = y[:, lag:] * y[:, :-lag]
            assert abs(float(product.mean())) < 4.5 * float(product.std()) / math.sqrt(product.numel())


def test_every_bit_is_a_coin():
    """Of 2^18 words, bit by bit and for all pairs of bits; and a seed's bit turned over turns half of the bits."""

    def bits(words):
        return ((words[..., None] >> torch.arange(64)) & 1).double()

    n = 2**18
    coins = 2 * bits(RowNoise(torch.arange(n // 64), "bits").words(64).flatten()) - 1
    assert float(coins.mean(0).abs().max()) < 4.5 / math.sqrt(n)
    gram = coins.T @ coins / n - torch.eye(64)
    assert float(gram.abs().max()) < 5 / math.sqrt(n)  # 2,016 pairs beyond 5 standard errors: 1e-3
    seeds = fresh_seeds(4096, stream(0))
    base = bits(RowNoise(seeds, "x").words(1)[0, :, 0])
    for k in range(0, 63, 3):
        turned = (bits(RowNoise(seeds ^ 2**k, "x").words(1)[0, :, 0]) != base).double()
        assert float((turned.mean(0) - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(4096)


def test_no_word_comes_twice():
    """2^20 of 2^64: two would be equal by chance in 3e-8 of all seeds."""
    words = RowNoise(torch.arange(2**10), "x").words(2**7, 8)
    assert len(words.flatten().unique()) == 2**20
