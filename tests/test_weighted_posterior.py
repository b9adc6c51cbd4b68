"""Weighted draws of a deterministic flow map, against laws whose flow map and posterior are known in closed form."""

import math

import pytest
import torch
from torch import Tensor

import metaflowmaps as mfm
from conftest import F64, coefficients, normal
from metaflowmaps.draws import DrawOptions, make_draws
from metaflowmaps.random import stream
from metaflowmaps.steering.recycling import DrawPool
from metaflowmaps.value import Gradient, GradientFree

STD = 0.6


class GaussianFlow:
    """X_{s,u} and b_t of N(0, STD² Id): the flow keeps z/√(α² + β² STD²)."""

    event_shape, dtype = (2,), F64

    def __init__(self, path):
        self.path, self.calls = path, []

    def root(self, t, x):
        alpha, beta, alpha_dot, beta_dot = coefficients(self.path, torch.as_tensor(t, dtype=F64))
        variance = alpha**2 + beta**2 * STD**2
        rate = (alpha * alpha_dot + beta * beta_dot * STD**2) / variance
        wide = [c.reshape(-1, *[1] * (x.ndim - 1)) if c.ndim else c for c in (variance.sqrt(), rate)]
        return wide[0], wide[1]

    def jump(self, s, u, x, cond=None):
        self.calls.append((s, u, len(x)))
        return x * self.root(u, x)[0] / self.root(s, x)[0]

    def drift(self, t, x, cond=None):
        return self.root(t, x)[1] * x

    def posterior(self, t, x):
        """Mean and variance of x_1 given x_t."""
        alpha, beta, *_ = coefficients(self.path, torch.as_tensor(t, dtype=F64))
        alpha, beta = (c.reshape(-1, 1) if c.ndim else c for c in (alpha, beta))
        variance = alpha**2 + beta**2 * STD**2
        return beta * STD**2 / variance * x, STD**2 * alpha**2 / variance


class MixtureFlow:
    """The flow map of a mixture by Runge and Kutta's fourth order, differentiable."""

    def __init__(self, path, law, steps=12):
        self.path, self.law, self.steps, self.event_shape, self.dtype = path, law, steps, (law.dim,), F64

    def drift(self, t, x, cond=None):
        return self.law.drift(self.path, t, x)

    def jump(self, s, u, x, cond=None):
        def f(time, state):
            return self.law.drift(self.path, time.clamp_max(1 - 1e-9), state)

        h = (u - s) / self.steps
        for i in range(self.steps):
            t, step = s + i * h, h[:, None]
            k1 = f(t, x)
            k2 = f(t + h / 2, x + step / 2 * k1)
            k3 = f(t + h / 2, x + step / 2 * k2)
            k4 = f(t + h, x + step * k3)
            x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x


LAW = mfm.GaussianMixture(torch.tensor([[-1.0, 0.3], [0.8, -0.5]], dtype=F64), torch.tensor([0.2, 0.05], dtype=F64))


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 0.97])
def test_weights_are_the_density_ratio_for_a_gaussian(path, ratio, t):
    """log w = log posterior(x_1) − log proposal(x_1), both Gaussian: equal up to a constant of the context."""
    flow, x_t, xi = GaussianFlow(path), normal(1, 2).expand(64, 2), normal(64, 2, seed="xi")
    posterior = mfm.WeightedPosterior(flow, ratio, nodes=1)
    x_1, log_weights = posterior.push_weighted(xi, t, x_t)
    mean, variance = flow.posterior(t, x_t)
    log_target = -0.5 * ((x_1 - mean) ** 2 / variance).sum(1)
    # the proposal's density of x_1 is that of ξ, its map being affine
    log_proposal = -0.5 * (xi**2).sum(1)
    apart = log_weights - (log_target - log_proposal)
    torch.testing.assert_close(apart, apart[:1].expand(64), rtol=0, atol=1e-9 * (1 + float(log_target.abs().max())))


