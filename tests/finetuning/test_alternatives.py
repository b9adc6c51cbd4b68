"""Adjoint matching and DRaFT where their answers are known."""

import copy
import itertools
import math

import pytest
import torch
from exact import LEVEL, LOUD, Case, MixtureMap, features, gaussian_map, random_map

import metaflowmaps as mfm
from conftest import F64, coefficients, ks_bound, ks_distance
from metaflowmaps.cost import Meter
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning import AdjointMatching, DRaFT, TuningSetup
from metaflowmaps.random import stream

# -- adjoint matching --------------------------------------------------------------------------------------------------


def residuals(case, student, answers, steps, trajectories, batches=2, functions=features):
    """Mean over times of (answer − target) times functions of the state: their means and standard errors.

    What varies independently is a trajectory: its visited states are summed first. One pair for each answer.
    """
    objective = AdjointMatching(steps).start(TuningSetup(case.problem(), None, trajectories * steps, 0))
    sums = [[] for _ in answers]
    for step in range(batches):
        batch = objective.batch(student, step)
        assert batch.target.isfinite().all()
        assert torch.equal(batch.weight, torch.ones_like(batch.weight))
        for held, answer in zip(sums, answers, strict=True):
            products = torch.einsum("bi,bk->bik", answer(batch) - batch.target, functions(batch))
            held.append(products.reshape(-1, trajectories, products[0].numel()).sum(0) / steps)
    joined = [torch.cat(held) for held in sums]
    return [(v.mean(0), v.std(0) / math.sqrt(len(v))) for v in joined]


def largest_z(estimate):
    mean, error = estimate
    return float((mean / error).abs().max())


@pytest.mark.parametrize("name", ["gaussian-1d", "gaussian-2d"])
@pytest.mark.parametrize("steps", [3, 8])
def test_adjoints_along_the_tilted_process_give_the_tilted_drift(name, steps, path):
    """For a Gaussian in any number of steps: D_t is affine, so neither a bridge step nor its adjoint has a bias."""
    case = Case(name, path)
    student = MixtureMap(path, case.tilted, case.mean, case.std)
    there, base = residuals(case, student, [case.answer, lambda b: case.answer(b, case.law)], steps, 4000)
    assert largest_z(there) < LEVEL
    assert largest_z(base) > LOUD


def test_adjoints_along_the_base_process_overshoot(path):
    """Student = base: the mean is that of the untilted ∇r, which overshoots, and is no fixed point."""
    case = Case("gaussian-2d", path)
    there, alone = residuals(case, case.base(), [case.answer, case.one_draw_alone], 8, 4000)
    assert largest_z(there) > LOUD
    assert largest_z(alone) < LEVEL


def test_one_step_before_the_end_the_adjoint_is_exact():
    """From there the last step goes to D_t(x) itself: for a Gaussian the target is the tilted drift, without noise."""
    case = Case("gaussian-2d", mfm.LinearPath())
    student = MixtureMap(case.path, case.tilted, case.mean, case.std)
    batch = AdjointMatching(2).start(TuningSetup(case.problem(), None, 200, 0)).batch(student, 0)
    assert len(batch) == 100
    torch.testing.assert_close(batch.target, case.answer(batch), rtol=1e-10, atol=1e-10)


def test_adjoint_targets_converge_at_first_order_in_the_step():
    """For a mixture D_t is not affine: the bias falls with the steps, at first order from 16 to 64 to a quarter.

    Looked at where a > 1/2, where the noise is least: biases .035, .022, .007, the last with a standard error of .003.
    """
    case = Case("mixture-1d", mfm.LinearPath())
    student = MixtureMap(case.path, case.tilted, case.mean, case.std)
    late = lambda batch: (batch.a > 0.5).to(F64)[:, None]  # noqa: E731
    found = {k: residuals(case, student, [case.answer], k, 3000, 3, late)[0] for k in (4, 16, 64)}
    bias = {k: abs(float(mean)) for k, (mean, _) in found.items()}
    assert largest_z(found[4]) > LOUD
    assert bias[4] > bias[16] > 1.5 * bias[64]


def test_the_visited_states_follow_the_student(path):
    """Near the end of many fine steps they are samples of the tilted law, noised: KS at a = 0.94 or so, Gaussian case.

    64 steps leave a bias in the spread below 0.01 of a distribution function, which is added to the bound.
    """
    case, steps, m = Case("gaussian-1d", path), 64, 4000
    student = MixtureMap(path, case.tilted, case.mean, case.std)
    batch = AdjointMatching(steps).start(TuningSetup(case.problem(), None, m * steps, 0)).batch(student, 0)
    last = batch.rows(len(batch) - m, len(batch))
    assert (last.t == last.t[0]).all()
    alpha, beta = coefficients(path, last.t[:1])[:2]
    x = beta * case.mean + (alpha**2 + (beta * case.std) ** 2).sqrt() * last.z
    law = case.tilted
    spread = alpha**2 + beta**2 * law.covariances[:, 0, 0]
    assert ks_distance(x[:, 0], beta * law.means[:, 0], spread, law.weights) < ks_bound(m) + 0.01


def test_adjoint_matching_meets_all_times():
    """The shift moves the grid: over 60 steps of 4-step trajectories every one of 20 bins of (0.125, 0.94) is met."""
    case = Case("gaussian-1d", mfm.LinearPath())
    objective = AdjointMatching(4).start(TuningSetup(case.problem(), None, 4, 0))
    a = torch.cat([objective.batch(case.base(), step).a for step in range(60)])
    low, high = 0.5 / 4, 3.5 / 4
    assert a.min() >= low - 1e-6
    assert a.max() <= high + 1e-6
    assert (torch.histc(a, 20, low, high) > 0).all()


