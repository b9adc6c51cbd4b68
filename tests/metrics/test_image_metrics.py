"""Image metrics against closed forms, and a calibration test that keeps its level and has power."""

import math

import pytest
import torch

from metaflowmaps import metrics
from metaflowmaps.errors import InputError
from metaflowmaps.metrics.calibration import _polynomials
from metaflowmaps.random import stream

F64 = torch.float64


def normal(*shape: int, name: str = "x") -> torch.Tensor:
    return torch.randn(shape, generator=stream(0, "image-metrics", name), dtype=F64)


def with_moments(n: int, mean: torch.Tensor, covariance: torch.Tensor, name: str) -> torch.Tensor:
    """n points whose sample mean and covariance are exactly these."""
    x = normal(n, len(mean), name=name)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    return mean + white @ torch.linalg.cholesky(covariance).T


# -- Fréchet distance ------------------------------------------------------------------------------------------------


def test_frechet_of_diagonal_gaussians():
    """|Δμ|² + Σ (σ_x − σ_y)², on samples that have these moments exactly; rounding of O(10) numbers."""
    a, b = torch.tensor([1.0, 2, 0.5], dtype=F64), torch.tensor([2.0, 0.1, 0.5], dtype=F64)
    m = torch.tensor([1.0, -1, 0.5], dtype=F64)
    x, y = with_moments(40, 0 * m, torch.diag(a**2), "a"), with_moments(25, m, torch.diag(b**2), "b")
    expected = float((m**2).sum() + (a - b).square().sum())
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, abs=1e-10)
    assert metrics.frechet_distance(y, x) == pytest.approx(expected, abs=1e-10)


def test_frechet_of_commuting_covariances_and_rotations():
    """One eigenbasis, eigenvalues a² and b²: Σ (a − b)²; any rotation of both leaves it alone."""
    basis, _ = torch.linalg.qr(normal(6, 6, name="basis"))
    a, b = torch.linspace(0.1, 3, 6, dtype=F64), torch.linspace(2, 0.5, 6, dtype=F64)
    mean = torch.ones(6, dtype=F64)
    x = with_moments(50, mean, basis @ torch.diag(a**2) @ basis.T, "c")
    y = with_moments(60, mean, basis @ torch.diag(b**2) @ basis.T, "d")
    assert metrics.frechet_distance(x, y) == pytest.approx(float((a - b).square().sum()), abs=1e-10)
    other, _ = torch.linalg.qr(normal(6, 6, name="other"))
    assert metrics.frechet_distance(x @ other, y @ other) == pytest.approx(metrics.frechet_distance(x, y), abs=1e-10)


def test_frechet_of_covariances_that_do_not_commute():
    """Two dimensions: tr √(C_x C_y) = √(tr C_x C_y + 2 √det C_x C_y), by Cayley and Hamilton."""
    cx = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=F64)
    cy = torch.tensor([[0.5, -0.3], [-0.3, 1.5]], dtype=F64)
    root = math.sqrt(float(torch.trace(cx @ cy)) + 2 * math.sqrt(float(torch.det(cx) * torch.det(cy))))
    expected = float(torch.trace(cx) + torch.trace(cy)) - 2 * root
    x, y = (with_moments(30, torch.zeros(2, dtype=F64), c, n) for c, n in ((cx, "e"), (cy, "f")))
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), [(30, 5), (12, 64)])
def test_frechet_of_a_sample_and_itself(n, d):
    """0, singular covariances (12 rows, 64 features) included; a shift by c adds |c|²."""
    x = normal(n, d, name="same")
    assert metrics.frechet_distance(x, x) <= 1e-8
    assert metrics.frechet_distance(x, x.flip(0)) <= 1e-8
    assert metrics.frechet_distance(x, x + 0.5) == pytest.approx(0.25 * d, abs=1e-8)


def test_frechet_of_few_rows_is_that_of_the_span():
    """Few rows in many features: the same number as in coordinates of their span, where nothing is singular."""
    x, y = with_moments(9, torch.zeros(3, dtype=F64), torch.eye(3, dtype=F64), "g"), normal(7, 3, name="h")
    into, _ = torch.linalg.qr(normal(40, 3, name="into"))
    assert metrics.frechet_distance(x @ into.T, y @ into.T) == pytest.approx(metrics.frechet_distance(x, y), abs=1e-10)


