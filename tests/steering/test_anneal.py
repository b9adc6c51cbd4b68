"""MFM-Anneal: its moves keep p_1 e^{λr}, its weights count the evidence, and it reaches what draws do not meet."""

import math
import warnings

import pytest
import torch
from closed_forms import random_map

import metaflowmaps as mfm
from conftest import CASES, F64, PATHS
from metaflowmaps.cost import Meter
from metaflowmaps.random import fresh_seeds, stream
from metaflowmaps.steering.anneal import EARLIEST_LOOK, Cloud, beside, lean, shares_of, slope_of
from metaflowmaps.steering.problem import SteeringProblem
from metaflowmaps.steering.resampling import effective, families, few_families
from metaflowmaps.tempering import next_strength, stretch

LAW = CASES["per-component-full"].law
EXACT = mfm.ExactModel(PATHS["linear"], LAW)
REWARD = mfm.rewards.LinearGaussian(torch.tensor([1.0, -0.6], dtype=F64), 0.8, 0.5)
FAR = mfm.rewards.LinearGaussian(torch.tensor([1.0, -0.6], dtype=F64), 9.0, 0.3)  # one sample in 10⁵ meets it


def _like(tilted, x):
    """Means and second moments of exact samples within 4.5 standard errors of len(x) of them."""
    exact = tilted.sample(400_000, stream(1, "exact")).to(x)
    for moment in (lambda y: y, lambda y: y.square()):
        bound = 4.5 * moment(exact).std(0) / math.sqrt(len(x))
        assert bool(((moment(x).mean(0) - moment(exact).mean(0)).abs() < bound).all())


@pytest.mark.parametrize(("systems", "leaning"), [(4000, False), (4000, True), (1, False)])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_a_move_keeps_the_tilted_law(strength, systems, leaning):
    """Exact samples of p_1 e^{λr} stay so over twelve moves, whatever direction these lean to, each apart from the
    others though they share a system. What moves teach is put aside: a system of one would lean by what its only
    particle has seen."""
    n = 4000
    tilted = LAW.tilt(mfm.rewards.LinearGaussian(REWARD.A, REWARD.y, REWARD.noise_std, strength=strength))
    method = mfm.Anneal(num_draws=3, n=1)
    problem = SteeringProblem(EXACT, REWARD, Meter())
    problem.begin(fresh_seeds(systems), None)
    method.open_posterior(problem)
    x = tilted.sample(n, stream(0, "start")).to(torch.float32)
    one, slope = torch.ones(systems, dtype=F64), leaning * 3 * torch.tensor([[1.0, -0.6]]).expand(systems, 2)
    equal, founders, size = torch.zeros(systems, n // systems, dtype=F64), torch.arange(n), n // systems
    cloud = Cloud(x, REWARD(x).double(), equal, strength * one, 0 * one, slope, 0 * one, founders, size)
    usual = REWARD(tilted.sample(400_000, stream(1, "exact"))).double()
    for _ in range(12):
        moved, _ = method._moved(problem, cloud._replace(slope=slope, look=0 * one))
        cloud = method._resampled(problem, moved, moved.strength, size)
        assert float((cloud.rewards.mean() - usual.mean()).abs()) < 4.5 * float(usual.std()) / math.sqrt(n)
    assert float((cloud.x != x).any(1).double().mean()) > 0.9  # they have moved
    _like(tilted, cloud.x)
    torch.testing.assert_close(cloud.rewards, REWARD(cloud.x).double(), rtol=1e-5, atol=1e-5)  # float32, other batches


def test_a_lean_is_no_longer_than_the_noise_of_its_context():
    """α²/β ‖g‖ ≤ α √d, and shorter ones stay: two systems of two particles."""
    slope = torch.tensor([[30.0, 40.0, 0.0, 0.0], [0.3, 0.4, 0.0, 0.0]])
    alpha, beta = torch.full((4, 1), 0.5), torch.full((4, 1), 0.25)
    got = lean(alpha, beta, slope, 2)
    torch.testing.assert_close(got[1::2], slope[1:].expand(2, 4))
    torch.testing.assert_close(got[::2], slope[:1].expand(2, 4) / 50)  # √4 · .25/.5 = 1


def test_the_slope_is_that_of_the_reward_along_moves():
    """A linear reward's own where moves are alike in all directions, to the 1/√4000 of a covariance (4.5 of them)."""
    g, x = torch.tensor([1.0, -2.0, 0.5], dtype=F64), torch.randn(3, 8000, 3, generator=stream(0, "x"), dtype=F64)
    rewards = (x * g).sum(2)
    rewards[0, ::2] = -torch.inf  # of weight zero
    shares = (0 * rewards).where(rewards.isfinite(), -torch.inf).softmax(0)
    got = slope_of(x, rewards, shares, 2)
    assert got.shape == (2, 3)
    assert float((got - g).norm() / g.norm()) < 4.5 * math.sqrt(3 / 4000)
    assert not bool(slope_of(x, torch.zeros_like(rewards), shares, 2).any())


def test_a_particle_and_its_draws_are_weighed_by_what_their_contexts_leave():
    """e^{λr − g·x}, normalised over the particle and its draws: 1/6, 2/6, 3/6 without a lean; and then beside each
    other, systems last."""
    rewards = torch.log(torch.tensor([[1.0], [2.0], [3.0]], dtype=F64)).expand(3, 4)
    x, half = torch.arange(12, dtype=F64).reshape(3, 4, 1), torch.full((4,), 0.5, dtype=F64)
    got = shares_of(x, 2 * rewards, half, 0 * x[0])
    torch.testing.assert_close(got, (torch.tensor([1.0, 2.0, 3.0], dtype=F64) / 6)[:, None].expand(3, 4))
    leaned = shares_of(x, 2 * rewards + 2 * x[..., 0], half, torch.ones_like(x[0]))
    torch.testing.assert_close(leaned, got)
    assert beside(x, 2)[:, 0].tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]


