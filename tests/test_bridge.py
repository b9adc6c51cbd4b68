"""The memoryless bridge, and by how much a drift moves when its posterior mean does."""

import itertools

import pytest
import torch

from conftest import CASES, F64, bayes, coefficients, normal

TIMES = [0.0, 1e-6, 0.05, 0.3, 0.55, 0.9, 0.999, 1.0]
PAIRS = [(t, u) for t, u in itertools.combinations(TIMES, 2)]


def at(path, t):
    return tuple(float(c) for c in coefficients(path, torch.tensor(t, dtype=F64)))


def noised_from(path, u, t, steps=200_000):
    """Coefficient and variance of x_t given x_u under the memoryless process run backwards, by its own SDE.

    Its time reversal has the drift b − (σ²/2) ∇log p = (β̇/β) x (method.md §1: b = (β̇/β) x + (σ²/2) score), so towards
    noise dx = −(β̇/β) x dτ + σ dW: linear, so the moments obey ρ' = −(β̇/β) ρ and v' = −2(β̇/β) v + σ². Trapezoidal in
    log ρ, midpoint for v.
    """
    tau = torch.linspace(u, t, steps + 1, dtype=F64)
    middle = (tau[1:] + tau[:-1]) / 2
    h = (u - t) / steps
    alpha, beta, alpha_dot, beta_dot = coefficients(path, middle)
    rate = beta_dot / beta
    sigma_squared = 2 * (rate * alpha**2 - alpha_dot * alpha)
    # v(t) = Σ σ² h exp(−2 ∫ from there to t), everything by midpoint sums
    decay = rate * h
    after = decay.flip(0).cumsum(0).flip(0) - decay / 2
    return float(torch.exp(-decay.sum())), float((sigma_squared * h * torch.exp(-2 * after)).sum())