# -- diversity -------------------------------------------------------------------------------------------------------


def test_mean_pairwise_distance_by_hand():
    x = torch.tensor([[0.0, 0], [3, 4], [0, 8]])
    assert metrics.mean_pairwise_distance(x) == pytest.approx((5 + 8 + 5) / 3, rel=1e-12)
    assert metrics.mean_pairwise_distance(x[:, :, None, None]) == pytest.approx(6, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(6, 10), (40, 10)])
def test_vendi_of_identical_orthogonal_and_clustered(n, d):
    """1, n and k; n < d and n > d take different matrices. Rounding of eigenvalues: λ log λ at 1e-17 is < 1e-14."""
    same = normal(1, d, name="one").expand(n, d)
    basis, _ = torch.linalg.qr(normal(d, d, name="rows"))
    for kernel in ("cosine", "rbf"):
        assert metrics.vendi_score(same, kernel) == pytest.approx(1, abs=1e-10)
    assert metrics.vendi_score(basis[:5] * 3) == pytest.approx(5, abs=1e-10)
    clusters = basis[torch.arange(n) % 2] * torch.rand(n, 1, generator=stream(0, "lengths"), dtype=F64).add(0.1)
    assert metrics.vendi_score(clusters) == pytest.approx(2, abs=1e-10)
    # points 100 bandwidths apart: k = exp(−5000) = 0
    assert metrics.vendi_score(100 * basis[torch.arange(n) % 2], "rbf", 1.0) == pytest.approx(2, abs=1e-10)


def test_vendi_of_two_points_and_of_both_paths():
    """K = [[1, c], [c, 1]]: eigenvalues (1 ± c)/2. More rows than features: the small matrix gives the big one's."""
    c = 0.6
    x = torch.tensor([[1.0, 0.0], [c, math.sqrt(1 - c**2)]], dtype=F64)
    entropy = -sum(p * math.log(p) for p in ((1 + c) / 2, (1 - c) / 2))
    assert metrics.vendi_score(x) == pytest.approx(math.exp(entropy), rel=1e-12)
    distance = float((x[0] - x[1]).norm())
    same = math.exp(-(distance**2) / (2 * 0.9**2))
    entropy = -sum(p * math.log(p) for p in ((1 + same) / 2, (1 - same) / 2))
    assert metrics.vendi_score(x, "rbf", 0.9) == pytest.approx(math.exp(entropy), rel=1e-12)
    y = normal(20, 6, name="paths")
    padded = torch.cat([y, torch.zeros(20, 30, dtype=F64)], 1)  # no other cosine, but n < d
    assert metrics.vendi_score(y) == pytest.approx(metrics.vendi_score(padded), rel=1e-10)


# -- images ----------------------------------------------------------------------------------------------------------


def test_psnr_by_hand():
    x = torch.zeros(3, 1, 2, 2)
    y = torch.stack([torch.full((1, 2, 2), 0.2), torch.zeros(1, 2, 2), torch.full((1, 2, 2), 2.0)])
    expected = torch.tensor([20.0, 100.0, 0.0], dtype=F64)  # range 2: 10 log10(4/.04); identical: the cap; 10 log10(1)
    torch.testing.assert_close(metrics.psnr(x, y), expected, rtol=0, atol=1e-6)  # 0.2 is a float32
    torch.testing.assert_close(metrics.psnr(x[:1], y[:1], 1.0)[0], expected[0] - 20 * math.log10(2), rtol=0, atol=1e-6)


def test_class_distance_by_hand():
    assert metrics.class_distance(torch.tensor([0.5, 0.5, 0]), torch.tensor([0.1, 0.5, 0.4])) == pytest.approx(
        math.sqrt(0.32), rel=1e-6
    )
    with pytest.raises(InputError, match="divide counts"):
        metrics.class_distance(torch.tensor([5.0, 5.0]), torch.tensor([0.5, 0.5]))
    with pytest.raises(InputError, match="2 frequencies for 3 classes"):
        metrics.class_distance(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5, 0.0]))


# -- calibration -----------------------------------------------------------------------------------------------------


