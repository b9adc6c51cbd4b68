"""Paths: coefficients, the hub of conversions, divided differences."""

import itertools
import math

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, coefficients, normal, uniform
from metaflowmaps.path import PREDICTIONS, make_path


def predictions(path, t, x, denoise):
    """The four predictions that D implies, by their definitions with E[I_0 | x] = (x − β D)/α."""
    alpha, beta, alpha_dot, beta_dot = (c[:, None] for c in coefficients(path, t))
    noise = (x - beta * denoise) / alpha
    return {
        "data": denoise,
        "noise": noise,
        "drift": alpha_dot * noise + beta_dot * denoise,
        "score": -noise / alpha,
    }


def test_coefficients_and_their_derivatives(path):
    t = uniform(50).requires_grad_()
    alpha, beta, alpha_dot, beta_dot = coefficients(path, t.detach())
    for f, derivative, value, slope in (
        (path.alpha, path.alpha_dot, alpha, alpha_dot),
        (path.beta, path.beta_dot, beta, beta_dot),
    ):
        torch.testing.assert_close(f(t).detach(), value, rtol=0, atol=1e-15)
        torch.testing.assert_close(derivative(t).detach(), slope, rtol=0, atol=1e-15)
        (autograd,) = torch.autograd.grad(f(t).sum(), t)
        torch.testing.assert_close(derivative(t).detach(), autograd, rtol=0, atol=1e-14)
    # the ends are exact, not "cos(π/2) = 6e-17": boundary identities rest on this
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    assert path.alpha(ends).tolist() == [1.0, 0.0]
    assert path.beta(ends).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTIONS, PREDICTIONS)))
def test_all_pairs(path, source, target):
    t, x, denoise = uniform(200, low=0.02, high=0.98), normal(200, 3), normal(200, 3, seed="D")
    expected = predictions(path, t, x, denoise)
    got = path.convert(t, x, expected[source], source, target)
    # worst conditioning: 1/α² and 1/β at 0.02 multiply rounding (1e-16) by less than 1e4
    torch.testing.assert_close(got, expected[target], rtol=1e-11, atol=1e-11)
    back = path.convert(t, x, got, target, source)
    torch.testing.assert_close(back, expected[source], rtol=1e-10, atol=1e-10)


def test_linear_shortcuts():
    path, t, x, b = mfm.LinearPath(), uniform(50, high=0.9), normal(50, 2), normal(50, 2, seed="b")
    u = t[:, None]
    torch.testing.assert_close(path.convert(t, x, b, "drift", "data"), x + (1 - u) * b)
    torch.testing.assert_close(path.convert(t, x, b, "drift", "score"), (u * b - x) / (1 - u))


def test_the_way_in_from_the_drift_is_regular_at_both_ends(path):
    x, b = normal(5, 2), normal(5, 2, seed="b")
    at_zero = b + x if path.name == "linear" else 2 / math.pi * b  # α̇_0 = −1 or 0; β̇_0 = 1 or π/2
    torch.testing.assert_close(path.to_denoise(0.0, x, b, "drift"), at_zero)
    torch.testing.assert_close(path.to_denoise(1.0, x, b, "drift"), x)


def test_sigma_squared(path):
    t = uniform(100, low=0.01)
    # linear: Eq. 14; trigonometric: (π/2)(cos³/sin + sin cos) = (π/2) cot(πt/2)
    exact = 2 * (1 - t) / t if path.name == "linear" else math.pi / torch.tan(math.pi / 2 * t)
    torch.testing.assert_close(path.sigma_squared(t), exact, rtol=1e-11, atol=1e-13)
    assert float(path.sigma_squared(1.0)) == 0
    # what it means: b = (β̇/β) x + (σ²/2) score, for whatever D
    t = uniform(100, low=0.05, high=0.95)
    x = normal(100, 2)
    p = predictions(path, t, x, normal(100, 2, seed="D"))
    _, beta, _, beta_dot = coefficients(path, t)
    identity = (beta_dot / beta)[:, None] * x + path.sigma_squared(t)[:, None] / 2 * p["score"]
    torch.testing.assert_close(identity, p["drift"], rtol=1e-10, atol=1e-10)