def test_strength_rises_as_far_as_the_weights_allow():
    rewards = torch.randn(3, 500, generator=torch.Generator().manual_seed(0), dtype=F64)
    rewards[1, :400] = -torch.inf  # of a hundred that live
    rewards[2] *= 1e-3
    now = torch.tensor([0.2, 0.1, 0.3], dtype=F64)
    equal = torch.zeros_like(rewards)
    got = next_strength(20 * rewards, equal, now, 0.5)
    left = effective((got - now)[:, None] * 20 * rewards)
    torch.testing.assert_close(left[:2], torch.tensor([250.0, 50.0], dtype=F64))
    assert float(got[2]) == 1


def test_what_is_left_of_a_quadratic_reward():
    """r = −d/(2λ) z² has √Var r = √(d/2)/λ for d = 1: from λ to 1 it is √(1/2) log(1/λ), up to the 1/√(2·10⁵) of a
    variance of heavy squares (4.5 of them)."""
    strength = torch.tensor([0.1], dtype=F64)
    z = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0), dtype=F64)
    left = float(stretch(-z.square() / (2 * 0.1), torch.zeros_like(z), strength))
    assert left == pytest.approx(math.sqrt(0.5) * math.log(10), rel=4.5 * math.sqrt(14 / 4 / 100_000))


def test_reaches_what_draws_do_not_meet_and_knows_how_rare_it_is():
    """log E[e^r] is −12: 16 clouds of 256; their mean within 4.5 standard errors of it, and one pool's is not."""
    method, steps = mfm.Anneal(num_draws=4, n=1, pool=8, particles=256), mfm.ODE(steps=40)
    got = mfm.steer(EXACT, FAR, 16 * 256, method, steps, seed=0)
    exact = float(LAW.log_evidence(FAR))
    assert exact < -10
    ratios = torch.exp(got.info["log_evidence"] - exact)
    assert abs(float(ratios.mean()) - 1) < 4.5 * float(ratios.std()) / 4
    assert bool((got.info["reached"] == 1).all())
    assert float(got.info["founders"].min()) > 1
    assert got.cost["nfe"] == pytest.approx(2 * (8 + 40 * 4))  # a call and a reward each
    of_clouds = got.rewards.reshape(256, 16).double().mean(0)
    wanted = float(FAR(LAW.tilt(FAR).sample(10**5, stream(1, "exact"))).mean())
    assert abs(float(of_clouds.mean()) - wanted) < 4.5 * float(of_clouds.std()) / 4


