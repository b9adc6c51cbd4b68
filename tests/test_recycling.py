"""Recycled draws: weights that make draws of earlier contexts draws of the present one."""

import functools
import math

import pytest
import torch

import metaflowmaps as mfm
from conftest import CASES, F64, PATHS, bayes, coefficients, normal
from metaflowmaps.draws import Draws
from metaflowmaps.random import stream
from metaflowmaps.steering import recycling
from metaflowmaps.steering.recycling import DrawPool, solve_constants
from metaflowmaps.value import free_shift

CASE = CASES["per-component-full"]
REWARD = mfm.rewards.LinearGaussian(torch.tensor([1.0, -0.6], dtype=F64), 0.8, 1.0)
# six contexts of one trajectory, as far apart as those of ten steps: the last four are in the pool, two were dropped
TIMES = [0.15, 0.22, 0.3, 0.4, 0.48, 0.55]
STATES = torch.tensor([[0.2, -0.3], [0.35, -0.2], [0.3, -0.1], [0.25, 0.05], [0.4, 0.1], [0.5, 0.0]], dtype=F64)
LENGTH, ROWS, SIZES = 4, 500, [8, 32, 128]
NOW = len(TIMES) - 1


def draws_at(path, i, n, rows):
    """n exact draws from p(x_1 | context i), for each of so many rows, with their rewards."""
    x = STATES[i : i + 1].expand(rows, 2)
    x_1 = CASE.law.posterior(path, TIMES[i], x).draw(n, stream(0, "draws", i, n))
    return x, Draws(x_1, REWARD(x_1.flatten(0, 1)).reshape(n, rows))


@functools.cache
def recycled(name, n):
    """The pool after all six contexts, and the log-weights of its draws for the last one."""
    path = PATHS[name]
    pool = DrawPool(path, LENGTH)
    for i, t in enumerate(TIMES):
        x, made = draws_at(path, i, n, ROWS)
        log_weights = pool.add(t, x, made)
    return pool, log_weights


def moments(path, i):
    """E and Var of (x, x²) under the posterior of context i, the expectation by Bayes: (4,)."""
    alpha, beta, *_ = coefficients(path, torch.tensor([TIMES[i]], dtype=F64))
    means, covariances, weights = bayes(CASE, (STATES[i : i + 1], alpha, beta))
    mean = (weights[..., None] * means).sum(1)[0]
    second = (weights[..., None] * (covariances.diagonal(dim1=-2, dim2=-1) + means.square())).sum(1)[0]
    return torch.cat([mean, second])


