"""The tilted map: what one weighted pick of N draws means, and which map the losses on it have as fixed point."""

import math

import pytest
import torch
from exact import LEVEL, LOUD, MEAN, ONE_AND_FOUR, STD, Case, Round, gaussian_map, running, z_scores

import metaflowmaps as mfm
from conftest import F64, ks_bound, ks_distance
from metaflowmaps.cost import Meter
from metaflowmaps.finetuning import Direct, StateMixture, TuningSetup
from metaflowmaps.finetuning.direct import WeightedMapObjective, pick
from metaflowmaps.finetuning.distillation import distillation
from metaflowmaps.finetuning.tuning_problem import TuningProblem, gather
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.training.train_config import LossConfig


def direct(problem, source, size, num_draws, diagonal_share=0.5):
    loss = LossConfig(diagonal="data", consistency="mean-flow", diagonal_share=diagonal_share)
    return WeightedMapObjective(Direct(num_draws), TuningSetup(problem, source, size, 0, loss), running())


def distilled(problem, tuned, pool, steps=50, size=512):
    return distillation(TuningSetup(problem, None, size, 0, Direct.__base__.map_loss), tuned, pool, steps)


# -- one of N draws ----------------------------------------------------------------------------------------------------


def test_picks_come_in_their_shares():
    """On 6,000 equally spaced u each share is met to one u; float64."""
    shares = torch.tensor([[0.1, 0.0, 0.25, 0.0, 0.65], [0.0, 1.0, 0.0, 0.0, 0.0]], dtype=F64).T
    u = (torch.arange(6000, dtype=F64) + 0.5) / 6000
    for column in shares.T:
        chosen = pick(column[:, None].expand(-1, 6000), u)
        counts = torch.bincount(chosen, minlength=5) / 6000
        torch.testing.assert_close(counts.to(F64), column, rtol=0, atol=1 / 6000)


@pytest.mark.parametrize("u", [0.0, 2.0**-24, 0.5, 1 - 2.0**-24])  # the ends are the least and the largest of float32
def test_a_draw_without_weight_is_never_picked(u):
    """Zeros at the front, in the middle and at the end, and sums that rounding leaves below 1."""
    generator = torch.Generator().manual_seed(0)
    share = torch.randn(9, 5000, generator=generator).softmax(0)
    for zeros in ([0], [3, 4], [8], [0, 1, 8], [7, 8]):
        rest = share.clone()
        rest[zeros] = 0
        rest = rest / rest.sum(0)
        chosen = pick(rest, torch.full((5000,), u))
        assert (gather(rest, chosen) > 0).all()


@ONE_AND_FOUR
@pytest.mark.parametrize("name", ["gaussian-2d", "mixture-1d"])
def test_the_weighted_pick_is_a_draw_of_the_tilted_posterior(name, num_draws, path):
    """w (x_1 − E*[x_1]) and w (x_1² − E*[x_1²]) have mean 0 at every context, the base's moments do not."""
    case = Case(name, path)
    objective = direct(case.problem(), case.states("base"), 2000, num_draws)
    batches = [objective.batch(case.base(), step) for step in range(10)]
    t, x, x_1, weight = (torch.cat([getattr(b, k) for b in batches]).to(F64) for k in ("t", "x_t", "x_1", "weight"))
    assert (t == 0).any()
    functions = torch.cat([torch.ones(len(t), 1, dtype=F64), torch.cos(3 * t)[:, None], x], 1)

    def largest_z(law):
        posterior = law.posterior(path, t, x)
        parts = x_1 - posterior.mean, x_1.square() - posterior.variance - posterior.mean.square()
        return max(float(z_scores(weight[:, None] * part, functions).abs().max()) for part in parts)

    assert largest_z(case.tilted) < LEVEL
    assert largest_z(case.law) > LOUD


# -- the fixed point of the map ----------------------------------------------------------------------------------------


def gradients(objective, model, steps):
    """The gradient of a batch's mean loss in all weights, batch by batch: (steps, number of weights)."""
    rows = []
    for step in range(steps):
        model.zero_grad()
        objective(model, objective.batch(model, step)).mean().backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(rows).double()


BATCHES = 20  # what is off is still found loudly


@ONE_AND_FOUR
@pytest.mark.parametrize("diagonal_share", [0.0, 1.0])
def test_the_tilted_map_is_the_fixed_point_of_the_direct_losses(diagonal_share, num_draws, path):
    """MeanFlow alone, the diagonal alone: the mean gradient is 0 at the exact tilted map, and at the base's it is not.

    A network of zeros has a gradient in its output layer only: (4 + 1) · 2 numbers.
    """
    exact = Round(path)
    objective = direct(exact.problem(), exact.source, 512, num_draws, diagonal_share)
    largest = []
    for model in (exact.tuned(), gaussian_map(path, MEAN, STD, torch.float32)):
        found = gradients(objective, model, BATCHES)
        moving = found.std(0) > 0
        assert moving.sum() == 10
        largest.append(float((found.mean(0) / found.std(0) * math.sqrt(BATCHES))[moving].abs().max()))
    assert largest[0] < LEVEL
    assert largest[1] > LOUD


