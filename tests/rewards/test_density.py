"""λ log q(x): of a mixture, of torch's distributions, of a function."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, Uniform

import metaflowmaps as mfm
from conftest import F64, normal
from metaflowmaps.rewards import LogDensity

X = normal(6, 2)


def test_mixture_by_its_formula(case):
    parts = torch.distributions.MultivariateNormal(case.means, case.covariances).log_prob(X[:, None])
    expected = 1.6 * (case.weights * parts.exp()).sum(1).log()
    # densities above 1e-12 here, from eigenvectors on one side and a Cholesky factor on the other
    torch.testing.assert_close(LogDensity(case.law, 1.6)(X), expected, rtol=1e-11, atol=0)


def test_gradient_is_the_score_of_the_data(case, path):
    """At t = 1 the state is the data: ∇r = λ ∇ log p_1; and both are what differences say."""
    x = X.clone().requires_grad_()
    reward = LogDensity(case.law, strength=0.6)
    (gradient,) = torch.autograd.grad(reward(x).sum(), x)
    # the same formula differentiated by hand; α(1) is 6e-17 on the trigonometric path
    torch.testing.assert_close(gradient, 0.6 * case.law.score(path, 1.0, X), rtol=1e-11, atol=1e-12)
    h = 1e-5
    for axis in torch.eye(2, dtype=F64):
        difference = (reward(X + h * axis) - reward(X - h * axis)) / (2 * h)
        # h² r'''/6 < 1e-10 · 1e3, and rounding 1e-16 · 30/h = 3e-10
        torch.testing.assert_close(gradient @ axis, difference, rtol=0, atol=1e-7)


def test_distributions_of_torch():
    law = Independent(Normal(torch.tensor([0.5, -1.0], dtype=F64), 2.0), 1)
    expected = -0.5 * (((X - torch.tensor([0.5, -1.0])) / 2) ** 2 + math.log(2 * math.pi * 4)).sum(1)
    # a few roundings of numbers of order 1
    torch.testing.assert_close(LogDensity(law)(X), expected, rtol=1e-14, atol=0)


def test_a_function_and_its_condition():
    def log_q(x, cond=None):
        return -(x - (0 if cond is None else cond["centre"])).square().sum(1)

    centre = normal(6, 2, seed="centre")
    assert torch.equal(LogDensity(log_q)(X), -X.square().sum(1))
    assert torch.equal(LogDensity(log_q)(X, {"centre": centre}), -(X - centre).square().sum(1))


def test_the_dtype_is_that_of_x():
    law = Independent(Normal(torch.zeros(2, dtype=F64), 1.0), 1)
    assert LogDensity(law)(X.float()).dtype == torch.float32


def test_strength_zero_outside_the_support():
    law = Independent(Uniform(torch.zeros(2, dtype=F64), 0.1, validate_args=False), 1, validate_args=False)
    assert bool((LogDensity(law, 0.5)(X) == -torch.inf).any())
    assert not LogDensity(law, 0.0)(X).any()


def test_densities_of_coordinates_are_refused():
    law = Normal(torch.zeros((), dtype=F64), 1.0)
    with pytest.raises(mfm.InputError, match=r"shape \(6,\), got \(6, 2\).*torch\.distributions\.Independent\(…, 1\)"):
        LogDensity(law)(X)
    with pytest.raises(mfm.InputError, match=r"got float"):
        LogDensity(lambda x: 0.5)(X)
    with pytest.raises(mfm.InputError, match=r"Independent\(…, 3\)"):
        LogDensity(law)(normal(6, 2, 2, 2))


def test_a_density_is_needed():
    with pytest.raises(mfm.InputError, match="LogDensity needs an object with log_prob"):
        LogDensity(0.3)


def test_it_prints_what_it_is(case):
    assert repr(LogDensity(case.law, 2)) == "LogDensity(GaussianMixture(components=3, dim=2), strength=2)"
