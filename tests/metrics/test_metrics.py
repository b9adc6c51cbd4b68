"""Metrics against closed forms, and a two-sample test that keeps its level and has power."""

import math

import pytest
import torch

from metaflowmaps.errors import InputError
from metaflowmaps.metrics import energy_distance, mmd_squared, sliced_w2, two_sample_test
from metaflowmaps.metrics.kernels import energy_kernel, median_distance, rbf_kernel
from metaflowmaps.metrics.sliced_w2 import Curves, curves, directions
from metaflowmaps.random import stream


def normal(n: int, dim: int, *name) -> torch.Tensor:
    return torch.randn(n, dim, generator=stream(0, "metrics", *name))


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_sliced_w2_of_a_shift(dim):
    """A shift by c: W2 along d is |d·c| exactly, sample by sample; the mean of (d·c)² over directions is |c|²/dim."""
    x, c = normal(500, dim, "shift", dim), torch.full((dim,), 0.7)
    expected = math.sqrt(float((directions(dim) @ c).square().mean()))
    assert sliced_w2(x, x + c) == pytest.approx(expected, rel=1e-5)
    if dim == 2:
        assert expected == pytest.approx(math.sqrt(0.49 * 2 / 2), rel=1e-6)  # equal angles: exactly |c|²/2


def test_directions_of_the_plane_are_a_half_circle():
    """No line twice: angles i π/64, to roundings of float32."""
    angle = torch.atan2(directions(2)[:, 1], directions(2)[:, 0])
    torch.testing.assert_close(angle, torch.arange(64) * (math.pi / 64), rtol=1e-6, atol=1e-7)


def test_sliced_w2_of_a_scaling():
    """N(0, 1) against N(0, 4): W2 = 1. At n = 20,000 the sampling error of W2 is about 0.01; allow five times it."""
    assert sliced_w2(normal(20_000, 1, "a"), 2 * normal(20_000, 1, "b")) == pytest.approx(1.0, abs=0.05)


def test_sliced_w2_of_unequal_sizes():
    """Repeating every point changes no quantile function."""
    x, y = normal(60, 2, "u"), normal(90, 2, "v")
    repeated = sliced_w2(x.repeat(3, 1), y.repeat(2, 1))
    assert sliced_w2(x, y) == pytest.approx(repeated, rel=1e-6)
    assert sliced_w2(x, x.repeat(2, 1)) == pytest.approx(0.0, abs=1e-7)
    with pytest.raises(InputError, match="event shape"):
        sliced_w2(x, normal(10, 3, "w"))


def test_all_pairs_formula():
    """Curves' means over pairs equal the mean of sliced_w2² over every pair, computed one by one."""
    along = directions(2)
    here = [normal(200, 2, "here", i) for i in range(5)]
    there = [normal(200, 2, "there", i) + 0.3 for i in range(4)]
    a, b = Curves(), Curves()
    for sets, collected in ((here, a), (there, b)):
        for x in sets:
            collected.add(curves(x, along))
    pairs = [sliced_w2(x, y) ** 2 for x in here for y in there]
    assert a.squared_distance(b) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    own = [sliced_w2(x, y) ** 2 for i, x in enumerate(here) for j, y in enumerate(here) if i != j]
    assert a.floor() == pytest.approx(sum(own) / len(own), rel=1e-5)


def test_mmd_of_two_normals():
    """One Gaussian kernel, N(0,1) against N(m,1): E MMD² = 2h/√(h²+2) (1 − exp(−m²/(2(h²+2)))); 4 standard errors."""
    h, m, sets = 1.3, 0.8, 40
    exact = 2 * h / math.sqrt(h**2 + 2) * (1 - math.exp(-(m**2) / (2 * (h**2 + 2))))
    kernel = rbf_kernel(h, (1.0,))
    from metaflowmaps.metrics.kernels import _discrepancy

    def mean_of(shift: float) -> tuple[float, float]:
        values = torch.tensor(
            [_discrepancy(normal(300, 1, "m", i), normal(300, 1, "n", i) + shift, kernel) for i in range(sets)]
        )
        return float(values.mean()), float(values.std()) / math.sqrt(sets)

    mean, error = mean_of(m)
    assert abs(mean - exact) < 4 * error
    assert error < 0.05 * exact
    null, error = mean_of(0.0)
    assert abs(null) < 4 * error  # unbiased: 0 under the null, where the biased form has 2(1 − E k)/n ≈ 0.003
    assert error < 0.0008


def test_energy_distance_of_two_normals():
    """N(0,1) against N(m,1) on the line: 2E|X−Y| − E|X−X'| − E|Y−Y'| by the folded normal; 4 standard errors."""
    m, s, sets = 1.0, math.sqrt(2.0), 40
    phi = math.exp(-(m**2) / (2 * s**2)) * s * math.sqrt(2 / math.pi)
    folded = phi + m * math.erf(m / (s * math.sqrt(2)))
    exact = 2 * folded - 2 * s * math.sqrt(2 / math.pi)
    values = torch.tensor([energy_distance(normal(300, 1, "p", i), normal(300, 1, "q", i) + m) for i in range(sets)])
    error = float(values.std()) / math.sqrt(sets)
    assert abs(float(values.mean()) - exact) < 4 * error
    assert error < 0.05 * exact
    assert float(energy_kernel(torch.tensor(4.0))) == -2.0


