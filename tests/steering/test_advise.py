"""``advise``: its intervals hold on exact laws, its rules choose what they say, its lines run at the cost they say."""

import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from closed_forms import random_map

import metaflowmaps as mfm
from conftest import CASES, F64, PATHS
from metaflowmaps.random import stream
from metaflowmaps.steering.advise import recommend
from metaflowmaps.steering.pilot import (
    TELLING_ESS,
    Estimate,
    Pilot,
    convex_room,
    draws_ess,
    from_pool,
    pilot_evaluations,
    run_pilot,
)
from metaflowmaps.steering.resampling import effective

LAW = CASES["per-component-full"].law
EXACT = mfm.ExactModel(PATHS["linear"], LAW)
AXIS = torch.tensor([1.0, -0.6], dtype=F64)


def observed(y, noise):
    return mfm.rewards.LinearGaussian(AXIS, y, noise)


MILD = observed(0.8, 0.5)  # acceptance .17
UNCOMMON = observed(3.0, 0.4)  # .045
RARE = observed(4.5, 0.3)  # .0023
FAR = observed(5.5, 0.3)  # 1.7e-4


def measured(acceptance=-1.0, low=None, **known):
    """What a pilot may have measured."""
    low = acceptance - 0.5 if low is None else low
    usual = {
        "samples": 1024, "particles": 0, "bound": 0.0,
        "log_evidence": Estimate(acceptance, low, acceptance + 0.5), "pool_ess": 1024 * math.exp(acceptance),
        "constant": False, "draws_ess": {0.5: {4: 2.0, 16: 8.0}}, "gradient": "usable", "pathwise": True,
        "one_law": True, "evaluations": 4640, "seconds": 1.0, "seconds_each": 1e-5,
    }  # fmt: skip
    return Pilot(**(usual | known))