def posterior(images: int, draws: int, seed: int, *, scale: float = 1.0, shift: float = 0.0, length: float = 1.5):
    """Truth (B, 1, 8, 8) and draws (N, B, 1, 8, 8) about means that differ; correlation length in pixels."""
    g = stream(seed, "posterior", images, draws)
    at = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).double()
    covariance = torch.exp(-torch.cdist(at, at).square() / (2 * length**2)) + 0.05 * torch.eye(64, dtype=F64)
    root = torch.linalg.cholesky(covariance)
    noise = torch.randn(draws + 1, images, 64, generator=g, dtype=F64) @ root.T
    centre = 3 * torch.randn(images, 64, generator=g, dtype=F64)
    truth, samples = centre + noise[0], centre + shift + scale * noise[1:]
    return samples.reshape(draws, images, 1, 8, 8), truth.reshape(images, 1, 8, 8)


def test_ranks_by_hand():
    samples = torch.tensor([[[0.0, 5.0, 1.0]], [[1.0, 6.0, 1.0]], [[2.0, 7.0, 1.0]]])  # 3 draws, 1 image, 3 pixels
    samples, truth = samples.repeat(1, 400, 1), torch.tensor([[1.5, 9.0, 1.0]]).repeat(400, 1)
    ranks = metrics.rank_statistics(samples, truth, stream(0, "ties"))
    assert ranks.shape == (400, 3)
    assert (ranks[:, 0] == 2).all()
    assert (ranks[:, 1] == 3).all()
    counts = torch.bincount(ranks[:, 2], minlength=4)  # a four-fold tie: uniform, 100 ± 8.7; bound at 4.5 sd
    assert (counts - 100).abs().max() < 39


def test_ranks_on_a_grid():
    """Draws a hair above the truth: rank 0 by their noise, any rank on the grid of the data."""
    truth = -torch.ones(50, 64)
    samples = truth + 1e-3 * torch.rand(9, 50, 64, generator=stream(0, "hair"))
    assert metrics.rank_statistics(samples, truth, stream(0, "r")).max() == 0
    on_grid = metrics.rank_statistics(samples, truth, stream(0, "r"), resolution=1 / 8).double()
    # uniform on 0..9: mean 4.5, sd 2.87/√3200 = 0.051; bound at 5 sd
    assert float(on_grid.mean()) == pytest.approx(4.5, abs=0.26)


