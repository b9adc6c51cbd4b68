"""Processes with exact posteriors, against recursions and formulas that know nothing of covariances."""

import math

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64
from metaflowmaps.errors import InputError
from metaflowmaps.laws.processes import (
    ProcessMixture,
    autoregressive,
    brownian,
    conditioned,
    integrated_brownian,
    ornstein_uhlenbeck,
    two_ornstein_uhlenbecks,
)
from metaflowmaps.random import stream


def context(values, times, query, **more):
    """One row of scalar observations."""
    return mfm.Context(torch.tensor(values, dtype=F64).reshape(1, -1, 1), torch.tensor(times), query=query, **more)


def forecast(law, values, times, query):
    """Mean and variance of X_r."""
    posterior = law.given(context(values, times, query))
    return float(posterior.mean), float(posterior.variance)


def kalman(step, values, times, query, state, spread):
    """The filter without observation noise: predict by ``step(h) -> (A, Q)``, take the first coordinate, predict r."""
    mean, cov, now, seen = state.clone(), spread.clone(), 0.0, torch.eye(2, dtype=F64)[:1]
    for time, value in [*zip(times, values, strict=True), (query, None)]:
        a, q = step(time - now)
        mean, cov, now = a @ mean, a @ cov @ a.T + q, time
        if value is not None:
            gain = cov @ seen.T / (seen @ cov @ seen.T)
            mean, cov = mean + gain[:, 0] * (value - mean[0]), cov - gain @ seen @ cov
    return float(mean[0]), float(cov[0, 0])


def test_integrated_brownian_motion_is_what_the_kalman_filter_says():
    def step(h):
        return (
            torch.tensor([[1, h], [0, 1]], dtype=F64),
            torch.tensor([[h**3 / 3, h**2 / 2], [h**2 / 2, h]], dtype=F64),
        )

    values, times = [0.4, -0.1, 0.7], [0.5, 1.25, 2.0]
    expected = kalman(step, values, times, 3.5, torch.zeros(2, dtype=F64), torch.zeros(2, 2, dtype=F64))
    # conditioning adds 1e-10 of the variance on the diagonal, and the process is smooth: condition number 1e3
    assert forecast(integrated_brownian(), values, times, 3.5) == pytest.approx(expected, rel=1e-6)


def test_a_second_order_autoregression_is_what_the_kalman_filter_says():
    first, second = 1.2, -0.5
    a = torch.tensor([[first, second], [1, 0]], dtype=F64)
    rho = first / (1 - second)
    noise = 1 - first * rho - second * (first * rho + second)
    q = torch.tensor([[noise, 0], [0, 0]], dtype=F64)

    def step(h):
        mean, cov = torch.eye(2, dtype=F64), torch.zeros(2, 2, dtype=F64)
        for _ in range(round(h)):
            mean, cov = a @ mean, a @ cov @ a.T + q
        return mean, cov

    values, times = [0.3, -0.4, 1.1], [0, 1, 4]
    stationary = torch.tensor([[1, rho], [rho, 1]], dtype=F64)
    expected = kalman(step, values, times, 7, torch.zeros(2, dtype=F64), stationary)
    found = forecast(autoregressive(first, second), values, [0.0, 1.0, 4.0], 7.0)
    assert found == pytest.approx(expected, rel=1e-8)  # 1e-10 of the variance on the diagonal


def test_an_ornstein_uhlenbeck_process_forgets_all_but_the_last_observation():
    mean, variance = forecast(ornstein_uhlenbeck(1.3, 0.7, 0.2), [5.0, 1.0], [0.0, 1.0], 1.5)
    assert mean == pytest.approx(0.2 + 0.8 * math.exp(-1.3 * 0.5), rel=1e-8)
    assert variance == pytest.approx(0.49 * (1 - math.exp(-1.3)), rel=1e-8)


def test_between_two_ends_brownian_motion_is_a_bridge():
    values, times = [1.0, -0.5], [1.0, 3.0]
    mean, variance = forecast(brownian(2.0), values, times, 1.5)
    assert mean == pytest.approx(1.0 - 1.5 * 0.25, rel=1e-8)
    assert variance == pytest.approx(4 * 0.5 * 1.5 / 2, rel=1e-8)


def test_paths_have_the_covariance_of_their_process():
    times, n = torch.tensor([0.0, 0.5, 2.0]), 20_000
    for law in (ornstein_uhlenbeck(), integrated_brownian(), autoregressive(0.5, 0.3)):
        drawn = law.sample(times, n, stream(0, "paths"))[..., 0].double()
        expected = law.covariance(times, times)
        scale = expected.diagonal().sqrt()
        # an entry of a sample covariance errs by at most √(2/n) of the two spreads; five of them
        assert bool(
            ((drawn.T @ drawn / n - expected).abs() <= 5 * (2 / n) ** 0.5 * scale * scale[:, None] + 1e-12).all()
        )


def test_a_mixture_weighs_its_processes_by_what_was_seen():
    law = two_ornstein_uhlenbecks(apart=3.0)
    posterior = law.given(context([0.4], [0.0], 2.0))
    evidence = [math.exp(-0.5 * (0.4 - level) ** 2 / 0.25) for level in (-1.5, 1.5)]
    assert posterior.weights[0, 1].item() == pytest.approx(evidence[1] / sum(evidence), rel=1e-8)
    empty = law.given(mfm.Context(torch.zeros(1, 0, 1), torch.zeros(0), query=1.0))
    assert empty.weights.tolist() == [[0.5, 0.5]]
    assert empty.means[0, :, 0].tolist() == [-1.5, 1.5]


def test_a_masked_observation_changes_no_bit_of_a_posterior():
    law = two_ornstein_uhlenbecks()
    plain = law.given(context([0.4, 1.0], [0.0, 1.0], 2.0))
    masked = law.given(context([0.4, torch.nan, 1.0], [0.0, 0.5, 1.0], 2.0, mask=torch.tensor([True, False, True])))
    assert torch.equal(plain.means, masked.means)
    assert torch.equal(plain.weights, masked.weights)
    assert torch.equal(plain.variance, masked.variance)


def test_whatever_stands_where_nothing_was_seen_has_no_part_in_conditioning():
    among, across = torch.eye(3, dtype=F64)[None] + 0.5, torch.tensor([[0.3, 0.2, 0.7]], dtype=F64)
    residual, mask = torch.tensor([[[1.0], [2.0], [9.0]]], dtype=F64), torch.tensor([[True, True, False]])
    variance = torch.ones(1, dtype=F64)
    full = conditioned(among[:, :2, :2], across[:, :2], variance, residual[:, :2], mask[:, :2])
    for part, other in zip(conditioned(among, across, variance, residual, mask), full, strict=True):
        torch.testing.assert_close(part, other)


def test_posteriors_of_processes_are_differentiable_in_what_was_seen():
    seen = context([0.4, 1.0], [0.0, 1.0], 2.0)
    seen.values.requires_grad_()
    torch.autograd.gradcheck(
        lambda v: two_ornstein_uhlenbecks().given(mfm.Context(v, seen.times, query=2.0)).mean, (seen.values,)
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: autoregressive(1.0, 0.5), "no stationary law"),
        (lambda: ornstein_uhlenbeck(rate=-1), "rate must be a positive"),
        (lambda: ProcessMixture([ornstein_uhlenbeck()], [0.5]), "sum to 1"),
        (lambda: ProcessMixture([ornstein_uhlenbeck(), brownian(dim=2)]), "one dim"),
    ],
)
def test_impossible_processes_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()