def test_says_when_the_steps_were_too_few():
    sharper = mfm.rewards.Tempered(FAR, 100.0)
    with pytest.warns(UserWarning, match="came to λ = 0.* use more steps"):
        got = mfm.steer(EXACT, sharper, 64, mfm.Anneal(num_draws=1, n=1), mfm.ODE(steps=2), seed=0)
    assert float(got.info["reached"]) < 1
    assert bool(got.samples.isfinite().all())


def test_systems_do_not_look_at_each_other():
    model, method, steps = random_map(PATHS["linear"]), mfm.Anneal(particles=32), mfm.ODE(steps=5)
    both = mfm.steer(model, REWARD, 64, method, steps, seed=3)
    alone = mfm.steer(model, REWARD, 32, method, steps, seed=both.seeds[1:2])
    torch.testing.assert_close(alone.samples, both.samples[1::2])


@pytest.mark.parametrize(("method", "process"), [(mfm.Anneal(), mfm.ODE(steps=30)), (mfm.SMC(), mfm.SDE(steps=30))])
@pytest.mark.parametrize(("rare", "said"), [(REWARD, False), (FAR, True)], ids=["mild", "rare"])
def test_says_from_how_few_first_samples_the_result_descends(rare, said, method, process):
    """Modes are weighed by their founders: exact samples would be √(1 + samples/founders) times nearer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = mfm.steer(EXACT, rare, 512, method, process, seed=0)
    founders = float(got.info["founders"])
    assert (founders < 64) == said
    assert any("the samples descend from" in note for note in got.notes) == said


def test_systems_that_know_little_each_know_much_together():
    few, size = torch.full((16,), 2.0, dtype=F64), torch.full((16,), 8.0, dtype=F64)
    assert few_families(few, size, "x") == []  # 32 of 128
    assert "descend from 15 first ones" in few_families(few.index_fill(0, torch.tensor([0]), 0.1), size, "x")[0]


def test_families_are_counted_by_their_shares():
    founders = torch.tensor([0, 5, 0, 5, 1, 5, 1, 5])  # two systems of four, row m·2 + s
    torch.testing.assert_close(families(founders, 4), torch.tensor([2.0, 1.0], dtype=F64))


def _opened(method, systems, rows, reward=REWARD):
    problem = SteeringProblem(EXACT, reward, Meter())
    problem.begin(fresh_seeds(systems), None)
    return problem, method.start(problem, problem.noise("start", rows))


def test_the_first_cloud_has_the_effective_size_that_is_asked_for():
    """Half of 512 by weight, of a pool of 2,048: a good part of what is drawn is drawn twice."""
    _, cloud = _opened(mfm.Anneal(n=1, pool=4, share=0.5), 1, 512, FAR)
    assert 0.5 < len(cloud.founders.unique()) / 512 < 0.9
    assert 0 < float(cloud.strength) < 1


def test_each_system_moves_at_its_own_strength():
    """At λ = 0 a particle and its draws weigh the same; at λ = 5 they do not."""
    method = mfm.Anneal(n=1, pool=1, particles=32, num_draws=2)
    problem, cloud = _opened(method, 2, 64)
    moved, _ = method._moved(problem, cloud._replace(strength=torch.tensor([0.0, 5.0], dtype=F64)))
    weights = moved.log_weights.exp()
    torch.testing.assert_close(weights[0], torch.full((96,), 1 / 96, dtype=F64))
    assert float(weights[1].std()) > 0.1 / 96


def test_moves_look_no_further_back_than_contexts_can_lean():
    """Of two draws of a linear reward one is taken two times of three, which would send t to 0."""
    reward = mfm.rewards.LinearGaussian(torch.tensor([1.0, -0.6], dtype=F64), 40.0, 20.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = mfm.steer(EXACT, reward, 256, mfm.Anneal(num_draws=2), mfm.ODE(steps=40), seed=0)
    earliest = 1 / (1 + math.exp(-EARLIEST_LOOK))
    assert float(got.info["look"].min()) == pytest.approx(earliest)
