"""Resamplers: unbiased, nobody of weight zero has children, low variance where it is promised."""

import math

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, normal
from metaflowmaps.random import stream
from metaflowmaps.steering.resampling import RESAMPLERS, effective, resample

SYSTEMS = 20_000
WEIGHTS = {
    "equal": [1.0, 1.0, 1.0, 1.0, 1.0],
    "skewed": [0.62, 0.05, 0.2, 0.01, 0.12],
    "zeros": [0.0, 0.35, 0.0, 0.25, 0.4, 0.0],
    "one": [0.0, 0.0, 1.0],
    "a half too many": [0.3, 0.5, 0.1, 0.1],
}


def children(kind, weights, systems=SYSTEMS, shift=0.0):
    """How many each particle has: (systems, M). Log-weights are unnormalised."""
    log_weights = torch.tensor(weights, dtype=F64).log().expand(systems, -1) + shift
    ancestors = resample(kind, log_weights, stream(0, kind))
    assert ancestors.shape == log_weights.shape
    return torch.nn.functional.one_hot(ancestors, len(weights)).sum(1).double()


@pytest.mark.parametrize("kind", RESAMPLERS)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("shift", [0.0, -800.0])
def test_unbiased(kind, name, shift):
    """E[children of m] = M w_m within 4.5 standard errors: 60 comparisons at 7e-6."""
    w = torch.tensor(WEIGHTS[name], dtype=F64)
    expected = len(w) * w / w.sum()
    got = children(kind, WEIGHTS[name], shift=shift)
    assert bool((got.sum(1) == len(w)).all())
    assert bool((got[:, w == 0] == 0).all())
    error = got.std(0) / math.sqrt(SYSTEMS)
    # where the variance is 0 the number of children is certain
    assert bool(((got.mean(0) - expected).abs() <= 4.5 * error + 1e-12).all()), (got.mean(0), expected)


@pytest.mark.parametrize("name", WEIGHTS)
def test_low_variance(name):
    """systematic: ⌊Mw⌋ or ⌈Mw⌉; residual: at least ⌊Mw⌋; stratified: within 2 of Mw; variances below multinomial's."""
    w = torch.tensor(WEIGHTS[name], dtype=F64)
    mw = len(w) * w / w.sum()
    floor, ceil = (mw + 1e-9).floor(), (mw - 1e-9).ceil()
    made = {kind: children(kind, WEIGHTS[name]) for kind in RESAMPLERS}
    assert bool(((made["systematic"] >= floor) & (made["systematic"] <= ceil)).all())
    assert bool((made["residual"] >= floor).all())
    assert float((made["stratified"] - mw).abs().max()) < 2
    # M independent choices: a binomial. Its variance to 4.5 standard errors, √2/√n relative and the fourth moment's
    # share
    p = mw / len(w)
    binomial = len(w) * p * (1 - p)
    error = 4.5 * (binomial * (1 + 2 * binomial) / SYSTEMS).sqrt() + 1e-12
    assert bool(((made["multinomial"].var(0) - binomial).abs() <= error).all())
    for kind in ("systematic", "stratified", "residual"):
        assert bool((made[kind].var(0) <= binomial + error).all())
    # stratified: one independent choice in each M-th, Σ p(1 − p) over parts of a particle's stretch that lie in each
    edges = torch.cat([torch.zeros(1, dtype=F64), (w / w.sum()).cumsum(0)]) * len(w)
    strata = torch.arange(len(w), dtype=F64)[:, None]
    part = ((edges[1:] - strata).clamp(0, 1) - (edges[:-1] - strata).clamp(0, 1)).clamp_min(0)
    expected = (part * (1 - part)).sum(0)
    assert bool(((made["stratified"].var(0) - expected).abs() <= error).all())


def test_choices_of_a_system_do_not_depend_on_another():
    """Systems are independent: correlations of children between neighbours within 4.5 standard errors of 0."""
    for kind in RESAMPLERS:
        got = children(kind, [0.61, 0.06, 0.19, 0.02, 0.12])
        white = (got - got.mean(0)) / got.std(0)
        assert float((white[1:] * white[:-1]).mean(0).abs().max()) < 4.5 / math.sqrt(SYSTEMS)


@pytest.mark.parametrize("kind", RESAMPLERS)
def test_systems_without_weight_keep_their_particles(kind):
    log_weights = torch.tensor([[0.0, -1.0, -2.0], [-torch.inf] * 3, [-torch.inf, 5.0, -torch.inf]], dtype=F64)
    got = resample(kind, log_weights, stream(0))
    assert got[1].tolist() == [0, 1, 2]
    assert got[2].tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["systematic", "stratified", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("count", [49, 1000])
def test_equal_weights_stay_as_they_are(kind, dtype, count):
    """(1/49) · 49 is below 1 in float64: nobody loses its child by a rounding."""
    got = resample(kind, torch.full((50, count), -3.7, dtype=dtype), stream(0))
    assert torch.equal(got.sort(1).values, torch.arange(count).expand(50, -1))


def test_deterministic_given_the_generator():
    log_weights = normal(4, 6)
    for kind in RESAMPLERS:
        one, again, other = (resample(kind, log_weights, stream(seed)) for seed in (0, 0, 1))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)


def test_effective_number():
    """(Σw)²/Σw², without overflow; all of them where nobody has weight (there is nobody to replace anybody by)."""
    w = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 4.0], [5.0, 5.0, 5.0]], dtype=F64)
    expected = w.sum(1) ** 2 / w.square().sum(1)
    torch.testing.assert_close(effective(w.log()), expected)
    torch.testing.assert_close(effective(w.log() + 2000), expected)
    assert effective(torch.full((1, 4), -torch.inf)).tolist() == [4.0]


def test_unknown_resampler_is_refused():
    with pytest.raises(mfm.InputError, match="did you mean 'systematic'"):
        resample("systemic", normal(1, 3))
