"""Resampling of a pool of one-step samples: consistent for the tilted law, its evidence unbiased, n calls a sample."""

import math
from dataclasses import replace

import pytest
import torch
from closed_forms import random_map

import metaflowmaps as mfm
from conftest import CASES, F64, PATHS
from metaflowmaps.cost import Meter
from metaflowmaps.random import stream
from metaflowmaps.steering.problem import SteeringProblem

LAW = CASES["per-component-full"].law
EXACT = mfm.ExactModel(PATHS["linear"], LAW)
REWARD = mfm.rewards.LinearGaussian(torch.tensor([1.0, -0.6], dtype=F64), 0.8, 0.5)


def test_pool_samples_the_tilted_law_and_knows_its_evidence():
    """A pool of 4,096 · 16, ESS above 10,000: means within 4.5 standard errors of 4,096 chosen and of the pool."""
    n = 4096
    got = mfm.steer(EXACT, REWARD, n, mfm.Resampling(n=16), seed=0, batch_size=16 * n)
    exact = LAW.tilt(REWARD).sample(400_000, stream(1, "exact"))
    pool = float(got.info["pool_ess"])
    assert pool > 10_000
    bound = 4.5 * exact.std(0) * math.sqrt(1 / n + 1 / pool)
    assert bool(((got.samples.mean(0) - exact.mean(0)).abs() < bound).all())
    # relative standard error of the mean of e^r over P proposals: √(1/ESS − 1/P)
    error = 4.5 * math.sqrt(1 / pool - 1 / (16 * n))
    assert abs(float(got.info["log_evidence"]) - float(LAW.log_evidence(REWARD))) < error
    assert got.cost["nfe"] == pytest.approx(32)  # a call and a reward a proposal


def test_pool_of_one_sample_by_hand():
    """particles=1: of n candidates one, by the softmax of their rewards; nothing depends on the batch."""
    model, n, samples = random_map(PATHS["linear"]), 5, 3000

    def reward(x):
        return 2 * x[:, 0]

    method = mfm.Resampling(n=n, particles=1, resampler="multinomial")
    got = mfm.steer(model, reward, samples, method, seed=0, batch_size=15_000)
    problem = SteeringProblem(model, reward, Meter())
    problem.begin(got.seeds, None)
    noise = problem.noise("start", n * samples)
    candidates = model.push(noise, 0.0, torch.zeros_like(noise)).reshape(n, samples, 2)
    weights = (2 * candidates[..., 0]).softmax(0)
    chosen = (candidates == got.samples).all(2)
    torch.testing.assert_close(chosen.sum(0), torch.ones(samples, dtype=torch.int64))
    # each candidate is chosen as often as its weights say: a count of independent choices, 4.5 standard errors
    for k in range(n):
        w = weights[k].detach()
        assert abs(float(chosen[k].sum() - w.sum())) < 4.5 * float((w * (1 - w)).sum().sqrt())
    part = mfm.steer(model, reward, 7, method, seed=got.seeds[:7], batch_size=10)
    torch.testing.assert_close(part.samples, got.samples[:7])


@pytest.mark.parametrize("resampler", ["systematic", "stratified", "multinomial", "residual"])
def test_every_sample_of_a_pool_is_one_of_its_proposals(resampler):
    """Two pools of 3 samples, 4 proposals each: none crosses over, and one that has all the weight is all there is."""
    model, method = random_map(PATHS["linear"]), mfm.Resampling(n=4, particles=3, resampler=resampler)
    got = mfm.steer(model, lambda x: 1e4 * x[:, 0], 6, method, seed=0)
    problem = SteeringProblem(model, lambda x: x[:, 0], Meter())
    problem.begin(got.seeds[:2], None)  # row m·S + s: the seeds of the two systems come first
    noise = problem.noise("start", 24)
    candidates = model.push(noise, 0.0, torch.zeros_like(noise)).reshape(12, 2, 2)
    best = candidates[candidates[..., 0].argmax(0), torch.arange(2)]
    torch.testing.assert_close(got.samples, best.repeat(3, 1))


def test_pool_refuses_what_it_cannot_share():
    with pytest.raises(mfm.InputError, match="multiple"):
        mfm.steer(EXACT, REWARD, 7, mfm.Resampling(particles=2))
    with pytest.raises(mfm.InputError, match="n must be at least 1"):
        mfm.Resampling(n=0)


def test_dps_scale_scales_the_shift_and_zero_is_unsteered():
    """Euler from t = 0.5 in one step: x + h b + h c scale shift, linear in the scale."""
    model = random_map(PATHS["linear"])

    def reward(x):
        return -x.square().sum(1)

    def at(method):
        return mfm.steer(model, reward, 9, method, mfm.ODE(steps=1, grid=[0.04, 1.0]), seed=3).samples

    base, half, full = at(mfm.Unsteered()), at(mfm.DPS(scale=0.5)), at(mfm.DPS())
    torch.testing.assert_close(at(mfm.DPS(scale=0.0)), base)
    torch.testing.assert_close(half - base, (full - base) / 2)
    assert float((full - base).abs().max()) > 0.01


def test_tempered_tds_keeps_its_evidence():
    """Twists may be anything that ends in e^r: a tempered, half-guided run has the evidence of the plain one."""
    truth = float(LAW.log_evidence(REWARD))
    for options in ({}, {"temper": 0.5, "scale": 0.3}):
        result = mfm.steer(EXACT, REWARD, 64 * 64, mfm.TDS(particles=64, **options), mfm.SDE(steps=40), seed=0)
        evidence = result.info["log_evidence"].exp()
        # 4.5 standard errors of the mean over 64 systems, and 2 % for 40 steps
        error = 4.5 * float(evidence.std() / math.sqrt(len(evidence) - 1)) + 0.02 * math.exp(truth)
        assert abs(float(evidence.mean()) - math.exp(truth)) < error, options


def test_tds_scales_its_proposals_and_tempers_its_twists():
    """What the evidence cannot show, since weights make up for it: scale times the shift, and ψ^γ with γ = t/temper."""
    model, x = random_map(PATHS["linear"]), torch.randn(6, 2, generator=torch.Generator().manual_seed(0))

    def reward(x):
        return -x.square().sum(1)

    problem = SteeringProblem(model, reward, Meter())
    problem.begin(torch.zeros(1, dtype=torch.int64), None)
    full, part = (mfm.TDS(scale=scale).twist(problem, None, 0.4, x) for scale in (1.0, 0.3))
    torch.testing.assert_close(part.shift, 0.3 * full.shift)
    assert float(full.shift.abs().max()) > 0.01
    plain = mfm.TDS(threshold=0.0)  # nobody is resampled
    kept = []
    for temper in (0.0, 0.8, 0.2):
        method, moves = replace(plain, temper=temper), mfm.SDE(steps=2)
        with torch.no_grad():
            kept.append(method.step(problem, moves, method.start(problem, x), 0.4, 0.7)[0].log_twist)
    torch.testing.assert_close(kept[1], 0.5 * kept[0])
    torch.testing.assert_close(kept[2], kept[0])