def test_nodes_integrate_the_score_of_a_mixture(path):
    """The error of the log-density along the line falls with the nodes: two decades from 1 to 8."""
    flow, s = MixtureFlow(path, LAW), torch.full((32,), 0.5, dtype=F64)
    mean, away = normal(32, 2), 0.5 * normal(32, 2, seed="away")
    grid = torch.linspace(0, 1, 401, dtype=F64)
    scores = torch.stack([(LAW.score(path, s, mean + g * away) * away).sum(1) for g in grid])
    exact = torch.trapezoid(scores, grid, dim=0)
    errors = [
        float((mfm.WeightedPosterior(flow, nodes=n)._log_density(s, mean, away, None) - exact).abs().max())
        for n in (1, 8)
    ]
    assert errors[1] < errors[0] / 100, errors


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_weighted_means_are_those_of_the_mixture(path, ratio):
    """Σ w x_1 against D_t(x), and Σ w ‖x_1‖² against its exact value: within 5 standard errors at the ESS met."""
    flow, n, t = MixtureFlow(path, LAW), 2_000, 0.4
    x_t = torch.tensor([[-0.3, 0.2], [0.5, 0.1]], dtype=F64)
    made = mfm.WeightedPosterior(flow, ratio, nodes=4).weighted_draws(t, x_t, n, stream(0, "weighted"))
    weights = made.log_weights.exp()
    torch.testing.assert_close(weights.sum(0), torch.ones(2, dtype=F64))
    ess = 1 / weights.square().sum(0)
    assert float(ess.min()) > 0.2 * n
    exact = LAW.posterior(path, t, x_t).draw(40_000, stream(1, "exact"))
    for f in (lambda x: x, torch.square):
        mean, spread = f(exact).mean(0), f(exact).std(0)
        got = (weights[..., None] * f(made.x_1)).sum(0)
        assert bool(((got - mean).abs() < 5 * spread * (1 / ess + 1 / 40_000).sqrt()[:, None]).all()), (got, mean)


def test_draws_are_picked_by_weight(path):
    flow, t, n = GaussianFlow(path), 0.5, 4_000
    x_t = torch.tensor([[0.8, -0.4]], dtype=F64)
    draws = mfm.WeightedPosterior(flow, 0.3).draw(t, x_t, n, stream(0, "picked"))
    assert draws.shape == (n, 1, 2)
    mean, variance = flow.posterior(t, x_t)
    # a proposal may be picked more than once: with 4 candidates a draw that adds at most half to the error
    assert bool(((draws.mean(0) - mean).abs() < 5 * 1.5 * (variance / n).sqrt()).all())
    assert bool((draws.var(0) / variance - 1).abs().max() < 5 * 1.5 * math.sqrt(2 / n))


def test_at_the_data_a_draw_is_the_state(path):
    x_t = normal(2, 2)
    t = torch.tensor([1.0, 0.5], dtype=F64)
    x_1, log_weights = mfm.WeightedPosterior(GaussianFlow(path)).push_weighted(normal(2, 2, seed="xi"), t, x_t)
    assert torch.equal(x_1[0], x_t[0])
    assert float(log_weights[0]) == 0
    assert not torch.equal(x_1[1], x_t[1])


def test_steps_compose(path):
    flow, x_t, xi = GaussianFlow(path), normal(3, 2), normal(3, 2, seed="xi")
    one, three = (mfm.WeightedPosterior(flow, steps=k).push_weighted(xi, 0.4, x_t)[0] for k in (1, 3))
    torch.testing.assert_close(one, three)
    assert [len(flow.calls), float(flow.calls[-1][1][0])] == [4, 1.0]


# -- values and gradients from weighted draws --------------------------------------------------------------------------


def linear(x: Tensor) -> Tensor:
    return x @ torch.tensor([0.7, -0.4], dtype=F64)