def test_adjoint_matching_learns_nothing_before_first():
    """σ² is infinite at t = 0: of the times 0, .0099, .0101 and .5 the last two have rows."""
    case, grid = Case("gaussian-1d", mfm.LinearPath()), torch.tensor([0.0, 0.0099, 0.0101, 0.5, 1.0], dtype=F64)
    objective = AdjointMatching(4).start(TuningSetup(case.problem(), None, 12, 0))
    objective._grid = lambda x, g: grid
    batch = objective.batch(case.base(), 0)
    torch.testing.assert_close(batch.t, grid[2:4].repeat_interleave(3), rtol=0, atol=0)


def test_adjoint_matching_refuses_what_it_cannot_do():
    case = Case("gaussian-1d", mfm.LinearPath())
    for objective in (AdjointMatching(), DRaFT()):
        with pytest.raises(InputError, match="takes its gradient: use method=mfm-ft"):
            objective.check_reward(declared=False)
        objective.check_reward(declared=True)
    with pytest.raises(InputError, match="batch_size"):
        AdjointMatching(8).start(TuningSetup(case.problem(), None, 7, 0))


# -- draft -------------------------------------------------------------------------------------------------------------


def one_step(student, path, mean, std, eps, t, x):
    """X_{0,1}(ε; t, x) = m + τ (ε + F), F = (π/2) net: the map of the gaussian parameterisation, written out."""
    alpha, beta = (c[:, None] for c in coefficients(path, t)[:2])
    root = (alpha**2 + (beta * std) ** 2).sqrt()
    context, angle = (x - beta * mean) / root, 2 / math.pi * torch.atan2(beta * std, alpha)[:, 0]
    zero = torch.zeros_like(t)
    flow = math.pi / 2 * student.network(eps, zero, zero + 1, context, angle)
    return mean + beta * std**2 / root * context + std * alpha / root * (eps + flow)


def test_draft_differentiates_the_mean_reward_of_the_students_draws(path):
    """Its gradient against autograd through the map written out here; to rounding."""
    case = Case("gaussian-2d", path)
    student = random_map(path, case.mean, case.std, 2)
    objective = DRaFT(0.5).start(TuningSetup(case.problem(), case.states("base"), 64, 3))
    batch = objective.batch(student, 5)
    objective(student, batch).mean().backward()
    ours = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    x_1 = one_step(student, path, case.mean, case.std, batch.eps, batch.t, batch.x_t)
    (-case.reward(x_1).mean()).backward()
    assert max(float(p.grad.abs().max()) for p in student.parameters()) > 0.1
    for mine, parameter in zip(ours, student.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_draft_generates_in_the_share_it_is_told(share):
    """4,000 rows: the share to 4.5 standard deviations of a binomial; rows at t = 0 are pure noise."""
    case, n = Case("gaussian-1d", mfm.LinearPath()), 4000
    batch = DRaFT(share).start(TuningSetup(case.problem(), case.states("tilted"), n, 0)).batch(case.base(), 0)
    generated = batch.t == 0
    assert abs(float(generated.double().mean()) - share) <= LEVEL * math.sqrt(share * (1 - share) / n)
    one, zero = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    assert ks_distance(batch.eps[:, 0], zero, one, one) < ks_bound(n)
    if share:
        assert ks_distance(batch.x_t[generated, 0], zero, one, one) < ks_bound(int(generated.sum()))
    if share == 0.3:
        late = batch.x_t[batch.t > 0.5]
        assert late.mean() > LEVEL * late.std() / math.sqrt(len(late))  # states, not noise: they have a mean


def test_draft_climbs_beyond_the_tilted_law():
    """Nothing holds it to the base: its mean reward rises at each look and past E[r] under p ∝ p_1 e^r."""
    case = Case("gaussian-2d", mfm.LinearPath())
    objective = DRaFT(0.5).start(TuningSetup(case.problem(), case.states("base"), 256, 0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = copy.deepcopy(gaussian_map(case.path, case.mean, case.std, width=16)).requires_grad_(True)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)

    def reward():
        return float(case.reward(student.generate(4000, 1, stream(0))).mean())  # the same noise at each look

    seen = [reward()]
    for step in range(120):
        optimizer.zero_grad()
        objective(student, objective.batch(student, step)).mean().backward()
        optimizer.step()
        if step % 30 == 29:
            seen.append(reward())
    assert all(later > earlier for earlier, later in itertools.pairwise(seen))
    a, law = case.reward.A[0].to(F64), case.tilted
    gap = float(case.reward.y) - float(a @ law.mean)
    expected = -0.5 * case.reward.precision * (gap**2 + float(a @ law.covariances[0] @ a))
    assert seen[0] < expected
    assert seen[-1] > 0.5 * expected  # rewards are below 0: it has gone half of what is left beyond the tilted law


# -- the bill ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adjoint-matching", "draft"])
def test_calls_are_counted_as_hooks_count_them(method):
    case, meter = Case("gaussian-2d", mfm.LinearPath()), Meter()
    problem = case.problem(meter.counted(case.reward, "reward_calls", "reward_backwards"))
    objective = (
        AdjointMatching(6).start(TuningSetup(problem, None, 60, 0))
        if method == "adjoint-matching"
        else DRaFT(0.5).start(TuningSetup(problem, case.states("base"), 60, 0))
    )
    student = case.student()
    meter.watch(problem.base.network)
    meter.watch(student.network)
    with meter:
        objective(student, objective.batch(student, 0)).sum().backward()
    assert problem.calls == {name: getattr(meter, name) for name in problem.calls}
    assert min(problem.calls.values()) > 0
