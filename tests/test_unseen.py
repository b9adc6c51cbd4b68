"""A mode that draws at (t, x) have not seen is said, whatever their own errors claim; good estimates are quiet."""

import warnings

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64
from metaflowmaps.random import stream

PATH = mfm.LinearPath()
LAW = mfm.GaussianMixture(torch.tensor([[0.0, 0, 0], [5, 0, 0], [0, 4, 0]], dtype=F64), 0.25)
# e^{3 x_1} up to a factor: at x = 0, t = .5 the second mode has 5e-5 of the posterior and most of its tilt
STEEP = mfm.rewards.LinearGaussian(torch.tensor([1.0, 0, 0], dtype=F64), 300.0, 10.0)
MILD = mfm.rewards.LinearGaussian(torch.tensor([1.0, 0, 0], dtype=F64), 0.5, 1.0)


def estimated(reward, n, t=0.5, x=None, seed=0, law=LAW, cond=None):
    """The estimate and what was said of it."""
    x = torch.zeros(1, 3, dtype=F64) if x is None else x
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = mfm.value_gradient(mfm.ExactPosterior(PATH, law), reward, t, x, n, "gradient-free", stream(seed), cond)
    return out, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("n", [512, 2048])
def test_a_mode_that_the_draws_missed_is_said(n):
    """The gradient is off by 40 and 60 of its own standard errors at an ESS of over a hundred."""
    x = torch.zeros(1, 3, dtype=F64, requires_grad=True)
    value = LAW.value(PATH, 0.5, x, STEEP)
    (exact,) = torch.autograd.grad(value.sum(), x)
    value = value.detach()
    out, said = estimated(STEEP, n)
    assert float((out.gradient - exact).norm() / out.gradient_std_err) > 30
    assert float(out.ess) > 100
    (note,) = said
    assert "missed a mode at 1 of 1 states" in note
    assert "\n" not in note
    # what the pool adds is what is missing: 1.9, and the pool's own error is a few tenths
    gap = float(note.split("up to ")[1].split()[0])
    assert gap == pytest.approx(float(value - out.value), abs=0.5)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("seed", range(4))
def test_good_estimates_are_quiet(t, seed):
    x = PATH.interpolate(torch.randn(32, 3, generator=stream(seed), dtype=F64), LAW.sample(32, stream(seed)), t)
    assert estimated(MILD, 64, t, x, seed)[1] == []


def test_nothing_is_said_where_no_pool_reaches_the_states():
    """Near t = 1 in 16 dimensions none of the pool belongs to a posterior: its best would be a guess."""
    law = mfm.GaussianMixture(torch.zeros(1, 16, dtype=F64), 1.0)
    away = mfm.rewards.LinearGaussian(torch.eye(16, dtype=F64)[0], 5.0, 0.1)
    x = 0.97 * law.sample(16, stream(0))
    assert estimated(away, 64, 0.97, x, law=law)[1] == []


def test_a_posterior_that_does_not_know_pure_noise_keeps_its_estimate():
    class Late(mfm.ExactPosterior):
        def draw(self, t, x_t, num_draws, generator=None, cond=None):
            if float(torch.as_tensor(t).min()) == 0:
                raise ValueError("t = 0 was never learned")
            return super().draw(t, x_t, num_draws, generator, cond)

    with pytest.warns(UserWarning, match=r"was not looked at \(ValueError: t = 0 was never learned\)"):
        out = mfm.value_gradient(Late(PATH, LAW), MILD, 0.5, LAW.sample(64, stream(0)), 16, "gradient-free", stream(1))
    assert bool(out.gradient.isfinite().all())


def test_nothing_is_said_at_the_last_time():
    """The posterior is the state there, and the kernel a point."""
    glass = mfm.GlassPosterior(PATH, lambda t, x: LAW.drift(PATH, t, x), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = mfm.value_gradient(glass, MILD, 1.0, LAW.sample(64, stream(0)), 8, "gradient", stream(1))
    assert bool(out.gradient.isfinite().all())


def test_the_pool_is_an_eighth_of_the_draws_and_changes_no_number():
    seen = []

    def reward(x):
        seen.append(len(x))
        return MILD(x)

    x = torch.zeros(4, 3, dtype=F64)
    few = estimated(reward, 120, x=x)[0]
    assert sum(seen) == 4 * 120  # too few to pay for a pool
    seen.clear()
    estimated(reward, 256, x=x)
    assert sum(seen) == 4 * 256 + 4 * 256 // 8
    assert torch.equal(few.gradient, estimated(MILD, 120, x=x)[0].gradient)
    seen.clear()
    estimated(reward, 256, x=x, cond={"label": torch.tensor([0, 1, 0, 0])})  # one pool is not everybody's
    assert sum(seen) == 4 * 256
