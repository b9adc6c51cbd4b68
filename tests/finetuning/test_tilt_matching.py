"""Tilt matching's fixed point is the tilted drift one level on, from endpoints of the level before; its bill."""

import copy
import math

import pytest
import torch
from exact import LEVEL, LOUD, MEAN, STD, Case, MixtureMap, Round, features, gaussian_map, z_scores

import metaflowmaps as mfm
from conftest import F64, normal, uniform
from metaflowmaps.cost import Meter
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning import TiltMatching, TuningSetup
from metaflowmaps.finetuning.tuning_problem import TuningProblem, student_flow
from metaflowmaps.random import stream

ROWS, POOL = 10_000, 100_000  # a row in ten shares its endpoint with another: standard errors are 5 % larger at most
DELTA = 1e-3  # of a central difference in a: its error is DELTA² times a third derivative of order 1


def tilted(case, strength):
    """p_1 e^{a r}."""
    reward = case.reward
    if not strength:
        return case.law
    return case.law.tilt(mfm.rewards.LinearGaussian(reward.A, reward.y, reward.noise_std, strength))


def exact_map(case, strength):
    return MixtureMap(case.path, tilted(case, strength), case.mean, case.std)


def matching(case, method, start=0.0, steps=8, reward=None):
    """Tilt matching from p_1 e^{a r} with a = ``start``, on exact endpoints."""
    reward = reward or case.reward
    problem = TuningProblem(exact_map(case, start), reward)
    objective = method.start(TuningSetup(problem, None, ROWS, 0, steps=steps))
    objective.size = POOL

    def endpoints(model, n, step):
        x_1 = model.network.law.sample(n, stream(step))
        return x_1, {}, problem.rewards(x_1, {})

    objective.endpoints = endpoints
    return objective


def residual(batch, answer):
    """What the regression's gradient is the mean of, where the student is ``answer``."""
    return answer - batch.target - batch.gain[:, None] * (batch.velocity - answer)


def largest_z(batch, answer):
    return float(z_scores(residual(batch, answer), features(batch)).abs().max())


# -- the fixed point ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian-2d", "mixture-1d", "mixture-2d"])
def test_each_level_has_the_next_tilted_drift_as_its_fixed_point(name, path):
    """Three levels on the exact law of each; eight steps are 2 of the first, 2 of the second and 4 of the last."""
    case = Case(name, path)
    objective, reached = matching(case, TiltMatching(levels=3, share=0.9)), [0.0]
    for level in range(3):
        batch = objective.batch(exact_map(case, reached[-1]), 2 * level)
        reached.append(objective.end)
        assert objective.level == level
        assert largest_z(batch, case.answer(batch, tilted(case, objective.end))) < LEVEL
        assert largest_z(batch, case.answer(batch, tilted(case, objective.a))) > LOUD
    assert 0 < reached[1] < reached[2] < reached[3] == 1


@pytest.mark.parametrize("name", ["gaussian-2d", "mixture-1d", "mixture-2d"])
def test_the_explicit_form_takes_an_euler_step_along_the_covariance(name, path):
    """In one step of h = 3 from a = .3: b_a + h db/da, which is not the drift at a + h."""
    case, start, h = Case(name, path), 0.3, 3.0
    steep = lambda x: h * case.reward(x)  # noqa: E731
    batch = matching(case, TiltMatching("explicit", levels=1), start, reward=steep).batch(case.student(), 0)
    below, above = (case.answer(batch, tilted(case, start + d)) for d in (-DELTA, DELTA))
    euler = case.answer(batch, tilted(case, start)) + h * (above - below) / (2 * DELTA)
    assert largest_z(batch, euler) < LEVEL
    assert largest_z(batch, case.answer(batch, tilted(case, start + h))) > LOUD
    assert not batch.gain.any()  # the student is no part of its target


def test_the_implicit_residual_is_of_the_order_of_the_step():
    """Its mean square at the answer falls with h²; that of flow matching by weights alone stays where it is."""
    case, spread = Case("mixture-1d", mfm.LinearPath()), {}
    for h in (0.02, 0.04):
        small = lambda x, h=h: h * case.reward(x)  # noqa: E731
        batch = matching(case, TiltMatching(levels=1), reward=small).batch(case.student(), 0)
        answer = case.answer(batch, tilted(case, h))
        weighted = (1 + batch.gain[:, None]) * (answer - batch.velocity)
        spread[h] = [float(r.square().mean()) for r in (residual(batch, answer), weighted)]
    ours, weights = zip(*spread.values(), strict=True)
    assert ours[1] / ours[0] == pytest.approx(4, rel=0.1)  # the next order is h of it
    assert weights[1] / weights[0] == pytest.approx(1, rel=0.1)
    assert ours[1] < 0.01 * weights[1]


