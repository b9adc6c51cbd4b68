"""Gaussian mixtures against their definitions: quadrature, Bayes, autograd, 40-digit arithmetic."""

import functools
import math

import mpmath
import pytest
import torch
from torch.distributions import MultivariateNormal

import metaflowmaps as mfm
from conftest import CASES, CUBE, F64, bayes, coefficients, ks_bound, normal, paper_law, uniform, worst_ks
from metaflowmaps.random import stream

TIMES = [0.05, 0.4, 0.9]
# the sharpest posterior below has standard deviation 0.1 = 2 steps: the trapezoidal rule errs by e^{-2π²·2²} = 1e-34;
# the widest component is cut at 7.9 of its deviations: 3e-15
AXIS = torch.linspace(-9, 9, 361, dtype=F64)
GRID = torch.stack(torch.meshgrid(AXIS, AXIS, indexing="ij"), -1).reshape(-1, 2)
CELL = float(AXIS[1] - AXIS[0]) ** 2
REWARD = mfm.rewards.LinearGaussian(torch.tensor([1.2, -0.8], dtype=F64), -1.0, 0.7, strength=1.3)


def log_density(case, x):
    """log p_1 from the parameters, not through the law."""
    parts = MultivariateNormal(case.means, case.covariances).log_prob(x[:, None])
    return torch.logsumexp(case.weights.log() + parts, 1)


def states(case, path, t, n=4):
    """States that the interpolant visits at time t, and a few that it hardly does."""
    x = case.law.sample(n, stream(0, "states"))
    return path.interpolate(normal(n, 2, seed="noise"), x, t) * torch.linspace(0.5, 1.5, n, dtype=F64)[:, None]


def joint(case, path, t, x):
    """p_1(x_1) N(x; β x_1, α²) on the grid (B, G), and the noise (x − β x_1)/α it takes (B, G, 2)."""
    alpha, beta, *_ = coefficients(path, torch.tensor(t, dtype=F64))
    noise = (x[:, None] - beta * GRID) / alpha
    log_likelihood = -0.5 * noise.square().sum(-1) - math.log(2 * math.pi) - 2 * alpha.log()
    return (log_density(case, GRID) + log_likelihood).exp(), noise


# -- the law itself --------------------------------------------------------------------------------------------------