@pytest.mark.parametrize("count", [3, 10, 65])
def test_polynomials_are_orthonormal(count):
    basis = torch.stack([torch.ones(count, dtype=F64), *_polynomials(count)])
    torch.testing.assert_close(basis @ basis.T / count, torch.eye(3, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("images", "draws"), [(64, 32), (128, 64)])
@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_calibration_sees_a_spread_that_is_20_percent_wrong(images, draws, scale):
    """The spread score has the right sign and rejects at .01; it is 6 to 15 sd at these sizes (30 seeds each)."""
    for seed in range(3):
        test = metrics.rank_test(*posterior(images, draws, seed, scale=scale), generator=stream(seed, "test"))
        assert test.p_value < 0.01
        assert (test.scores["spread"] > 0) == (scale < 1)
        # about 64 images of 10 or more independent directions: 4 % of scatter, bound at 3.5 times that
        assert test.spread_ratio == pytest.approx(1 / scale, rel=0.14)
    assert int(test.histogram.sum()) == 64 * images


def test_calibration_sees_a_bias():
    test = metrics.rank_test(*posterior(64, 32, 0, shift=0.3), generator=stream(0, "test"))
    assert test.p_value < 0.01
    assert test.scores["bias"] < -3


def test_calibration_sees_lost_dependence():
    """Draws of the right marginals but, pixel by pixel, from different images: every pixel's rank is still uniform."""
    samples, truth = posterior(64, 32, 0)
    order = torch.rand(32, 64, 64, generator=stream(0, "shuffle")).argsort(0)
    mixed = samples.flatten(2).gather(0, order).reshape(samples.shape)
    test = metrics.rank_test(mixed, truth, generator=stream(0, "test"))
    assert test.p_value < 0.01
    assert test.scores["dependence"] > 3


def test_calibration_keeps_its_level():
    """The right sampler, 500 seeds, pixels as dependent as they come: p is uniform.

    Kolmogorov–Smirnov: distance > bound has probability <= 1e-4 by Massart's inequality, plus 1/200 for p's grid.
    """
    p = []
    for seed in range(500):
        samples, truth = posterior(16, 12, seed, length=3.0)
        p.append(metrics.rank_test(samples, truth, 199, stream(seed, "test")).p_value)
    p = torch.tensor(p, dtype=F64).sort().values
    steps = torch.arange(501, dtype=F64) / 500
    assert float(torch.maximum(steps[1:] - p, p - steps[:-1]).max()) < math.sqrt(math.log(2e4) / 1000) + 1 / 200


def test_calibration_keeps_its_level_on_ties():
    """Three grey levels and dead pixels, level 0.1, 200 seeds: Binomial(200, 0.1), 20 ± 4.2; bound at 4 sd."""
    rejected = 0
    for seed in range(200):
        samples, truth = posterior(12, 9, seed)
        samples, truth = ((x / 4).round().clamp(-1, 1) for x in (samples, truth))
        samples[..., :4], truth[..., :4] = -1, -1
        rejected += metrics.rank_test(samples, truth, 99, stream(seed, "test")).p_value <= 0.1
    assert 3 <= rejected <= 37


def test_calibration_counts_the_truth_among_its_relabellings():
    """A truth above all draws everywhere: no relabelling of 99 finds it in all of 16 images (5^-16 each): p = 1/100."""
    samples, truth = posterior(16, 4, 0)
    assert metrics.rank_test(samples, truth + 100, 99, stream(0, "apart")).p_value == 1 / 100


def test_calibration_says_nothing_by_a_part_that_cannot_vary():
    """Three pixels and their negatives: no image has a bias, so its score is 0 and not a rounding over a rounding."""
    samples, truth = (torch.cat([x, -x], -1) for x in (normal(8, 10, 3), normal(10, 3, name="truth")))
    test = metrics.rank_test(samples, truth, 99, stream(0, "test"))
    assert test.scores["bias"] == test.scores["dependence"] == 0
    assert test.statistic == abs(test.scores["spread"]) > 0


def test_spread_ratio_at_its_ends():
    samples, truth = posterior(2000, 8, 0, length=0.3)
    # 128,000 nearly independent pixels: the error's mean square is known to 0.4 %, its root to 0.2 %; bound at 5 sd
    assert metrics.spread_ratio(samples, truth) == pytest.approx(1, abs=0.01)
    point = truth.expand(8, *truth.shape)
    assert metrics.spread_ratio(point, truth) == 1
    assert metrics.spread_ratio(point, truth + 1) == math.inf


# -- refusals --------------------------------------------------------------------------------------------------------

X, BAD = torch.ones(4, 3), torch.tensor([[1.0, math.nan], [0.0, 1.0]])


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.frechet_distance(X, torch.ones(4, 2)),
        lambda: metrics.frechet_distance(X[:1], X),
        lambda: metrics.frechet_distance(BAD, BAD),
        lambda: metrics.frechet_distance(torch.ones(4, 3, 2), torch.ones(4, 3, 2)),
        lambda: metrics.mean_pairwise_distance(X[:1]),
        lambda: metrics.mean_pairwise_distance(X[:, 0]),
        lambda: metrics.vendi_score(BAD),
        lambda: metrics.vendi_score(torch.zeros(3, 2)),
        lambda: metrics.vendi_score(X, "linear"),
        lambda: metrics.vendi_score(X, "rbf", 0.0),
        lambda: metrics.psnr(X, X[:2]),
        lambda: metrics.psnr(BAD, BAD),
        lambda: metrics.psnr(X, X, 0.0),
        lambda: metrics.class_distance(X, X),
        lambda: metrics.class_distance(torch.tensor([math.nan, 1.0]), torch.tensor([0.0, 1.0])),
        lambda: metrics.rank_test(torch.ones(5, 4, 3), torch.ones(4, 2)),
        lambda: metrics.rank_test(torch.ones(1, 4, 3), X),
        lambda: metrics.rank_test(torch.ones(5, 1, 3), X[:1]),
        lambda: metrics.rank_test(torch.ones(5, 4, 3), X, 0),
        lambda: metrics.rank_statistics(torch.full((5, 4, 3), math.inf), X),
        lambda: metrics.rank_statistics(torch.ones(5, 4, 3), X, resolution=-1.0),
        lambda: metrics.spread_ratio(torch.ones(5, 4, 3), torch.full((4, 3), math.nan)),
    ],
)
def test_bad_input_is_one_line(call):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
