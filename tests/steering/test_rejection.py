"""Rejection from one-step samples is exact where its bound holds; one-step best-of-N keeps the best of its own."""

import math

import pytest
import torch
from closed_forms import random_map

import metaflowmaps as mfm
from conftest import CASES, F64, PATHS
from metaflowmaps.cost import Meter
from metaflowmaps.random import stream
from metaflowmaps.steering.problem import SteeringProblem

LAW = CASES["per-component-full"].law
REWARD = mfm.rewards.LinearGaussian(torch.tensor([1.0, -0.6], dtype=F64), 0.8, 1.0)  # at most 0


def steered(method, n=8, reward=REWARD, model=None, **options):
    model = mfm.ExactModel(PATHS["linear"], LAW) if model is None else model
    return mfm.steer(model, reward, n, method, **{"seed": 0, **options})


@pytest.mark.parametrize("bound", [0.0, None], ids=["given", "learned"])
def test_rejection_samples_the_tilted_law(bound):
    n = 20_000
    got = steered(mfm.Rejection(bound=bound), n)
    tilted = LAW.tilt(REWARD)
    exact = tilted.sample(400_000, stream(1, "exact"))
    spread = exact.std(0)
    # 4.5 standard errors of a mean of n draws; those of the reference are 4.5 times smaller
    assert bool(((got.samples.mean(0) - exact.mean(0)).abs() < 4.5 * spread / math.sqrt(n)).all())
    nearest = [torch.cdist(x, tilted.means.double()).argmin(1) for x in (got.samples, exact)]
    for k in range(len(tilted.means)):
        p = float((nearest[1] == k).double().mean())
        assert abs(float((nearest[0] == k).double().mean()) - p) < 4.5 * math.sqrt(p * (1 - p) / n) + 1e-3
    assert got.info["time"].tolist() == [0.0]  # its one step begins at noise
    # it costs e^bound / E[e^r] proposals a sample, each a call of the model and one of the reward
    proposals = 1 / math.exp(float(LAW.log_evidence(REWARD)))
    pilot = 0 if bound == 0.0 else 2 * 1024 / n
    # proposals are geometric: their mean over n samples has a relative standard error below 1/√n = .007
    assert got.cost["nfe"] == pytest.approx(2 * proposals + pilot, rel=0.03)


def test_rejection_does_not_depend_on_the_batch():
    model = random_map(PATHS["linear"])
    whole = steered(mfm.Rejection(pilot=64), 9, lambda x: -x.square().sum(1), model)
    cut = steered(mfm.Rejection(pilot=64), 9, lambda x: -x.square().sum(1), model, batch_size=2, seed=whole.seeds)
    torch.testing.assert_close(whole.samples, cut.samples)


def test_rejection_refuses_a_bound_that_does_not_hold_and_a_reward_too_sharp():
    with pytest.raises(mfm.InputError, match=r"is above bound=-5"):
        steered(mfm.Rejection(bound=-5.0), 64)
    with pytest.raises(mfm.InputError, match=r"accepted 0 of 8 samples in 3 proposals each: raise max_proposals"):
        steered(mfm.Rejection(bound=100.0, max_proposals=3))


def test_rejection_holds_each_sample_to_its_bound():
    """A learned one is raised by what a sample meets, a given one holds to 1e-6 for rounding, and not to .05."""
    for seed in range(20):
        got = steered(mfm.Rejection(pilot=1), 1, seed=seed)
        assert got.rewards[0] <= got.info["bound"][0]
    with pytest.raises(mfm.InputError, match=r"is above bound=-0\.05"):
        steered(mfm.Rejection(bound=-0.05), 256)


def test_a_pilot_is_made_once_or_for_each_batch_with_conditions():
    problem = SteeringProblem(random_map(PATHS["linear"]), lambda x: x[:, 0], Meter())
    pilots, label = iter([0.0, 1.0, 2.0]), {"label": torch.zeros(2, dtype=torch.int64)}
    made = []
    for cond in (None, None, label, label):
        problem.begin(torch.arange(2), cond)
        made.append(problem.once("pilot", lambda: next(pilots)))
    assert made == [0, 0, 1, 2]


def test_one_step_best_of_n_keeps_the_best_of_its_candidates():
    model, n, samples = random_map(PATHS["linear"]), 5, 4

    def reward(x):
        return x[:, 0]

    got = steered(mfm.BestOfN(n, source="map"), samples, reward, model)
    problem = SteeringProblem(model, reward, Meter())
    problem.begin(got.seeds, None)
    noise = problem.noise("start", n * samples)
    candidates = model.push(noise, 0.0, torch.zeros_like(noise)).reshape(n, samples, 2)
    best = candidates[candidates[..., 0].argmax(0), torch.arange(samples)]
    torch.testing.assert_close(got.samples, best)
    assert got.cost["forwards"] == got.cost["reward_calls"] == n * samples