@pytest.mark.parametrize(
    "method",
    [Gradient(chunk=4_000), Gradient(chunk=4_000, passes=2), GradientFree(chunk=4_000)],
    ids=["g", "g, 2 passes", "gf"],
)
def test_value_gradient_weighs(path, method):
    """For N(0, STD²) and r = c·x: V = c·mean + |c|² variance/2, ∇V = c · ∂mean/∂x; a proposal of unequal weights."""
    flow, t, n = GaussianFlow(path), 0.5, 4_000
    x = torch.tensor([[0.8, -0.4]], dtype=F64)
    c = torch.tensor([0.7, -0.4], dtype=F64)
    got = mfm.value_gradient(mfm.WeightedPosterior(flow, 0.3), linear, t, x, n, method, stream(0, "v"))
    mean, variance = flow.posterior(t, x)
    value, gradient = linear(mean) + 0.5 * (c @ c) * variance, c * mean / x
    assert float(got.ess) < 0.97 * n  # the weights are not equal
    assert abs(float(got.value - value)) < 5 * float(got.std_err)
    assert float((got.gradient - gradient).norm()) < 5 * float(got.gradient_std_err)


def test_gradient_is_that_of_the_estimate(path):
    """Σ w g, the derivative of V̂ itself with the noise held: against finite differences."""
    flow, t, n, x = MixtureFlow(path, LAW, steps=4), 0.5, 6, normal(2, 2)
    posterior = mfm.WeightedPosterior(flow, 0.6)

    def estimate(x):
        return mfm.value_gradient(posterior, linear, t, x, n, "gradient", stream(0, "fixed"))

    h, got = 1e-5, estimate(x).gradient
    for axis in range(2):
        step = h * torch.eye(2, dtype=F64)[axis]
        slope = (estimate(x + step).value - estimate(x - step).value) / (2 * h)
        torch.testing.assert_close(got[:, axis], slope, rtol=1e-6, atol=1e-8)


def test_weights_are_left_out_unless_asked_for(path):
    options = DrawOptions(5)
    made = make_draws(mfm.WeightedPosterior(GaussianFlow(path)), lambda x, cond: linear(x), 0.5, normal(2, 2), options)
    assert made.log_weights is None


def test_recycled_draws_keep_their_weights(path):
    """Three contexts' draws pooled for the last: its moments within 4 %, where draws counted as equal are 20 % off."""
    flow, n, pool = GaussianFlow(path), 4_000, DrawPool(path, 3)
    x, posterior = torch.tensor([[0.8, -0.4]], dtype=F64), mfm.WeightedPosterior(flow, 0.2)
    for t in (0.4, 0.45, 0.5):
        options = DrawOptions(n, chunk=n, weighted=True)
        made = make_draws(posterior, lambda x, cond: linear(x), t, x, options, stream(0, "pool", t))
        log_base = pool.add(t, x, made)
    assert len(pool.pooled().x_1) == 3 * n
    mean, variance = flow.posterior(t, x)
    second = (log_base.exp()[..., None] * (pool.pooled().x_1 - mean).square()).sum(0)
    assert float((second / variance - 1).abs().max()) < 0.04


@pytest.mark.parametrize("method", [mfm.MFMGF(8), mfm.MFMG(8), mfm.MFMG(8, blend=False), mfm.SMC(8)])
def test_steering_by_a_flow_map_reaches_the_tilted_law(method):
    """N(0, STD²) tilted by c·x has the mean STD² c: within 4 standard errors of 256 samples, and .05 of 16 steps."""
    flow = GaussianFlow(mfm.LinearPath())
    result = mfm.steer(flow, linear, 256, method, mfm.SDE(steps=16), seed=0)
    mean = STD**2 * torch.tensor([0.7, -0.4], dtype=F64)
    assert float((result.samples.mean(0) - mean).abs().max()) < 4 * STD / math.sqrt(256) + 0.05
    # a draw: three evaluations of the drift and a jump
    assert result.cost["forwards"] >= 256 * 16 * (1 + 8 * 4)


def test_what_is_no_flow_map_is_refused(path):
    with pytest.raises(mfm.InputError, match="flow_map=True"):
        mfm.WeightedPosterior(mfm.ExactModel(path, LAW))
    with pytest.raises(mfm.InputError, match=r"in \[0, 1\]"):
        mfm.WeightedPosterior(GaussianFlow(path), ratio=1.5)