def quietly(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mfm.steer(*arguments, **options)


# -- what the pilot says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [MILD, UNCOMMON, observed(-1.0, 3.0)], ids=["mild", "uncommon", "broad"])
def test_the_interval_of_a_pool_holds_in_95_of_100(reward):
    exact, held, g = float(LAW.log_evidence(reward)), 0, stream(0, "pools")
    for _ in range(100):
        rewards = reward(LAW.sample(1024, g))
        ess = float(effective(rewards[None])[0])
        assert ess > TELLING_ESS
        got = from_pool(rewards, ess, float(rewards.max()))
        held += got.low <= exact <= got.high
        assert got.high - got.low < 1.2  # a factor of three, at an effective size of 32: it says something
    assert held >= 95


def test_the_interval_of_a_pool_that_met_nothing_is_open_below_and_holds_above():
    """One sample in 400 has r = 0, the others −60: half of the pools of 256 meet none, and say "below"."""
    g, exact = stream(0, "few"), math.log(1 / 400)
    for _ in range(100):
        rewards = torch.where(torch.rand(256, generator=g, dtype=F64) < 1 / 400, 0.0, -60.0)
        got = from_pool(rewards, float(effective(rewards[None])[0]), 0.0)
        if float(rewards.max()) == 0:
            assert got.low == -math.inf
        assert got.high >= exact


@pytest.mark.parametrize(("reward", "seed"), [(RARE, 0), (RARE, 1), (FAR, 0), (FAR, 1)])
def test_where_the_pool_meets_hardly_anything_a_cloud_says_how_rare_it_is(reward, seed):
    """Four runs, each right in 95 of 100 (the attack counts them); and it says something."""
    pilot, exact = run_pilot(EXACT, reward, 1024, None, seed), float(LAW.log_evidence(reward))
    assert pilot.particles == 256
    assert pilot.pool_ess < TELLING_ESS
    assert pilot.log_evidence.low <= exact <= pilot.log_evidence.high
    assert pilot.log_evidence.high - pilot.log_evidence.low < 8
    assert pilot.evaluations == sum(pilot_evaluations(1024))


@pytest.mark.attack
@pytest.mark.parametrize("reward", [MILD, UNCOMMON, RARE, FAR, observed(9.0, 0.3)])
def test_the_interval_holds_in_95_of_100_pilots(reward):
    exact = float(LAW.log_evidence(reward))
    found = [run_pilot(EXACT, reward, 1024, None, seed).log_evidence for seed in range(100)]
    assert sum(one.low <= exact <= one.high for one in found) >= 95


def test_a_cloud_of_few_families_says_below():
    advice = mfm.advise(EXACT, observed(9.0, 0.2), pilot=128)
    assert advice.pilot.acceptance.low == -math.inf
    # 4.6 of 128 samples, the share of a law that one pool in a hundred misses
    assert advice.pilot.acceptance.high == pytest.approx(math.log(math.log(100) / 128), abs=0.01)
    assert "acceptance below 0.036" in advice.notes[0]
    assert "fewer than one in 28 one-step samples" in advice.sentence


def test_convex_room_is_that_of_a_quadratic():
    """log E[e^{λr}] = −½ log(1 + 2λ), E_λ[r] = −1/(1 + 2λ): what both sums leave out and put in."""
    course = [(s, -1 / (1 + 2 * s), -0.5 * math.log(1 + 2 * s)) for s in (0.25, 0.5, 1.0)]
    gained = 0.5 * math.log(1.5 / 3)
    left, right = 0.25 * -1 / 1.5 + 0.5 * -1 / 2, 0.25 * -1 / 2 + 0.5 * -1 / 3
    assert convex_room(course) == pytest.approx((gained - left, right - gained))
    assert min(convex_room(course)) > 0


def test_effective_draws_count_what_they_miss():
    draws = torch.tensor([[0.0, -9.0], [0.0, -9.0]], dtype=F64)  # alike, at two states
    assert draws_ess(draws, torch.zeros(2, dtype=F64)) == pytest.approx((2 + 2 * math.exp(-9)) / 2)
    assert draws_ess(torch.full((2, 1), -torch.inf, dtype=F64), torch.zeros(1, dtype=F64)) == 0


def step(x):
    return (x[:, 0] > 0).to(x.dtype)


def flat(x):
    return (x[:, 0] > 0).to(x.dtype) + 0 * x.sum(1)


def root(x):
    return -(0 * x[:, 0]).abs().sqrt()


GRADIENTS = {
    "usable": MILD,
    "declared not differentiable": mfm.rewards.BlackBox(lambda x: x.numpy()[:, 0]),
    "not written in torch": step,
    "zero at all samples": flat,
    "not finite at some samples": root,
}


@pytest.mark.parametrize(("says", "reward"), GRADIENTS.items(), ids=GRADIENTS)
def test_says_whether_the_reward_has_a_usable_gradient(says, reward):
    model = random_map(PATHS["linear"])
    advice = mfm.advise(model, reward, budget=450, pilot=64)
    assert advice.pilot.gradient == says
    assert ("MFMG" in {type(option.method).__name__ for option in advice.options}) == (says == "usable")
    assert any("gradient of the reward" in note for note in advice.notes) == (says != "usable")


# -- what is recommended ---------------------------------------------------------------------------------------------


def test_a_mild_reward_is_rejected_by_and_a_rare_one_annealed():
    mild, rare = mfm.advise(EXACT, MILD), mfm.advise(EXACT, FAR, budget=450, pilot=256)
    assert (type(mild.method), type(rare.method)) == (mfm.Rejection, mfm.Anneal)
    got = quietly(EXACT, MILD, 1024, mild.method, mild.process, seed=0)
    # the acceptance within its interval of three standard errors, and two more of 1,024 samples
    assert mild.option.nfe == pytest.approx(got.cost["nfe"], rel=0.25)


CHOSEN = {
    "accepted often enough": (measured(-3.0), 450, 1024, "rejection"),
    "too seldom for the budget": (measured(-6.0, pool_ess=3.0, particles=256), 450, 1024, "mfm-anneal"),
    "often enough for a larger one": (measured(-6.0, pool_ess=3.0, particles=256), 2000, 1024, "rejection"),
    "known from above alone": (measured(-5.5, -math.inf, pool_ess=2.0, particles=256), 2000, 1024, "mfm-anneal"),
    "no largest value": (measured(-9.0, pool_ess=300.0), 450, 1024, "resampling"),
    "too few for a cloud": (measured(-9.0, pool_ess=1.0, particles=256), 450, 16, "mfm-gf"),
    "and draws that see nothing": (
        measured(-9.0, pool_ess=1.0, particles=256, draws_ess={0.5: {4: 0.1, 16: 0.3}}), 450, 16, "mfm-anneal"),
    "a law for each sample": (measured(-3.0, one_law=False), 450, 1024, "mfm-gf"),
    "hardly any budget": (measured(-9.0, pool_ess=1.0, particles=256), 10, 1024, "resampling"),
    "the same for all": (measured(0.0, constant=True), 450, 1024, "rejection"),
}  # fmt: skip


@pytest.mark.parametrize(("pilot", "budget", "num", "name"), CHOSEN.values(), ids=CHOSEN)
def test_rules(pilot, budget, num, name):
    advice = recommend(pilot, budget, num)
    assert advice.method.name == name
    assert advice.sentence.count(".\n") == 0
    assert advice.sentence.endswith(".")


@pytest.mark.parametrize("acceptance", [-0.5, -4.0, -6.5, -12.0, -40.0])
def test_no_option_exceeds_the_budget(acceptance):
    for budget in (2, 3, 10, 24, 50, 150, 450, 1000, 2000, 30_000):
        for num in (1, 16, 1024):
            advice = recommend(measured(acceptance), budget, num)
            assert all(0 < option.nfe <= budget for option in advice.options)
            assert advice.options[advice.chosen] is advice.option


def test_more_draws_where_four_see_too_little():
    seen = recommend(measured(-9.0), 1000, 16).method
    unseen = recommend(measured(-9.0, draws_ess={0.5: {4: 0.4, 16: 1.5}}), 1000, 16).method
    assert (seen.num_draws, unseen.num_draws) == (4, 16)


def test_a_bound_is_learned_from_ten_accepted_samples():
    method = recommend(measured(-6.0, pool_ess=3.0, particles=256), 2000, 1024).method
    assert method.pilot >= 10 * math.exp(6.0)
    assert method.max_proposals >= 25 * math.exp(6.0)


@pytest.mark.parametrize("budget", [60, 340])
def test_every_line_runs_as_printed_and_costs_what_it_says(budget):
    advice = recommend(measured(-1.0), budget, 8)
    model = random_map(PATHS["linear"])
    for option in advice.options:
        line = option.python(8).replace("pilot=1024", "pilot=16")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = eval(line, {"mfm": mfm, "model": model, "reward": observed(0.8, 3.0)})
        assert len(result.samples) == 8
        if option.error != "exact":  # rejection's cost is chance
            assert result.cost["nfe"] == pytest.approx(option.nfe), line


def test_advice_is_printed_and_kept():
    advice = mfm.advise(EXACT, MILD, budget=100, pilot=256)
    text, kept = str(advice), json.loads(json.dumps(advice.to_json()))
    assert "→ rejection" in text
    assert text.endswith("mfm.steer(model, reward, 1024, mfm.Rejection())")
    assert kept["recommended"] == "rejection"
    assert kept["pilot"]["evaluations"] == pilot_evaluations(256)[0]
    assert len(kept["options"]) == len(advice.options)
    assert mfm.advise(EXACT, MILD, budget=100, pilot=256).pilot.acceptance == advice.pilot.acceptance


def test_samples_of_several_labels_are_steered_one_by_one():
    model = random_map(PATHS["linear"], num_classes=3)
    several, one = {"label": torch.arange(300) % 3}, {"label": torch.full((300,), 2)}
    assert mfm.advise(model, FAR, 450, 300, cond=several, pilot=64).method.name == "mfm-gf"
    assert mfm.advise(model, MILD, 450, 300, cond=one, pilot=64).pilot.one_law


# -- what it refuses ---------------------------------------------------------------------------------------------------


def test_a_constant_reward_needs_no_steering():
    advice = mfm.advise(EXACT, lambda x: 0 * x[:, 0] + 3.0, pilot=64)
    assert "need no steering" in advice.sentence
    assert advice.pilot.acceptance.value == pytest.approx(0.0)


BAD = {
    "a reward of NaN": (EXACT, lambda x: x[:, 0] * math.nan, {}, "must be finite"),
    "a reward that forbids all": (EXACT, lambda x: x[:, 0] * 0 - math.inf, {}, "falls off gradually"),
    "a drift alone": (
        SimpleNamespace(path=PATHS["linear"], event_shape=(2,), drift=EXACT.drift), MILD, {}, "mfm.Glass()"),
    "no budget": (EXACT, MILD, {"budget": 0}, "from 2 on; got 0"),
    "a broken budget": (EXACT, MILD, {"budget": 10.5}, "whole number"),
    "no samples": (EXACT, MILD, {"num_samples": 0}, "num_samples must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "reward", "options", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(model, reward, options, says):
    with pytest.raises(mfm.InputError, match=says.replace("(", r"\(").replace(")", r"\)")) as refused:
        mfm.advise(model, reward, pilot=64, **options)
    assert "\n" not in str(refused.value)