def test_the_level_that_weights_are_held_against_learns_from_each_batch():
    case = Case("gaussian-1d", mfm.LinearPath())
    objective = direct(case.problem(), case.states("base"), 64, 2)
    before = objective.baseline.level.clone()
    objective.batch(case.base(), 0)
    assert not torch.equal(objective.baseline.level, before)


def test_direct_losses_do_not_depend_on_the_split_of_their_batch():
    exact = Round(mfm.LinearPath())
    objective, model = direct(exact.problem(), exact.source, 40, 2), exact.tuned()
    batch = objective.batch(model, 0)
    pieces = torch.cat([objective(model, batch.rows(i, i + 10)) for i in range(0, 40, 10)])
    torch.testing.assert_close(pieces, objective(model, batch), rtol=1e-5, atol=1e-6)  # float32
    assert batch.weight.std() > 0.1


# -- distillation ------------------------------------------------------------------------------------------------------


def test_distillation_has_the_map_of_the_tuned_drift_as_fixed_point(path):
    """Taught by the exact tilted drift, the exact tilted map has no loss (float32: 1e-4 squared), the base's has."""
    exact = Round(path)
    objective = distilled(exact.problem(), exact.tuned(), 2000, size=256)
    for model, loss in ((exact.tuned(), None), (gaussian_map(path, MEAN, STD, torch.float32), 0.1)):
        found = objective(model, objective.batch(model, 0)).mean()
        assert (found < 1e-6) if loss is None else (found > loss)


def test_distillation_learns_on_samples_of_the_tuned_drift(path):
    """KS of its data in both coordinates; 50 Euler steps leave a spread off by a few per cent: 0.02 is added."""
    exact = Round(path)
    objective = distilled(exact.problem(), exact.tuned(), 8000)
    x_1 = objective.data.x_1
    one = torch.ones(1, dtype=F64)
    for i in range(2):
        distance = ks_distance(x_1[:, i].double(), exact.mean[i : i + 1], exact.std**2 * one, one)
        assert distance < ks_bound(8000) + 0.02


# -- classes -----------------------------------------------------------------------------------------------------------


def labelled_problem(guidance):
    network = MLPConfig(width=8, depth=1, num_classes=3, guidance=True).network((2,))
    return TuningProblem(mfm.MetaFlowMap(network, mfm.LinearPath()), lambda x: -x.square().sum(1), guidance=guidance)


@pytest.mark.parametrize("stage", ["direct", "distil"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_maps_are_tuned_under_the_conditions_of_their_samples(stage, guidance):
    """Every row has the label that its sample was made with, and the one scale; the null class has nothing to guide."""
    problem = labelled_problem(guidance)
    if stage == "direct":
        states = StateMixture(pool=64, pool_steps=1).start(problem, 0)
        objective, held = direct(problem, states, 400, 2), states.pool
        label = states.cond["label"]
    else:
        objective = distilled(problem, problem.base, 64, 2)
        held, label = objective.data.x_1, objective.data.label
    batch = objective.batch(problem.base, 0)
    if stage == "distil":  # in the other, x_1 is a draw from the posterior of a state made from the sample
        place = (batch.x_1[:, None] == held[None]).all(2).long().argmax(1)
        assert torch.equal(batch.cond["label"], label[place])
    assert set(batch.cond["label"].tolist()) == set(label.tolist()) == {0, 1, 2, 3}
    if guidance == 1:
        assert "guidance" not in batch.cond
    else:
        null = batch.cond["label"] == 3
        assert torch.equal(batch.cond["guidance"], torch.where(null, 1.0, 2.5))
    assert objective(problem.base, batch).isfinite().all()


# -- the bill ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["direct", "distil"])
def test_calls_are_counted_as_hooks_count_them(stage):
    exact, meter = Round(mfm.LinearPath()), Meter()
    reward = meter.counted(exact.reward, "reward_calls", "reward_backwards")
    problem = TuningProblem(gaussian_map(exact.path, MEAN, STD, torch.float32), reward)
    student, tuned = exact.tuned(), exact.tuned().requires_grad_(False)
    direct_stage = stage == "direct"
    objective = direct(problem, exact.source, 64, 2) if direct_stage else distilled(problem, tuned, 64, 1, 64)
    before = dict(problem.calls)
    for network in (problem.base.network, student.network, tuned.network):
        meter.watch(network)
    with meter:
        objective(student, objective.batch(student, 0)).sum().backward()
    assert {k: v - before[k] for k, v in problem.calls.items()} == {k: getattr(meter, k) for k in before}