def test_the_loss_has_the_gradient_of_the_weighted_residual(path):
    """2 (w (b̂ − u) + u − b_a) in the student, row by row; float64."""
    case = Case("gaussian-2d", path)
    objective, student = matching(case, TiltMatching(levels=1)), case.student()
    batch = objective.batch(student, 0).rows(0, 50)
    objective(student, batch).sum().backward()
    ours = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    f = student_flow(student, batch.a, batch.z, None)
    slope = (1 + batch.gain[:, None]) * (f.detach() - batch.velocity) + batch.velocity - batch.target
    (2 * f * slope).sum().backward()
    theirs = [p.grad for p in student.parameters() if p.grad is not None]
    assert max(float(g.abs().max()) for g in theirs) > 0.1
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_a_constant_reward_keeps_the_base_whatever_the_pool():
    """Gains are 0: a pool of another law has no say, where flow matching would learn it."""
    case = Case("mixture-1d", mfm.LinearPath())
    objective = matching(case, TiltMatching(), reward=lambda x: torch.full((len(x),), -3.0, dtype=F64))
    objective.endpoints = lambda model, n, step: (normal(n, 1), {}, torch.full((n,), -3.0, dtype=F64))
    batch = objective.batch(case.student(), 0)
    assert objective.end == 1
    torch.testing.assert_close(
        objective(objective.problem.base, batch), torch.zeros(ROWS, dtype=F64), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("form", ["implicit", "explicit"])
def test_a_constant_added_to_the_reward_changes_nothing(form):
    case, batches = Case("gaussian-2d", mfm.LinearPath()), []
    for extra in (0.0, 700.0):
        moved = lambda x, extra=extra: case.reward(x).double() + extra  # noqa: E731
        batches.append(matching(case, TiltMatching(form), reward=moved).batch(case.student(), 0))
    for name in ("target", "gain", "velocity"):
        torch.testing.assert_close(*(getattr(b, name) for b in batches), rtol=1e-9, atol=1e-9)


# -- the levels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_the_first_level_leaves_the_share_it_is_told(share):
    case = Case("mixture-1d", mfm.LinearPath())
    sharp = lambda x: 50 * case.reward(x)  # noqa: E731
    objective = matching(case, TiltMatching(share=share), reward=sharp)
    objective.batch(case.student(), 0)
    weights = (objective.end * objective.rewards).softmax(0)
    assert 0 < objective.end < 1
    assert float(1 / weights.square().sum()) / POOL == pytest.approx(share, rel=1e-6)  # by bisection


@pytest.mark.parametrize("left", [2, 3])
def test_later_levels_divide_what_is_left_of_the_way(left):
    """r = −x²/2 on N(0, 1/a): from a to 1 are Λ = log(1/a)/√2 standard deviations of r; Var r = 1/(2a²), to 2 %."""
    case, a, levels = Case("gaussian-1d", mfm.LinearPath()), 0.1, 4
    objective = matching(case, TiltMatching(levels=levels))
    objective.level, objective.a = levels - left, a
    objective.rewards = -normal(POOL).square() / (2 * a)
    weights = ((objective._end() - a) * objective.rewards).softmax(0)
    kept = math.exp(-((math.log(1 / a) / math.sqrt(2) / left) ** 2))
    assert float(1 / weights.square().sum()) / POOL == pytest.approx(max(0.5, kept), rel=0.02)


def test_a_level_that_reaches_the_whole_tilt_is_the_last():
    case = Case("gaussian-2d", mfm.LinearPath())
    objective = matching(case, TiltMatching(share=0.1))
    for step in range(8):
        batch = objective.batch(case.student(), step)
        assert (objective.level, objective.a, objective.end) == (0, 0.0, 1.0)
    assert batch.figures["tilt"] == 1


def test_a_level_starts_from_the_mean_of_the_second_half_of_the_last():
    """Of eight steps with two levels the second half of the first are steps 2 and 3."""
    case = Case("mixture-1d", mfm.LinearPath())
    objective = matching(case, TiltMatching(levels=2, share=0.9))
    student = exact_map(case, 0.0)
    for step, value in enumerate((1.0, 2.0, 4.0, 8.0, 16.0)):
        with torch.no_grad():
            student.network.unused.fill_(value)
        objective.batch(student, step)
    assert objective.level == 1
    assert float(objective.reference(student, 5).network.unused) == 6.0


def test_a_last_level_that_goes_too_far_says_so():
    case = Case("mixture-1d", mfm.LinearPath())
    with pytest.warns(UserWarning, match=r"rests on .*raise method.levels"):
        matching(case, TiltMatching(levels=1), reward=lambda x: 3e4 * case.reward(x)).batch(case.student(), 0)


def test_forbidden_endpoints_have_no_weight():
    """r = −inf below 0: w = 0 there, so the gain is −1; the explicit form cannot take it."""
    case = Case("mixture-1d", mfm.LinearPath())
    reward = mfm.rewards.BlackBox(lambda x: torch.where(x[:, 0] < 0, -torch.inf, x[:, 0]))
    objective = matching(case, TiltMatching(levels=1), reward=reward)
    batch = objective.batch(case.student(), 0)
    law, forbidden = case.law, (batch.gain == -1).double().mean()
    below = float(law.weights @ torch.special.ndtr(-law.means[:, 0] / law.covariances[:, 0, 0].sqrt()))
    assert float(forbidden) == pytest.approx(below, abs=LEVEL * math.sqrt(below * (1 - below) / ROWS))
    assert batch.gain.isfinite().all()
    assert float(batch.gain.mean()) == pytest.approx(0, abs=LEVEL * float(batch.gain.std()) / math.sqrt(ROWS))
    with pytest.raises(InputError, match=r"method\.form=implicit"):
        matching(case, TiltMatching("explicit"), reward=reward).batch(case.student(), 0)
    nothing = mfm.rewards.BlackBox(lambda x: torch.full((len(x),), -torch.inf, dtype=F64))
    with pytest.raises(InputError, match="no sample of the model"):
        matching(case, TiltMatching(), reward=nothing).batch(case.student(), 0)


# -- a run -------------------------------------------------------------------------------------------------------------


def test_training_comes_to_the_tilted_law():
    """A Gaussian whose tilt is a Gaussian: of the drift's squared error, .20, less than a twentieth is left.

    It ends at .003, most of it noise of the last steps of so short a run; a level left out would leave .05.
    """
    case = Round(mfm.LinearPath())
    method = TiltMatching(levels=2, share=0.8, pool=4096, pool_steps=8)
    objective = method.start(TuningSetup(case.problem(), None, 256, 0, steps=160))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = copy.deepcopy(gaussian_map(case.path, MEAN, STD, torch.float32, 16)).requires_grad_(True)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    t = 0.9 * uniform(2000).float()
    x_1 = (case.mean + case.std * normal(2000, 2)).float()
    x = case.path.interpolate(normal(2000, 2, seed="noise").float(), x_1, t)

    def error():
        with torch.no_grad():
            return float((student.drift(t, x) - case.tuned().drift(t, x)).square().mean())

    before = error()
    for step in range(160):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 160)
        optimizer.zero_grad()
        objective(student, objective.batch(student, step)).mean().backward()
        optimizer.step()
    assert (objective.level, objective.end) == (1, 1.0)
    assert error() < 0.05 * before