@pytest.mark.parametrize(("t", "u"), [(0.05, 0.3), (0.3, 0.9), (0.55, 1.0)])
def test_bridge_is_gaussian_conditioning_of_the_memoryless_process(path, t, u):
    """Joint law of (x_t, x_u) given x_1: x_u ~ N(β_u x_1, α_u²), x_t | x_u by the SDE itself; condition x_u on x_t."""
    _, _, *_ = at(path, t)
    alpha_u, beta_u, *_ = at(path, u)
    rho, variance = noised_from(path, u, t)
    cov = torch.tensor([[rho**2 * alpha_u**2 + variance, rho * alpha_u**2], [rho * alpha_u**2, alpha_u**2]], dtype=F64)
    mean = torch.tensor([rho * beta_u, beta_u], dtype=F64)  # per unit of x_1
    keep = cov[1, 0] / cov[0, 0]
    data = mean[1] - keep * mean[0]
    std = (cov[1, 1] - keep * cov[0, 1]).clamp_min(0).sqrt()
    got = path.bridge(t, u)
    # midpoint sums over 200,000 steps: 1e-10; at u = 1 the SDE's own σ² is 0 and the sum as good
    for value, expected in zip(got, (keep, data, std), strict=True):
        assert float(value) == pytest.approx(float(expected), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(("t", "u"), PAIRS)
def test_marginals_are_kept(path, t, u):
    """x_t ~ N(β_t x_1, α_t²) makes x_u ~ N(β_u x_1, α_u²)."""
    (alpha_t, beta_t, *_), (alpha_u, beta_u, *_) = at(path, t), at(path, u)
    keep, data, std = (float(v) for v in path.bridge(t, u))
    assert keep * beta_t + data == pytest.approx(beta_u, rel=1e-13)
    # α_u² between .999 and 1 is 1e-6 of the α_t² it comes from
    assert keep**2 * alpha_t**2 + std**2 == pytest.approx(alpha_u**2, rel=1e-9, abs=1e-30)


@pytest.mark.parametrize(("t", "v", "u"), list(itertools.combinations(TIMES, 3)))
def test_two_bridges_are_one(path, t, v, u):
    first, second, both = path.bridge(t, v), path.bridge(v, u), path.bridge(t, u)
    for got, expected in (
        (second.keep * first.keep, both.keep),
        (second.keep * first.data + second.data, both.data),
        ((second.keep**2 * first.std**2 + second.std**2).sqrt(), both.std),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-12)


def test_ends_are_regular(path):
    """From t = 0 nothing is kept: x_u = β_u x_1 + α_u ξ. To u = 1: x_1 itself."""
    for u in TIMES[1:]:
        alpha_u, beta_u, *_ = at(path, u)
        keep, data, std = (float(v) for v in path.bridge(0.0, u))
        assert keep == 0
        assert (data, std) == pytest.approx((beta_u, alpha_u), rel=1e-14)
    for t in TIMES[:-1]:
        assert [float(v) for v in path.bridge(t, 1.0)] == [0.0, 1.0, 0.0]
    times = torch.tensor(TIMES[:-1], dtype=F64)
    for values, t in zip(zip(*path.bridge(times, 1.0), strict=True), TIMES[:-1], strict=True):
        assert [float(v) for v in values] == [float(v) for v in path.bridge(t, 1.0)]


def test_short_steps_are_the_sde(path):
    """As u → t: drift (β̇/β) x + (σ²/2)(score), with score = (β x_1 − x)/α² twice over, and variance σ² h (Eq. 38)."""
    t, h = 0.4, 1e-6
    alpha, beta, alpha_dot, beta_dot = at(path, t)
    half = beta_dot / beta * alpha**2 - alpha_dot * alpha
    keep, data, std = (float(v) for v in path.bridge(t, t + h))
    # dX = [b + (σ²/2) score] dt, b = (β̇/β) x + (σ²/2) score: coefficients of x, x_1; second order in h is 1e-6 · O(10)
    assert (keep - 1) / h == pytest.approx(beta_dot / beta - 2 * half / alpha**2, rel=1e-4)
    assert data / h == pytest.approx(2 * half * beta / alpha**2, rel=1e-4)
    assert std**2 / h == pytest.approx(2 * half, rel=1e-4)


@pytest.mark.parametrize("t", [0.02, 0.4, 0.95])
def test_tilt_gain(path, t):
    """c_t (D* − D) = (σ²/2) ∇V: D & D* by Bayes with the reward as one more observation, ∇V by central differences."""
    case = CASES["per-component-full"]
    x, a, y, noise_std, h = normal(6, 2), torch.tensor([1.0, -0.6], dtype=F64), 0.8, 0.7, 1e-5
    alpha, beta, alpha_dot, beta_dot = coefficients(path, torch.full((6,), t, dtype=F64))

    def value(x):
        """log Σ_k w_k N(y; a·m_k, aᵀC_k a + σ²) up to a constant."""
        means, covariances, weights = bayes(case, (x, alpha, beta))
        seen = covariances @ a @ a + noise_std**2
        return torch.logsumexp(weights.log() - 0.5 * (y - means @ a).square() / seen - 0.5 * seen.log(), 1)

    gradient = torch.stack([(value(x + h * e) - value(x - h * e)) / (2 * h) for e in torch.eye(2, dtype=F64)], 1)
    means, covariances, weights = bayes(case, (x, alpha, beta))
    seen = covariances @ a @ a + noise_std**2
    tilted = torch.softmax(weights.log() - 0.5 * (y - means @ a).square() / seen - 0.5 * seen.log(), 1)
    moved = means + (covariances @ a) * ((y - means @ a) / seen)[..., None]
    shift = (tilted[..., None] * moved).sum(1) - (weights[..., None] * means).sum(1)
    half = (beta_dot / beta * alpha**2 - alpha_dot * alpha)[:, None]
    # the difference quotient: h² times a third derivative, and 1e-16/h, both times σ²/2 <= 50
    torch.testing.assert_close(path.tilt_gain(t) * shift, half * gradient, rtol=1e-6, atol=1e-7)
    assert float(path.tilt_gain(0.0)) == pytest.approx(1.0 if path.name == "linear" else torch.pi / 2)