def test_divided_differences(path):
    s, u = uniform(200, seed="s"), uniform(200, seed="u")
    s, u = s[(u - s).abs() > 1e-2], u[(u - s).abs() > 1e-2]
    (a_s, b_s, *_), (a_u, b_u, *_) = coefficients(path, s), coefficients(path, u)
    # the quotient itself cancels: 1e-16 / 1e-2
    for got, quotient in (
        (path.alpha_slope(s, u), (a_u - a_s) / (u - s)),
        (path.beta_slope(s, u), (b_u - b_s) / (u - s)),
        (path.cross_slope(s, u), (b_u * a_s - a_u * b_s) / (u - s)),
    ):
        torch.testing.assert_close(got, quotient, rtol=0, atol=1e-13)


@pytest.mark.parametrize("gap", [0.0, 1e-9])
def test_divided_differences_at_equal_times(path, gap):
    s = torch.cat([torch.tensor([0.0, 0.5, 1.0 - 1e-9], dtype=F64), uniform(50, high=0.999)])
    alpha, beta, alpha_dot, beta_dot = coefficients(path, s)
    u = s + gap
    # the limits; at a gap h the slopes are off by h/2 times a second derivative (< 2.5)
    for got, limit in (
        (path.alpha_slope(s, u), alpha_dot),
        (path.beta_slope(s, u), beta_dot),
        (path.cross_slope(s, u), beta_dot * alpha - alpha_dot * beta),
    ):
        torch.testing.assert_close(got, limit, rtol=0, atol=1e-14 + 1.3 * gap)


def test_interpolate(path):
    x_0, x_1, t = normal(6, 2, 3), normal(6, 2, 3, seed="1"), uniform(6)
    alpha, beta, alpha_dot, beta_dot = (c.reshape(6, 1, 1) for c in coefficients(path, t))
    torch.testing.assert_close(path.interpolate(x_0, x_1, t), alpha * x_0 + beta * x_1)
    torch.testing.assert_close(path.velocity(x_0, x_1, t), alpha_dot * x_0 + beta_dot * x_1)
    torch.testing.assert_close(path.interpolate(x_0, x_1, 0.3)[2], path.interpolate(x_0, x_1, t * 0 + 0.3)[2])
    assert torch.equal(path.interpolate(x_0, x_1, 0.0), x_0)
    assert torch.equal(path.interpolate(x_0, x_1, 1.0), x_1)
    assert path.interpolate(x_0.float(), x_1.float(), 0.3).dtype == torch.float32


def test_time_of_ratio(path):
    t = torch.cat([torch.tensor([0.0, 1.0], dtype=F64), uniform(50)])
    scale = 0.1 + uniform(52, seed="scale")
    got = path.time_of_ratio(scale * path.beta(t), scale * path.alpha(t))
    torch.testing.assert_close(got, t, rtol=0, atol=1e-15)


def test_names_and_equality(path):
    assert make_path(path.name) == path
    assert mfm.LinearPath() != mfm.TrigonometricPath()
    with pytest.raises(mfm.InputError, match="did you mean 'linear'"):
        make_path("liner")
    with pytest.raises(mfm.InputError, match="allowed are data, drift, noise, score"):
        path.convert(0.5, normal(2, 2), normal(2, 2), "velocity", "data")


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan, math.inf])
def test_times_outside_are_refused(path, t):
    x = normal(2, 2)
    for call in (lambda: path.interpolate(x, x, t), lambda: path.sigma_squared(t)):
        with pytest.raises(mfm.InputError, match=r"must lie in \[0, 1\]"):
            call()
    with pytest.raises(mfm.InputError, match="same shape"):
        path.interpolate(x, normal(3, 2), 0.5)
    with pytest.raises(mfm.InputError, match=r"shape \(2,\)"):
        path.interpolate(x, x, torch.tensor([0.1, 0.2, 0.3]))