def test_density_and_moments(case):
    x = 2 * normal(50, 2)
    torch.testing.assert_close(case.law.log_prob(x), log_density(case, x), rtol=1e-12, atol=1e-12)
    p = log_density(case, GRID).exp() * CELL
    mean = p @ GRID
    torch.testing.assert_close(case.law.mean, mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(case.law.variance, p @ (GRID - mean).square(), rtol=0, atol=1e-10)
    torch.testing.assert_close(case.law.weights, case.weights)
    torch.testing.assert_close(case.law.covariances, case.covariances.expand(3, 2, 2))


def test_sampling(case):
    n = 20_000
    draws = case.law.sample(n, stream(0, "sample"))
    assert draws.shape == (n, 2)
    assert draws.dtype == F64
    # eight directions at level 1e-4 each: a false alarm with probability <= 8e-4 over seeds; the seed is fixed
    assert worst_ks(draws, case.means, case.covariances, case.weights) < ks_bound(n)
    assert torch.equal(draws, case.law.sample(n, stream(0, "sample")))


# -- on a path -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", TIMES)
def test_drift_is_the_conditional_mean_of_the_interpolants_difference(case, path, t):
    """b_t(x) = lim E[(I_{t+h} − I_{t−h})/2h | I_t = x], the expectation by quadrature over I_1."""
    x, h = states(case, path, t), 1e-5
    p, noise = joint(case, path, t, x)
    p = p / p.sum(1, keepdim=True)
    (a_0, b_0, *_), (a_1, b_1, *_) = (coefficients(path, torch.tensor(t + e * h, dtype=F64)) for e in (-1, 1))
    difference = ((a_1 - a_0) * noise + (b_1 - b_0) * GRID) / (2 * h)
    expected = torch.einsum("bg,bgd->bd", p, difference)
    # h²/6 · (π/2)³ · |noise| < 1e-9 from the difference, 1e-16/h from rounding
    torch.testing.assert_close(case.law.drift(path, t, x), expected, rtol=0, atol=3e-9)
    torch.testing.assert_close(case.law.denoise(path, t, x), p @ GRID, rtol=0, atol=1e-10)
    times = torch.full((len(x),), t, dtype=F64)
    assert torch.equal(case.law.drift(path, times, x), case.law.drift(path, t, x))


@pytest.mark.parametrize("t", TIMES)
def test_continuity_equation(case, path, t):
    """∂_t log p_t + div b + b·∇ log p_t = 0, spatial derivatives by autograd, in time by a difference."""
    x, h = states(case, path, t).requires_grad_(), 1e-5
    (score,) = torch.autograd.grad(case.law.marginal(path, t).log_prob(x).sum(), x)
    b = case.law.drift(path, t, x)
    divergence = sum(torch.autograd.grad(b[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    ahead, behind = (case.law.marginal(path, t + e * h).log_prob(x) for e in (1, -1))
    rate = (ahead - behind) / (2 * h)
    # h² · (third time derivative, up to 1e3 at t = .05 and .9) / 6 and rounding 1e-15/h
    torch.testing.assert_close(rate + divergence + (b * score).sum(1), torch.zeros_like(rate), rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", TIMES)
def test_score_is_the_gradient_of_the_log_density(case, path, t):
    x = states(case, path, t).requires_grad_()
    marginal = case.law.marginal(path, t)
    log_p = marginal.log_prob(x)
    p, _ = joint(case, path, t, x.detach())
    torch.testing.assert_close(log_p.detach(), (p.sum(1) * CELL).log(), rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    score = case.law.score(path, t, x.detach())
    torch.testing.assert_close(score, gradient, rtol=1e-11, atol=1e-11)
    # and drift, denoiser and score are one another through the hub
    denoise, drift = (f(path, t, x.detach()) for f in (case.law.denoise, case.law.drift))
    torch.testing.assert_close(path.convert(t, x.detach(), drift, "drift", "score"), score, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(path.convert(t, x.detach(), score, "score", "data"), denoise, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", TIMES)
def test_posterior_is_bayes(case, path, t):
    x = states(case, path, t)
    posterior = case.law.posterior(path, t, x)
    alpha, beta, *_ = coefficients(path, torch.full((len(x),), t, dtype=F64))
    means, covariances, weights = bayes(case, (x, alpha, beta))
    torch.testing.assert_close(posterior.means, means, rtol=0, atol=1e-11)
    torch.testing.assert_close(posterior.covariances.expand_as(covariances), covariances, rtol=0, atol=1e-12)
    torch.testing.assert_close(posterior.weights, weights, rtol=0, atol=1e-11)
    # the same moments from nothing but p_1(x_1) N(x; β x_1, α²)
    p, _ = joint(case, path, t, x)
    p = p / p.sum(1, keepdim=True)
    mean = p @ GRID
    torch.testing.assert_close(posterior.mean, mean, rtol=0, atol=1e-10)
    variance = torch.einsum("bg,bgd->bd", p, (GRID - mean[:, None]).square())
    torch.testing.assert_close(posterior.variance, variance, rtol=0, atol=1e-10)
    x_1 = mean + 0.1
    expected = log_density(case, x_1) + MultivariateNormal(
        beta[0] * x_1, alpha[0] ** 2 * torch.eye(2, dtype=F64)
    ).log_prob(x)
    evidence = case.law.marginal(path, t).log_prob(x)
    torch.testing.assert_close(posterior.log_prob(x_1), expected - evidence, rtol=1e-10, atol=1e-10)


def test_posterior_draws(case, path):
    n, t = 20_000, torch.tensor([0.0, 0.2, 0.5, 0.95], dtype=F64)
    x = torch.tensor([[0.3, -0.2], [0.4, 0.3], [0.1, -0.1], [-1.0, 0.2]], dtype=F64)
    draws = case.law.posterior(path, t, x).draw(n, stream(0, "posterior"))
    assert draws.shape == (n, 4, 2)
    alpha, beta, *_ = coefficients(path, t)
    reference = bayes(case, (x, alpha, beta))
    for row, parameters in enumerate(zip(*reference, strict=True)):
        # level 1e-4 a direction, as in test_sampling
        assert worst_ks(draws[:, row], *parameters) < ks_bound(n)
    # rows are independent: no shared noise. Correlations have standard error 1/√n; 4.5 of them
    white = (draws - draws.mean(0)) / draws.std(0)
    assert (white[:, 0] * white[:, 1]).mean(0).abs().max() < 4.5 / math.sqrt(n)


def test_three_dimensions(path):
    """Full covariances where eigenvectors and their transposes differ: everything once more against Bayes."""
    n, m = 20_000, 40
    law, s, t = CUBE.law, uniform(m, low=0.02, high=0.98, seed="s"), uniform(m, low=0.02, high=0.98)
    x_s, x_t = normal(m, 3, seed="x_s"), normal(m, 3).requires_grad_()
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-10)
    close(law.covariances, CUBE.covariances)
    close(law.log_prob(x_s), log_density(CUBE, x_s))
    (gradient,) = torch.autograd.grad(law.marginal(path, 0.4).log_prob(x_t).sum(), x_t)
    close(law.score(path, 0.4, x_t), gradient)
    x_t = x_t.detach()
    (a_s, b_s, da_s, db_s), (a_t, b_t, da_t, db_t) = ((c[:, None] for c in coefficients(path, time)) for time in (s, t))
    means, covariances, weights = bayes(CUBE, (x_t, a_t[:, 0], b_t[:, 0]))
    mean = (weights[..., None] * means).sum(1)
    posterior = law.posterior(path, t, x_t)
    close(posterior.means, means)
    close(posterior.covariances, covariances)
    close(law.denoise(path, t, x_t), mean)
    close(law.drift(path, t, x_t), da_t / a_t * (x_t - b_t * mean) + db_t * mean)
    both, _, w = bayes(CUBE, (x_t, a_t[:, 0], b_t[:, 0]), (x_s, a_s[:, 0], b_s[:, 0]))
    mean = (w[..., None] * both).sum(1)
    close(law.auxiliary_drift(path, s, x_s, t, x_t), da_s / a_s * (x_s - b_s * mean) + db_s * mean)
    # level 1e-4 a direction, as in test_sampling
    assert worst_ks(law.sample(n, stream(0, 3)), CUBE.means, CUBE.covariances, CUBE.weights) < ks_bound(n)
    draws = posterior.draw(n, stream(0, 3))
    assert worst_ks(draws[:, 0], means[0], covariances[0], weights[0]) < ks_bound(n)
    # tilt = conditioning on y = A x + σ n: information form once more
    reward = mfm.rewards.LinearGaussian(
        torch.tensor([[1.0, 0.3, -0.6], [0.2, -1.0, 0.5]]), torch.tensor([0.3, -0.2]), 0.5
    )
    tilted, a = law.tilt(reward), reward.A
    expected = torch.linalg.inv(torch.linalg.inv(CUBE.covariances) + a.T @ a / 0.25)
    close(tilted.covariances, expected)
    information = torch.linalg.solve(CUBE.covariances, CUBE.means[..., None])[..., 0] + reward.y @ a / 0.25
    close(tilted.means, torch.einsum("kde,ke->kd", expected, information))
    constant = log_density(CUBE, x_s) + reward(x_s) - tilted.log_prob(x_s)
    close(constant, law.log_evidence(reward).expand(m))
    # a tilted posterior's rows have bases of their own
    tilted, early = posterior.tilt(reward), int(t.argmin())  # late ones are round
    draws = tilted.draw(n, stream(0, 4))[:, early]
    assert worst_ks(draws, tilted.means[early], tilted.covariances[early], tilted.weights[early]) < ks_bound(n)


def test_posterior_at_the_ends(case, path):
    x = normal(4, 2)
    start = case.law.posterior(path, 0.0, x)  # nothing observed
    torch.testing.assert_close(start.mean, case.law.mean.expand(4, 2))
    torch.testing.assert_close(start.variance, case.law.variance.expand(4, 2))
    assert torch.equal(case.law.posterior(path, 1.0, x).draw(3, stream(0)), x.expand(3, 4, 2)) or (
        # x itself up to the rounding of m = μ + (x − μ)
        (case.law.posterior(path, 1.0, x).draw(3, stream(0)) - x).abs().max() < 1e-14
    )


@pytest.mark.parametrize("s", TIMES)
def test_auxiliary_drift_is_the_two_observation_conditional_mean(case, path, s):
    """b̄ = α̇_s E[Ī_0] + β̇_s E[I_1] given x_t and x̄_s, by Bayes with two observations."""
    t = uniform(40, low=0.02, high=0.98)
    s = torch.full_like(t, s)
    x_t, x_s = normal(40, 2), normal(40, 2, seed="x_s")
    (a_s, b_s, da_s, db_s), (a_t, b_t, *_) = coefficients(path, s), coefficients(path, t)
    means, _, weights = bayes(case, (x_t, a_t, b_t), (x_s, a_s, b_s))
    mean = (weights[..., None] * means).sum(1)
    expected = (da_s / a_s)[:, None] * (x_s - b_s[:, None] * mean) + db_s[:, None] * mean
    torch.testing.assert_close(case.law.auxiliary_drift(path, s, x_s, t, x_t), expected, rtol=0, atol=1e-10)


def test_rescaled(case, path):
    x = normal(3, 2)
    posterior = case.law.posterior(path, 0.4, x)
    shift, scale = normal(3, 2, seed="shift"), uniform(3, 1, low=0.5, high=2)
    y = normal(3, 2, seed="y")
    jacobian = 2 * scale[:, 0].log()
    expected = posterior.log_prob(shift + scale * y) + jacobian
    torch.testing.assert_close(posterior.rescaled(shift, scale).log_prob(y), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("what", ["drift", "denoise", "score", "log_prob", "auxiliary_drift", "value"])
def test_everything_is_differentiable(case, path, what):
    x_t, x_s = normal(3, 2).requires_grad_(), normal(3, 2, seed="s").requires_grad_()
    if what == "log_prob":
        assert torch.autograd.gradcheck(case.law.log_prob, x_t)
    elif what == "auxiliary_drift":
        assert torch.autograd.gradcheck(lambda a, b: case.law.auxiliary_drift(path, 0.6, a, 0.3, b), (x_s, x_t))
    elif what == "value":
        assert torch.autograd.gradcheck(lambda x: case.law.value(path, 0.3, x, REWARD), x_t)
    else:
        assert torch.autograd.gradcheck(lambda x: getattr(case.law, what)(path, 0.3, x), x_t)


# -- under a reward --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [pytest.param(t, marks=[] if t == 0.4 else [pytest.mark.attack]) for t in TIMES])
def test_value_by_quadrature(case, path, t):
    x = states(case, path, t)

    def quadrature(x):
        p, _ = joint(case, path, t, x)
        return (p @ REWARD(GRID).exp() / p.sum(1)).log()

    torch.testing.assert_close(case.law.value(path, t, x, REWARD), quadrature(x), rtol=0, atol=1e-10)
    # its gradient against differences of the quadrature: h² · third derivative (< 1e2) and rounding 1e-14/h
    x, h = x.requires_grad_(), 1e-4
    (gradient,) = torch.autograd.grad(case.law.value(path, t, x, REWARD).sum(), x)
    for i, e in enumerate(h * torch.eye(2, dtype=F64)):
        difference = (quadrature(x.detach() + e) - quadrature(x.detach() - e)) / (2 * h)
        torch.testing.assert_close(gradient[:, i], difference, rtol=0, atol=1e-6)


def test_value_at_the_ends(case, path):
    x = normal(4, 2)
    torch.testing.assert_close(case.law.value(path, 0.0, x, REWARD), case.law.log_evidence(REWARD).expand(4))
    torch.testing.assert_close(case.law.value(path, 1.0, x, REWARD), REWARD(x))


@pytest.mark.parametrize(
    "reward",
    [
        REWARD,
        mfm.rewards.LinearGaussian(torch.tensor([[1.0, 0.3], [-0.4, 2.0]], dtype=F64), torch.tensor([0.5, -1]), 0.5),
        mfm.rewards.LinearGaussian([1.0, 0.0], 0.3, 1.0, strength=0.0),
    ],
    ids=["one row", "two rows", "strength zero"],
)
def test_tilt(case, reward):
    tilted = case.law.tilt(reward)
    x = 2 * normal(100, 2)
    constant = log_density(case, x) + reward(x) - tilted.log_prob(x)
    evidence = (log_density(case, GRID).exp() @ reward(GRID).exp() * CELL).log()
    # p e^r / tilt is one number, log E[e^r]
    torch.testing.assert_close(constant, evidence.expand(100), rtol=0, atol=1e-9)
    torch.testing.assert_close(case.law.log_evidence(reward), evidence, rtol=0, atol=1e-9)


def test_the_papers_inverse_problem():
    """method.md §7, printed with four digits: half a unit of the last."""
    a, sigma, y = torch.tensor([1.2, -0.8], dtype=F64), 0.2, -1.0
    law = paper_law()
    tilted = law.tilt(mfm.rewards.LinearGaussian(a, y, sigma))
    expected = torch.tensor([0.5716, 0.3665, 0.0619], dtype=F64)
    torch.testing.assert_close(tilted.weights, expected, rtol=0, atol=5e-5)
    c = torch.linalg.inv(torch.eye(2, dtype=F64) / 0.5 + torch.outer(a, a) / sigma**2)
    torch.testing.assert_close(tilted.covariances, c.expand(3, 2, 2), rtol=0, atol=1e-13)
    means = (law.means / 0.5 + a * y / sigma**2) @ c
    torch.testing.assert_close(tilted.means, means, rtol=0, atol=1e-12)


def test_an_exact_observation_leaves_no_variance_along_it():
    """σ = 1e-9: variances of 1e-18 are below the rounding of 1, and may not come out negative."""
    law = mfm.GaussianMixture(CUBE.law.means, CUBE.law.covariances)
    a, y = torch.tensor([[1.0, 0.3, -0.5], [-0.4, 2.0, 0.7]], dtype=F64), torch.tensor([0.5, -1.0], dtype=F64)
    x = law.tilt(mfm.rewards.LinearGaussian(a, y, 1e-9)).sample(100, stream(0, "exact"))
    # roundings 1e-16 of variances of 1 are 1e-8 of a deviation
    torch.testing.assert_close(x @ a.T, y.expand(100, 2), rtol=0, atol=1e-6)


# -- precision -------------------------------------------------------------------------------------------------------

MEANS, VARIANCES, WEIGHTS = (-1.5, 0.25, 1.75), (0.25, 0.5, 0.125), (0.5, 0.25, 0.25)  # exact in float32
LINE = mfm.GaussianMixture(torch.tensor(MEANS, dtype=F64)[:, None], torch.tensor(VARIANCES), torch.tensor(WEIGHTS))
EPS = 1e-6


def digits(path, t, x, context=None):
    """(b, D, score) at (t, x) of LINE, or b̄ given a second observation, in 40-digit arithmetic."""
    mp = mpmath.mp.clone()
    mp.dps = 40
    w = mp.pi / 2

    def coefficient(t):
        t = mp.mpf(t)
        return (1 - t, t, mp.mpf(-1), mp.mpf(1)) if path.name == "linear" else (
            mp.cos(w * t), mp.sin(w * t), -w * mp.sin(w * t), w * mp.cos(w * t)
        )  # fmt: skip

    alpha, beta, alpha_dot, beta_dot = coefficient(t)
    parts = [(mp.mpf(p), mp.mpf(m), mp.mpf(v)) for p, m, v in zip(WEIGHTS, MEANS, VARIANCES, strict=True)]
    if context is not None:
        a, b, *_ = coefficient(context[0])
        given = []
        for p, m, v in parts:
            total, error = a**2 + b**2 * v, mp.mpf(context[1]) - b * m
            p = p * mp.exp(-(error**2) / total / 2) / mp.sqrt(total)
            given.append((p, m + b * v / total * error, v * a**2 / total))
        parts = given
    norm = drift = denoise = score = mp.mpf(0)
    for p, m, v in parts:
        total, error = alpha**2 + beta**2 * v, mp.mpf(x) - beta * m
        p = p * mp.exp(-(error**2) / total / 2) / mp.sqrt(total)
        norm += p
        drift += p * (beta_dot * m + (alpha_dot * alpha + beta_dot * beta * v) / total * error)
        denoise += p * (m + beta * v / total * error)
        score -= p * error / total
    return tuple(float(f / norm) for f in (drift, denoise, score))


# near the ends as the dtype has them: what is compared is the answer at the rounded time
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("t", [0.0, EPS / 10, EPS, 0.4, 1 - EPS, 1 - EPS / 10, 1.0])
def test_stable_near_the_ends(path, t, dtype):
    # float32: rounding 6e-8 times log-responsibilities (up to 30) times the spread of the means (3); float64 likewise
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-5}[dtype]
    t = torch.tensor(t, dtype=dtype)
    for x in (-2.0, -0.25, 0.75, 3.0):
        state = torch.tensor([[x]], dtype=dtype)
        expected = digits(path, float(t), x)
        got = [float(f(path, t, state)) for f in (LINE.drift, LINE.denoise, LINE.score)]
        assert got == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("t", [0.0, EPS, 0.4, 1 - EPS, 1.0])
@pytest.mark.parametrize("s", [0.0, EPS, 0.4, 1 - EPS, 1.0])
def test_auxiliary_drift_is_stable_near_the_ends(path, s, t, dtype):
    """Both at the data end is the ill-conditioned corner: 1e6 times the rounding of x̄ − β_s m. Elsewhere, as above."""
    s, t = torch.tensor(s, dtype=dtype), torch.tensor(t, dtype=dtype)
    corner = float(s) > 0.9 and float(t) > 0.9
    for x_t, z in ((-1.25, 0.5), (0.5, -1.0), (2.0, 1.5)):
        # an inner state the process visits: β_s x_t + (α_s or so) z, exact in the dtype
        x_s = float(torch.tensor(x_t * float(s) + z * (1 - float(s)), dtype=dtype))
        got = float(
            LINE.auxiliary_drift(path, s, torch.tensor([[x_s]], dtype=dtype), t, torch.tensor([[x_t]], dtype=dtype))
        )
        assert math.isfinite(got) or float(s) == float(t) == 1
        if corner and (dtype == torch.float32 or max(float(s), float(t)) == 1):
            continue  # no digits left to compare: the answer moves by O(1) with the last bit of x̄
        tolerance = {torch.float64: 1e-13, torch.float32: 2e-5}[dtype] if not corner else 1e-8
        expected = digits(path, float(s), x_s, (float(t), x_t))[0]
        assert got == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_float32_follows_float64(name, path):
    case = CASES[name]
    t = uniform(100).float()
    x = path.interpolate(normal(100, 2, seed="n"), case.law.sample(100, stream(0)), t.double()).float()
    s, x_s = uniform(100, high=0.95, seed="s").float(), normal(100, 2, seed="x_s").float()
    for f, g in (
        (lambda t, x: case.law.drift(path, t, x), 1e-5),
        (lambda t, x: case.law.denoise(path, t, x), 1e-5),
        (lambda t, x: case.law.score(path, t, x), 1e-5),
        (lambda t, x: case.law.log_prob(x), 1e-5),
        (lambda t, x: case.law.value(path, t, x, REWARD), 1e-4),  # precision/σ² of the reward enters
        (lambda t, x: case.law.auxiliary_drift(path, s.to(x), x_s.to(x), t, x), 1e-3),  # 1/(1−s), 1/(1−t) up to 1e3
    ):
        single, double = f(t, x), f(t.double(), x.double())
        assert single.dtype == torch.float32
        # rounding 6e-8 times log-responsibilities (tens) times a spread of 3
        torch.testing.assert_close(single.double(), double, rtol=g, atol=g)


def test_python_numbers_keep_their_digits():
    """Parameters typed as Python numbers mean those numbers, not their float32 roundings (1e-8 away)."""
    typed = mfm.GaussianMixture([[0.1, -0.7], [0.3, 0.9]], [0.3, 0.7], [0.3, 0.7])
    assert typed.means.tolist() == [[0.1, -0.7], [0.3, 0.9]]
    assert typed.weights.tolist() == pytest.approx([0.3, 0.7], rel=1e-15)
    assert typed.covariances.diagonal(dim1=1, dim2=2).tolist() == [[0.3, 0.3], [0.7, 0.7]]
    assert mfm.GaussianMixture([[0.0]], 0.3).variance.item() == 0.3
    assert mfm.rewards.LinearGaussian([0.1, 0.7], 0.3, 0.1).A.tolist() == [[0.1, 0.7]]


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("means", "covariances", "weights", "message"),
    [
        ([1.0, 2.0], 1.0, None, r"means must have shape \(K, d\)"),
        ([[math.nan, 0.0]], 1.0, None, "means must be finite"),
        ([[0.0, 0.0]], -1.0, None, "variances must be positive"),
        ([[0.0, 0.0]], [[1.0, 2.0], [2.0, 1.0]], None, "positive definite"),
        ([[0.0, 0.0]], [[1.0, 0.5], [0.0, 1.0]], None, "symmetric"),
        ([[0.0, 0.0]], torch.ones(3), None, "covariances must be a number"),
        ([[0.0, 0.0]], math.inf, None, "covariances must be finite"),
        ([[0.0, 0.0]], [[1.0, 0.01], [0.0, 1.0]], None, "symmetric"),
        ([[0.0], [1.0]], 1.0, [0.5, 0.6], "weights must sum to 1"),
        ([[0.0], [1.0]], 1.0, [0.5, 0.501], "weights must sum to 1"),
        ([[0.0], [1.0]], 1.0, [1.5, -0.5], "weights must be finite and >= 0"),
        ([[0.0], [1.0]], 1.0, [1.0], r"weights must have shape \(2,\)"),
    ],
)
def test_bad_parameters_are_refused(means, covariances, weights, message):
    with pytest.raises(mfm.InputError, match=message):
        mfm.GaussianMixture(means, covariances, weights)


def test_weights_typed_with_four_digits_are_normalised():
    weights = mfm.GaussianMixture([[0.0], [1.0], [2.0]], 1.0, [0.3333, 0.3333, 0.3333]).weights
    torch.testing.assert_close(weights, torch.full((3,), 1 / 3, dtype=F64), rtol=1e-14, atol=0)


def test_bad_states_are_refused(path):
    law = CASES["isotropic"].law
    with pytest.raises(mfm.InputError, match="2 dimensions"):
        law.drift(path, 0.5, normal(3, 3))
    with pytest.raises(mfm.InputError, match="floating-point"):
        law.drift(path, 0.5, torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(mfm.InputError, match="batch dimension"):
        law.drift(path, 0.5, normal(2))
    with pytest.raises(mfm.InputError, match="same shape"):
        law.auxiliary_drift(path, 0.5, normal(3, 2), 0.5, normal(4, 2))
    with pytest.raises(mfm.InputError, match="num_draws"):
        law.posterior(path, 0.5, normal(3, 2)).draw(0)
    with pytest.raises(mfm.InputError, match="LinearGaussian"):
        law.tilt(lambda x: x.sum(1))
    with pytest.raises(mfm.InputError, match="observes 3"):
        law.tilt(mfm.rewards.LinearGaussian([1.0, 2.0, 3.0], 0.0, 1.0))


def test_a_posterior_keeps_its_gradient_after_calls_without_one(path):
    """Asked for float32 first under no_grad, then with a gradient, twice: each time that of a fresh posterior."""
    case, x, y = CASES["per-component-full"], normal(3, 2), normal(3, 2, seed="y").float()

    def slope(posterior, x):
        return torch.autograd.grad(posterior.log_prob(y).sum(), x, retain_graph=True)[0]

    fresh, asked = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = slope(case.law.posterior(path, 0.4, fresh), fresh)
    posterior = case.law.posterior(path, 0.4, asked)
    with torch.no_grad():
        posterior.log_prob(y)
    for _ in range(2):
        assert torch.equal(slope(posterior, asked), expected)
    assert expected.abs().min() > 1e-3