def exact_shift(path, i):
    """D* − D = (α²/β) ∇V by autograd of the exact value."""
    x = STATES[i : i + 1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(CASE.law.value(path, TIMES[i], x, REWARD).sum(), x)
    alpha, beta, *_ = coefficients(path, torch.tensor(TIMES[i], dtype=F64))
    return gradient[0] * alpha**2 / beta


def estimates(path, n):
    """Errors over rows: of the four moments, and of the shift, (ROWS, 4) and (ROWS, 2)."""
    pool, log_weights = recycled(path.name, n)
    x = pool.pooled().x_1
    both = torch.cat([x, x.square()], 2)
    return (
        (log_weights.exp()[..., None] * both).sum(0) - moments(path, NOW),
        free_shift(pool.pooled(), log_weights) - exact_shift(path, NOW),
    )


def slope(sizes, errors):
    x, y = torch.tensor(sizes, dtype=F64).log(), torch.stack(errors).log()
    x, y = x - x.mean(), y - y.mean(0)
    return (x[:, None] * y).sum(0) / x.square().sum()


@pytest.mark.parametrize("what", ["moments", "shift"])
def test_estimates_converge_to_the_exact_ones(path, what):
    """At rate N^-1/2, to the right limit."""
    errors = [estimates(path, n)[what == "shift"] for n in SIZES]
    rms = [e.square().mean(0).sqrt() for e in errors]
    # each rms is known to 1/√(2·500) = 3.2 %, two of them over a factor of 16 in N: ±.016 a slope; the rest is 1/N
    assert float((slope(SIZES, rms) + 0.5).abs().max()) < 0.06, slope(SIZES, rms)
    # the bias: 4.5 standard errors, and for a self-normalised estimate rms² over the spread of one draw (times 2)
    spread = rms[-1] * math.sqrt(LENGTH * SIZES[-1])
    bound = 4.5 * rms[-1] / math.sqrt(ROWS) + 2 * rms[-1].square() / spread
    assert bool((errors[-1].mean(0).abs() < bound).all()), (errors[-1].mean(0), bound)


def test_recycling_is_worth_its_draws(path):
    """Four overlapping contexts: nearly four times the draws, half of the error of this step's own."""
    n = 64
    error, _ = estimates(path, n)
    _, made = draws_at(path, NOW, n, ROWS)
    own = torch.cat([made.x_1, made.x_1.square()], 2).mean(0) - moments(path, NOW)
    ratio = error.square().mean(0).sqrt() / own.square().mean(0).sqrt()
    # 1/√4 if the contexts were one; each rms to 3.2 %
    assert float(ratio.max()) < 0.65, ratio


def test_constants_converge_to_log_marginals(path):
    """f_l = −log p_{t_l}(x_l) up to a constant; a kernel without its normaliser adds −d log α_l."""
    kept = range(len(TIMES) - LENGTH, len(TIMES))
    log_z = torch.stack([
        CASE.law.marginal(path, TIMES[i]).log_prob(STATES[i : i + 1])[0]
        + 2 * coefficients(path, torch.tensor(TIMES[i], dtype=F64))[0].log()
        for i in kept
    ])  # fmt: skip
    errors = []
    for n in SIZES:
        pool, _ = recycled(path.name, n)
        f = pool._constants
        errors.append((f - f[:1])[1:] + (log_z - log_z[0])[1:, None])
    rms = [e.square().mean(1).sqrt() for e in errors]
    # ±.011 from 500 rows as above; constants are logarithms of sums, whose 1/N shows more at N = 8
    assert float((slope(SIZES, rms) + 0.5).abs().max()) < 0.1, slope(SIZES, rms)
    bound = 4.5 * rms[-1] / math.sqrt(ROWS) + rms[-1].square()  # and the bias of a logarithm
    assert bool((errors[-1].mean(1).abs() < bound).all()), (errors[-1].mean(1), bound)


def test_a_new_constant_is_read_off_the_draws_that_are_there(path, monkeypatch):
    """What the equations are solved from is right already, up to the noise of 512 draws: .02, of constants up to .5."""
    apart = []

    def solve(log_kernels, constants, num_draws, counts):
        solved = solve_constants(log_kernels, constants.clone(), num_draws, counts)
        apart.append(((constants[-1] - constants[0]) - (solved[-1] - solved[0])).abs().max())
        return solved

    monkeypatch.setattr(recycling, "solve_constants", solve)
    pool = DrawPool(path, LENGTH)
    for i, t in enumerate(TIMES):
        pool.add(t, *draws_at(path, i, 512, 20))
    assert float(max(apart)) < 0.05
    assert float(pool._constants[-1].abs().min()) > 0.2


def test_one_context_has_equal_weights(path):
    for length in (1, 4):
        pool = DrawPool(path, length)
        x, made = draws_at(path, 2, 8, 5)
        log_weights = pool.add(TIMES[2], x, made)
        assert torch.equal(log_weights, torch.full((8, 5), 1 / 8, dtype=F64).log())
    # a pool of length 1 forgets: the next context starts afresh
    pool = DrawPool(path, 1)
    for i in (2, 3):
        x, made = draws_at(path, i, 8, 5)
        assert torch.equal(pool.add(TIMES[i], x, made), torch.full((8, 5), 1 / 8, dtype=F64).log())
        assert torch.equal(pool.pooled().x_1, made.x_1)


@pytest.mark.parametrize("n", [1, 4, 64])
def test_contexts_that_do_not_overlap_get_no_weight(n):
    """Posteriors 30 standard deviations apart, so a draw of the one is e^-450 as likely under the other as its own.

    The constant read off from draws that do not reach is too large by hundreds and has to be solved for. The equations
    are solved until each context's share of the draws is right to a thousandth (TOLERANCE), which bounds what may leak.
    """
    path, rows = PATHS["linear"], 6
    pool = DrawPool(path, 3)
    centres = torch.tensor([[-1.5, -1.0], [0.5, 1.2], [1.5, -0.7]], dtype=F64)
    for i, t in enumerate([0.95, 0.96, 0.97]):
        x = (t * centres[i]).expand(rows, 2)
        x_1 = CASE.law.posterior(path, t, x).draw(n, stream(0, "apart", i))
        log_weights = pool.add(t, x, Draws(x_1, torch.zeros(n, rows, dtype=F64)))
    weights = log_weights.exp()
    assert float(weights[: 2 * n].sum(0).max()) < 1e-3
    torch.testing.assert_close(weights[2 * n :], torch.full((n, rows), 1 / n, dtype=F64), rtol=2e-3, atol=0)


def test_a_context_that_no_old_draw_reaches_has_its_own_draws(path):
    """At 1e20, whose square is infinite in float32, nothing is known of a new constant: weights stay numbers."""
    pool, n = DrawPool(path, 2), 4
    for t, x in ((0.5, torch.zeros(3, 2)), (0.6, torch.full((3, 2), 1e20))):
        x_1 = (x / path.beta(t).to(x)).expand(n, 3, 2) + normal(n, 3, 2).float()
        log_weights = pool.add(t, x, Draws(x_1, torch.zeros(n, 3)))
    assert torch.equal(log_weights.exp(), torch.tensor([0.0, 0.25])[:, None, None].expand(2, n, 3).reshape(2 * n, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_draws_in_half_precision_are_weighed_in_single(dtype, path):
    """The same weights as of the same rounded numbers in float32, to the bit."""
    half, single = DrawPool(path, 3), DrawPool(path, 3)
    for t, x, made in chain(path, 4, (2,), steps=4):
        x, x_1, rewards = (each.to(dtype) for each in (x, made.x_1, made.rewards))
        weights = half.add(t, x, Draws(x_1, rewards))
        assert torch.equal(weights, single.add(t, x.float(), Draws(x_1.float(), rewards.float())))


def test_the_same_context_again_pools_its_draws(path):
    """Twice one context: 2N draws of equal weight."""
    pool = DrawPool(path, 2)
    for i in range(2):
        x = STATES[2:3].expand(5, 2)
        x_1 = CASE.law.posterior(path, 0.3, x).draw(8, stream(0, "again", i))
        log_weights = pool.add(0.3, x, Draws(x_1, torch.zeros(8, 5, dtype=F64)))
    torch.testing.assert_close(log_weights, torch.full((16, 5), 1 / 16, dtype=F64).log(), rtol=0, atol=1e-12)


def chain(path, rows, event, n=3, steps=7):
    """Contexts and draws of any shape: (t, x, Draws) for each step, gradients and all."""
    for i in range(steps):
        x_1 = normal(n, rows, *event, seed=f"x_1 {i}")
        yield 0.1 + 0.1 * i, normal(rows, *event, seed=f"x {i}"), Draws(x_1, normal(n, rows, seed=f"r {i}"), 2 * x_1)


@pytest.mark.parametrize("event", [(2,), (2, 3)])
@pytest.mark.parametrize("length", [2, 3, 9])
def test_incremental_table_is_the_table(path, event, length):
    """After every step: log K_l(x_n) = −‖x_l − β_l x_n‖²/(2α_l²) over all pairs, f that solves, ω of the balance."""
    pool, seen = DrawPool(path, length), []
    for t, x, made in chain(path, 4, event):
        log_weights = pool.add(t, x, made)
        seen = [*seen, (t, x, made)][-length:]
        x_1 = torch.cat([m.x_1 for *_, m in seen])
        table = []
        for time, state, _ in seen:
            alpha, beta, *_ = coefficients(path, torch.tensor(time, dtype=F64))
            table.append(-(state - beta * x_1).flatten(2).square().sum(2) / (2 * alpha**2))
        table = torch.stack(table)
        torch.testing.assert_close(pool._log_kernels, table, rtol=1e-12, atol=1e-12)
        mixture = torch.logsumexp(table + pool._constants[:, None], 0)
        if len(seen) > 1:
            torch.testing.assert_close(log_weights, (table[-1] - mixture).log_softmax(0), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(log_weights.exp().sum(0), torch.ones(4, dtype=F64))
        # the constants solve their equations: every context is given its own number of draws, to 2e-3 of it
        given = torch.exp(table + pool._constants[:, None] - mixture).sum(1)
        torch.testing.assert_close(given, torch.full_like(given, 3.0), rtol=2e-3, atol=0)
        pooled = pool.pooled()
        assert torch.equal(pooled.x_1, x_1)
        assert torch.equal(pooled.rewards, torch.cat([m.rewards for *_, m in seen]))
        assert torch.equal(pooled.gradients, 2 * x_1)


def test_rows_do_not_mix(path):
    """Each trajectory alone has the weights that it has in company."""
    pool = DrawPool(path, 3)
    alone = [DrawPool(path, 3) for _ in range(4)]
    for t, x, made in chain(path, 4, (2,)):
        together = pool.add(t, x, made)
        for row, single in enumerate(alone):
            one = slice(row, row + 1)
            got = single.add(t, x[one], Draws(made.x_1[:, one], made.rewards[:, one]))
            torch.testing.assert_close(got, together[:, one], rtol=1e-12, atol=1e-12)


def test_select_is_a_pool_of_the_selected_trajectories(path):
    """Particles replaced by others carry their whole history: the pool rebuilt from it is the same, now and later."""
    rows = torch.tensor([2, 2, 0, 3])
    steps = list(chain(path, 4, (2, 3)))
    pool, rebuilt = DrawPool(path, 3), DrawPool(path, 3)
    for t, x, made in steps[:5]:
        pool.add(t, x, made)
        rebuilt.add(t, x[rows], Draws(made.x_1[:, rows], made.rewards[:, rows], made.gradients[:, rows]))
    pool.select(rows)
    for t, x, made in steps[5:]:
        for a, b in zip(pool.pooled()[:3], rebuilt.pooled()[:3], strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(pool.add(t, x, made), rebuilt.add(t, x, made), rtol=1e-12, atol=1e-12)
    DrawPool(path, 3).select(rows)  # before any draw there is nothing to do


def test_no_length_is_refused(path):
    with pytest.raises(mfm.InputError, match="recycle must be at least 1"):
        DrawPool(path, 0)
