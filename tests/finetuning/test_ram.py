"""RAM's fixed point: the tilted drift where the reward's covariance is constant, otherwise off by a known amount."""

import math

import pytest
import torch
from exact import LEVEL, LOUD, Case, MixtureMap, features, z_scores

import metaflowmaps as mfm
from conftest import F64
from metaflowmaps.cost import Meter
from metaflowmaps.finetuning import RAM, TuningSetup
from metaflowmaps.finetuning.tuning_problem import TuningProblem
from metaflowmaps.random import stream

ROWS, POOL = 10_000, 100_000  # a row in ten shares its endpoint with another: standard errors are 5 % larger at most
GENTLE = 0.1  # of the cases' rewards: r − c stays above −1
DELTA = 1e-3  # of differences in a: of second order


def ram(case, law, reward, method=RAM()):
    """RAM on exact endpoints of the student's law."""
    problem = TuningProblem(MixtureMap(case.path, case.law, case.mean, case.std), reward)
    objective = method.start(TuningSetup(problem, None, ROWS, 0))
    objective.size = POOL

    def endpoints(model, n, step):
        x_1 = model.network.law.sample(n, stream(step))
        return x_1, {}, problem.rewards(x_1, {}).double()

    objective.endpoints = endpoints
    return objective.batch(MixtureMap(case.path, law, case.mean, case.std), 0)


def tilted(case, strength):
    reward = case.reward
    return case.law.tilt(mfm.rewards.LinearGaussian(reward.A, reward.y, reward.noise_std, strength))


def largest_z(batch, answer, bias=0.0):
    """Of the mean of the regression's gradient at ``answer``, less a bias (B, d)."""
    residual = answer - batch.target - batch.gain[:, None] * (batch.velocity - answer)
    return float(z_scores(residual - bias, features(batch)).abs().max())


def test_a_linear_reward_on_a_gaussian_is_met_exactly(path):
    """p_1 e^{k·x} is p_1 moved by s² k, with one and the same covariance of the reward on the way."""
    case, slope = Case("gaussian-2d", path), torch.tensor([0.2, -0.1], dtype=F64)
    moved = mfm.GaussianMixture(case.law.means + case.std**2 * slope, case.std**2)
    batch = ram(case, moved, lambda x: x @ slope.to(x))
    assert batch.gain.min() > -1
    assert largest_z(batch, case.answer(batch, moved)) < LEVEL
    assert largest_z(batch, case.answer(batch, case.law)) > LOUD


@pytest.mark.parametrize("name", ["gaussian-2d", "mixture-1d", "mixture-2d"])
def test_elsewhere_it_is_off_by_the_covariances_change(name, path):
    """At the tilted law the residual's mean is b* − b − db/da, a from 0 to 1: known, and of second order in r."""
    case = Case(name, path)
    batch = ram(case, tilted(case, GENTLE), lambda x: GENTLE * case.reward(x))
    assert batch.gain.min() > -1

    def bias(strength):
        behind, there, ahead = (case.answer(batch, tilted(case, strength + d)) for d in (-DELTA, 0.0, DELTA))
        return there - case.answer(batch, case.law) - strength * (ahead - behind) / (2 * DELTA)

    assert largest_z(batch, case.answer(batch, tilted(case, GENTLE)), bias(GENTLE)) < LEVEL
    assert largest_z(batch, case.answer(batch, case.law)) > LOUD
    ratio = float(bias(GENTLE / 10).square().mean() / bias(GENTLE / 20).square().mean())
    assert math.sqrt(ratio) == pytest.approx(4, rel=0.05)  # the next order is a hundredth of it, or two


def test_gains_stay_above_minus_one():
    """An endpoint far below the mean is repelled no more than one without weight is; so is a forbidden one."""
    case = Case("gaussian-1d", mfm.LinearPath())
    reward = mfm.rewards.BlackBox(lambda x: torch.where(x[:, 0] < 0, -torch.inf, 3 * x[:, 0]))
    batch = ram(case, case.law, reward)
    assert batch.gain.min() == -1
    assert batch.gain.isfinite().all()
    assert (batch.gain > 0).any()


def test_a_quarter_of_the_pool_is_replaced_in_turn():
    case = Case("gaussian-1d", mfm.LinearPath())
    objective = RAM(pool=64, pool_steps=1, refresh_every=2).start(TuningSetup(case.problem(), None, 8, 0))
    objective.batch(case.student(), 0)
    for step in range(1, 9):
        before, rewards = objective.pool.clone(), objective.rewards.clone()
        objective.batch(case.student(), step)
        changed = (objective.pool != before).any(1)
        quarter = step // 2 % 4
        assert changed.nonzero()[:, 0].tolist() == ([] if step % 2 else list(range(16 * quarter, 16 * quarter + 16)))
        assert torch.equal(changed, objective.rewards != rewards)


def test_calls_are_counted_as_hooks_count_them():
    case, meter = Case("gaussian-2d", mfm.LinearPath()), Meter()
    problem = case.problem(meter.counted(case.reward, "reward_calls", "reward_backwards"))
    method = RAM(pool=64, pool_steps=3, refresh_every=2)
    objective = method.start(TuningSetup(problem, None, 50, 0))
    student = case.student()
    for network in (problem.base.network, student.network):
        meter.watch(network)
    with meter:
        for step in range(5):
            objective(student, objective.batch(student, step)).sum().backward()
    assert problem.calls == {name: getattr(meter, name) for name in problem.calls}
    assert problem.calls["forwards"] == 5 * 50 * 2 + method.pool_evaluations(5)
    assert problem.calls["reward_calls"] == 64 + 2 * 16
    assert problem.calls["reward_backwards"] == 0
    RAM().check_reward(declared=False)