# -- the bill ----------------------------------------------------------------------------------------------------------


def test_calls_are_counted():
    """Three levels: two calls a row beside the pools, a reward an endpoint, never differentiated.

    Hooks on base and student count them too: the frozen copies of later levels carry the student's.
    """
    case, meter = Case("gaussian-2d", mfm.LinearPath()), Meter()
    problem = case.problem(meter.counted(case.reward, "reward_calls", "reward_backwards"))
    method = TiltMatching(levels=3, share=0.9, pool=64, pool_steps=4)
    objective = method.start(TuningSetup(problem, None, 50, 0, steps=8))
    student = case.student()
    for network in (problem.base.network, student.network):
        meter.watch(network)
    with meter:
        for step in range(8):
            objective(student, objective.batch(student, step)).sum().backward()
    assert objective.level == 2
    assert problem.calls == {name: getattr(meter, name) for name in problem.calls}
    assert problem.calls["forwards"] == 8 * 50 * 2 + method.pool_evaluations(8)
    assert problem.calls["backwards"] == 8 * 50
    assert problem.calls["reward_calls"] == 3 * 64
    assert problem.calls["reward_backwards"] == 0


def test_it_takes_no_gradient_of_the_reward():
    TiltMatching().check_reward(declared=False)
    for wrong in ({"levels": 0}, {"form": "both"}):
        with pytest.raises(InputError):
            TiltMatching(**wrong)