def test_distances_of_float32_are_those_of_float64():
    """Distances of one law are differences of sums of 2,000² terms of about 1, which must not be summed in float32.

    The terms themselves round by 6e-8, each by itself: 1e-10 was seen here, and 7e-8 by sums in float32.
    """
    x, y = normal(2000, 2, "here"), normal(2000, 2, "there")
    assert energy_distance(x, y) == pytest.approx(energy_distance(x.double(), y.double()), abs=3e-9)


@pytest.mark.parametrize("h", [0.5, 2.0])
def test_mmd_by_hand(h):
    """{0, 1} against {0, 2}, scales 1/4 to 4: k(1) + k(2) − (k(0) + k(2) + 2 k(1))/2, to roundings of float64."""

    def k(distance):
        return sum(math.exp(-(distance**2) / (2 * (h * 2.0**s) ** 2)) for s in range(-2, 3)) / 5

    x, y = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[0.0], [2.0]]).double()
    assert mmd_squared(x, y, h) == pytest.approx(k(1) + k(2) - (1 + k(2) + 2 * k(1)) / 2, abs=1e-15)
    for wrong in (0.0, -1.0):
        with pytest.raises(InputError, match="bandwidth must be positive"):
            mmd_squared(x, y, wrong)


@pytest.mark.parametrize("n", [49, 50, 99, 500])
def test_the_bandwidth_looks_at_no_more_pairs_than_its_limit(n, monkeypatch):
    """Memory grows as the square of what is looked at; of many points it is every so-manieth, not the first ones."""
    looked_at = []
    monkeypatch.setattr(torch, "pdist", lambda x: looked_at.append(x.flatten().tolist()) or torch.ones(3))
    median_distance(torch.arange(float(n))[:, None], limit=50)
    (points,) = looked_at
    assert len(points) == min(n, 50)
    assert points[-1] >= n - 50


def test_multi_scale_mmd_sees_both_scales():
    x = normal(800, 2, "ms")
    fine = x + 0.35 * torch.sign(normal(800, 2, "mt"))
    assert mmd_squared(x, normal(800, 2, "mu") + 1.0) > 0.05
    assert mmd_squared(fine, normal(800, 2, "mv")) > 0.0005


@pytest.mark.parametrize("statistic", ["energy", "mmd"])
def test_two_sample_test_keeps_its_level(statistic):
    """200 tests of one law against itself at level 0.1: rejections are Binomial(200, 0.1), 20 ± 4.2; bound at 4 sd."""
    rejected = sum(
        two_sample_test(
            normal(40, 2, "l", i), normal(50, 2, "r", i), statistic, 99, generator=stream(0, "perm", i)
        ).p_value
        <= 0.1
        for i in range(200)
    )
    assert 3 <= rejected <= 37


@pytest.mark.parametrize("statistic", ["energy", "mmd"])
def test_two_sample_test_counts_the_observed_labels_too(statistic):
    """No relabelling of 99 parts samples that far apart (one in C(40, 20)/2 does): p is 1/100, and never 0."""
    x, y = normal(20, 2, "here"), normal(20, 2, "there") + 100
    assert two_sample_test(x, y, statistic, 99, generator=stream(0, "apart")).p_value == 1 / 100
    alike = torch.ones(20, 2)
    assert two_sample_test(alike, alike, statistic, 99).p_value == 1


@pytest.mark.parametrize("statistic", ["energy", "mmd"])
def test_two_sample_test_counts_ties(statistic):
    """Two points against two, far apart: 2 of 6 relabellings are the observed one, of which one exchanges the samples.

    p is 1/3; 400 relabellings know it to .024, bound at 4.5 times that. Without a tie lost to rounding: 1/6.
    """
    for seed in range(8):
        x, y = normal(2, 2, "pair", seed), normal(2, 2, "other pair", seed) + 5
        test = two_sample_test(x, y, statistic, 400, generator=stream(0, "ties", seed))
        assert test.p_value == pytest.approx(1 / 3, abs=0.11)


@pytest.mark.parametrize("statistic", ["energy", "mmd"])
def test_two_sample_test_has_power(statistic):
    g = stream(0, "power")
    test = two_sample_test(normal(400, 2, "x"), 1.25 * normal(400, 2, "y"), statistic, 199, generator=g)
    assert test.p_value <= 0.01
    with pytest.raises(InputError, match="allowed are energy, mmd"):
        two_sample_test(normal(10, 2, "x"), normal(10, 2, "y"), "ks")
