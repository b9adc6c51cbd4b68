"""Rolling forecasts and the value of a context, on a Gaussian process, where an untrained map is exact."""

import pytest
import torch

import metaflowmaps as mfm
from metaflowmaps.errors import InputError
from metaflowmaps.laws.processes import ornstein_uhlenbeck
from metaflowmaps.metrics.two_sample import two_sample_test
from metaflowmaps.networks import MLPConfig
from metaflowmaps.random import stream
from test_contexts import small_map

LAW = ornstein_uhlenbeck()


def linear(x):
    """A reward of which everything is known: r = 2x."""
    return 2 * x[:, 0]


@pytest.fixture(scope="module")
def model():
    return small_map(process=LAW)


def at_zero(value=1.0, rows=1):
    return mfm.Context(torch.full((rows, 1, 1), value), torch.tensor([0.0]))


def test_members_of_a_forecast_are_joint_samples(model):
    times = [0.25, 1.0, 1.5]
    members = mfm.roll(model, at_zero(), times, 600, seed=0)
    assert members.shape == (600, 1, 3, 1)
    # exact paths from X_0 = 1, one step after the other
    noise, x, paths = torch.randn(600, 3, generator=stream(0, "exact")), torch.ones(600), []
    for k, step in enumerate((0.25, 0.75, 0.5)):
        keep = torch.exp(torch.tensor(-step))
        x = keep * x + (1 - keep**2).sqrt() * noise[:, k]
        paths.append(x)
    exact = torch.stack(paths, 1)
    assert two_sample_test(members[:, 0, :, 0], exact, generator=stream(0, "test")).p_value > 0.01


def test_a_member_depends_on_its_own_seed_alone(model):
    seeds = torch.arange(5)
    whole = mfm.roll(model, at_zero(), [0.5, 1.0], 5, seed=seeds)
    torch.testing.assert_close(mfm.roll(model, at_zero(), [0.5, 1.0], 1, seed=seeds[3:4])[0], whole[3])


def test_a_forecast_keeps_the_latest_observations_and_no_more(model):
    long = mfm.roll(model, at_zero(rows=2), [0.25 * k for k in range(1, 9)], 3)
    assert long.shape == (3, 2, 8, 1)
    assert bool(long.isfinite().all())


def test_the_value_of_a_context_and_its_gradient_are_exact_for_a_linear_reward(model):
    keep = float(torch.exp(torch.tensor(-0.5)))
    context = at_zero(rows=3).at(0.5)
    found = mfm.observation_gradient(model, linear, context, 4000, generator=stream(0, "value"))
    # r = 2x on N(keep, 1 − keep²): log E e^r = 2 keep + 2 (1 − keep²), and d/dx_0 = 2 keep for every draw
    expected = 2 * keep + 2 * (1 - keep**2)
    assert bool(((found.value - expected).abs() < 5 * found.std_err).all())
    torch.testing.assert_close(found.gradient, torch.full((3, 1, 1), 2 * keep), rtol=2e-3, atol=0)
    assert found.draws.shape == (4000, 3, 1)


def test_what_no_observation_has_is_refused(model):
    context = at_zero().at(0.5)
    with pytest.raises(InputError, match="no Tweedie formula"):
        mfm.observation_gradient(model, linear, context, 4, method="gradient-free")
    with pytest.raises(InputError, match="not differentiable"):
        mfm.observation_gradient(model, lambda x: x[:, 0].detach(), context, 4)
    plain = mfm.MetaFlowMap(MLPConfig(width=8, depth=2).network((1,)), mfm.LinearPath())
    for given, times, words in (
        ((model, context), [], "at least one time"),
        ((model, context), 1.0, "a sequence of numbers"),
        ((model, context), "ab", "a sequence of numbers"),
        ((model, torch.zeros(1, 1, 1)), [1.0], r"mfm\.Context"),
        ((plain, context), [1.0], "reads no observations"),
    ):
        with pytest.raises(InputError, match=words):
            mfm.roll(*given, times, 4)


def test_rejection_and_steering_run_given_a_context(model):
    cond = at_zero().at(0.5).repeated(150).conditions()
    keep = float(torch.exp(torch.tensor(-0.5)))
    variance = 1 - keep**2
    # e^{r} with r = −(x − 1)²/(2 · .25) on N(keep, variance)
    reward = mfm.rewards.LinearGaussian(torch.ones(1, 1), torch.ones(1), 0.5)
    precision = 1 / variance + 4
    mean, std = (keep / variance + 4) / precision, precision**-0.5
    for method in (mfm.Rejection(bound=0.0), mfm.MFMGF(num_draws=8)):
        samples = mfm.steer(model, reward, 150, method, mfm.ODE(steps=20), cond=cond, seed=0).samples[:, 0]
        # five standard errors of 150 samples, and .1 of the spread for what 20 steps and 8 draws leave
        assert abs(float(samples.mean()) - mean) < (5 / 150**0.5 + 0.1) * std
        assert float(samples.std()) == pytest.approx(std, rel=5 / 300**0.5 + 0.1)
