"""Baselines: what each one learns, and that none looks at the draws it weighs."""

import math

import pytest
import torch
from exact import LEVEL, Case, regression

import metaflowmaps as mfm
from conftest import F64, normal, uniform
from metaflowmaps.checkpoint.flatten import flatten_state, unflatten_state
from metaflowmaps.draws import equal_log_weights
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning.baseline import Baseline, DrawnLevel, LearnedLevel, Level, RunningLevel
from metaflowmaps.finetuning.state_laws import log_mean_exp
from metaflowmaps.random import stream
from metaflowmaps.value import log_mean
from metaflowmaps.work.choices import build

KINDS = ("none", "running", "learned", "draws")
LINEAR = mfm.LinearPath()


def made(kind, problem, start=-0.5, **options):
    small = {"width": 16} if kind == "learned" else {}
    return build(Baseline, kind, {**small, **options}).start(problem, start, seed=0)


def places(case, problem, n, seed="states"):
    """States of the base's own law at all times."""
    g = stream(0, seed, n)
    x_1 = case.law.sample(n, g).to(case.dtype)
    noise = torch.randn(n, case.dim, generator=g, dtype=F64).to(case.dtype)
    return problem.noised(problem.times(n, g).to(case.dtype), x_1, noise, {})


def exact(case, place):
    """V at the states of a place."""
    return case.law.value(case.path, place.t.double(), place.x.double(), case.reward)


# -- running -----------------------------------------------------------------------------------------------------------


def test_the_running_level_is_an_average_of_exponentials():
    """e^level moves by the rate towards the mean of e^V̂ of its bin, where −inf counts as 0; other bins keep the start.

    To 1e-6: the rate is rounded to float32 on the way.
    """
    case = Case("gaussian-1d", LINEAR)
    place = places(case, case.problem(), 40)
    place = place._replace(a=torch.cat([torch.full((30,), 0.3, dtype=F64), torch.full((10,), 0.9, dtype=F64)]))
    baseline = RunningLevel(4, 0.25, 0.2)
    assert torch.equal(baseline(place, stream(0)), torch.full((40,), 0.2, dtype=F64))
    value = normal(40)
    value[0] = -torch.inf
    baseline.update(place, value)
    expected = [math.log(0.75 * math.exp(0.2) + 0.25 * float(part.exp().mean())) for part in (value[:30], value[30:])]
    level = baseline(place, stream(0))
    torch.testing.assert_close(level[[0, 39]], torch.tensor(expected, dtype=F64), rtol=1e-6, atol=0)
    torch.testing.assert_close(baseline.level[[0, 2]], torch.full((2,), 0.2, dtype=F64), rtol=0, atol=0)


def test_hopeless_bins_keep_their_level():
    case = Case("gaussian-1d", LINEAR)
    place = places(case, case.problem(), 40)
    baseline = RunningLevel(32, 0.25, 0.2)
    baseline.update(place, torch.full((40,), -torch.inf, dtype=F64))
    assert torch.equal(baseline(place, stream(0)), torch.full((40,), 0.2, dtype=F64))


def test_the_running_level_of_base_states_is_the_log_mean_of_the_reward(path):
    """E[e^{V_t(x_t)}] = E[e^r] at every t. One batch at rate 1: z-scores by the delta method, each of 8 bins."""
    case = Case("gaussian-2d", path)
    problem = case.problem()
    place = places(case, problem, 40_000)
    rewards = problem.draws(place, 2, False, stream(1)).rewards
    value = log_mean(rewards, equal_log_weights(rewards))
    baseline = RunningLevel(8, 1.0, 3.0)
    baseline.update(place, value)
    evidence = float(case.law.log_evidence(case.reward))
    for b in range(8):
        tilt = value[(place.a >= b / 8) & (place.a < (b + 1) / 8)].exp()
        error = tilt.std() / tilt.mean() / math.sqrt(len(tilt))
        assert abs(float(baseline.level[b]) - evidence) < LEVEL * error
        assert error < 0.02  # there is power: levels of e^V at other strengths differ by more


# -- learned -----------------------------------------------------------------------------------------------------------


def test_the_learned_baseline_becomes_the_value():
    """200 batches of 512 rows with one draw each, judged on fresh states: right on average, and state by state.

    An average of r, which one draw's V̂ is, would be low by E[V − r], here 0.35: a third of that is allowed. State by
    state a third of the spread of V is left to the perceptron; a level a bin is off by nearly all of it.
    """
    case = Case("gaussian-2d", LINEAR, torch.float32)
    problem = case.problem()
    learned, running = made("learned", problem, lr=0.01), made("running", problem)
    for step in range(200):
        place = places(case, problem, 512, f"step-{step}")
        rewards = problem.draws(place, 1, False, stream(step)).rewards
        for baseline in (learned, running):
            baseline.update(place, log_mean(rewards, equal_log_weights(rewards)))
    place = places(case, problem, 4000)
    value, rewards = exact(case, place), problem.draws(place, 1, False, stream(-1)).rewards[0].double()
    spread, gap = float(value.std()), float((value - rewards).mean())
    assert spread > 0.5
    assert gap > 0.3
    off, off_by_bins = (baseline(place, stream(0)).double() - value for baseline in (learned, running))
    assert abs(float(off.mean())) < gap / 3
    assert float(off.square().mean().sqrt()) < spread / 3
    assert float(off_by_bins.std()) > 2 / 3 * spread


@pytest.mark.parametrize("off", [-30.0, 30.0])
def test_the_learned_baseline_comes_back_from_far_away(off):
    """From 30 too low, where e^{r − c} is past its limit, and from 30 too high: 300 steps later it is nearer."""
    case = Case("gaussian-2d", LINEAR, torch.float32)
    problem = case.problem()
    baseline = made("learned", problem, 0.0, lr=0.03)
    with torch.no_grad():
        baseline.network.head.bias.fill_(off)
    place = places(case, problem, 32)
    for _ in range(300):
        baseline.update(place, torch.zeros(32))
    assert baseline(place, stream(0)).abs().max() < 15


# -- independent draws -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 4])
def test_independent_draws_estimate_the_value_without_bias(draws, path):
    """Of its exponential, that is: the mean of e^{c − V} over states is 1."""
    case = Case("gaussian-2d", path)
    problem = case.problem()
    place = places(case, problem, 20_000)
    value = exact(case, place)
    ratio = (made("draws", problem, num_draws=draws)(place, stream(1)) - value).exp()
    assert abs(float(ratio.mean() - 1)) < LEVEL * float(ratio.std()) / math.sqrt(len(ratio))
    assert ratio.std() > 0.1


@pytest.mark.parametrize("reward", [-math.inf, -5.0, 1.0])
def test_independent_draws_stand_on_a_floor(reward):
    """log(e^V̂ + e^{level − 3}): a twentieth of the level's e^c is the least, and V̂ far above it stays V̂."""
    case = Case("gaussian-1d", LINEAR)
    problem = case.problem(mfm.rewards.BlackBox(lambda x: torch.full_like(x[:, 0], reward)))
    level = made("draws", problem, start=-0.5)(places(case, problem, 10), stream(1))
    expected = math.log(math.exp(reward) + math.exp(-3.5))
    torch.testing.assert_close(level, torch.full((10,), expected, dtype=F64), rtol=1e-12, atol=0)  # roundings


@pytest.mark.parametrize("kind", KINDS)
def test_weights_stay_finite_where_samples_are_forbidden(kind):
    """r = −inf for most draws, so that all of a baseline's own may be: a weight is never infinite or NaN."""
    case = Case("gaussian-1d", LINEAR, torch.float32)
    reward = mfm.rewards.BlackBox(lambda x: torch.where(x[:, 0] > 1.3, 0.0, -torch.inf))
    problem = case.problem(reward)
    objective = regression(case, made(kind, problem), "gradient-free", 4, size=500, problem=problem)
    for step in range(3):
        batch = objective.batch(case.student(), step)
        assert batch.weight.isfinite().all()
        assert batch.target.isfinite().all()
    assert (batch.weight == 0).any()
    assert (batch.weight > 0).any()


# -- what none of them may see -----------------------------------------------------------------------------------------


class Watched:
    """A baseline behind a record of what it said and when."""

    def __init__(self, inner):
        self.inner, self.log, self.levels, self.speaking = inner, [], [], False

    def __call__(self, place, generator):
        self.log.append("level")
        self.speaking = True
        self.levels.append(self.inner(place, generator).clone())
        self.speaking = False
        return self.levels[-1]

    def update(self, place, value):
        self.log.append("update")
        self.inner.update(place, value)


@pytest.mark.parametrize("kind", KINDS)
def test_levels_do_not_look_at_the_draws_they_weigh(kind, monkeypatch):
    """The rewards of one batch's draws changed, its levels stay; the next batch's move where the baseline learns."""
    case, levels = Case("gaussian-2d", LINEAR, torch.float32), []
    for extra in (0.0, 3.0):
        problem = case.problem()
        watched = Watched(
            made(kind, problem, **{"none": {}, "learned": {"rate": 0.5, "lr": 0.1}}.get(kind, {"rate": 0.5}))
        )
        honest = problem.draws

        def draws(*arguments, honest=honest, watched=watched, extra=extra):
            drawn = honest(*arguments)
            second = len(watched.levels) == 1 and not watched.speaking
            return drawn._replace(rewards=drawn.rewards + extra) if second else drawn

        monkeypatch.setattr(problem, "draws", draws)
        objective = regression(case, watched, "gradient-free", 2, size=100, problem=problem)
        for step in range(3):
            objective.batch(case.student(), step)
        assert watched.log == ["level", "update"] * 3
        levels.append(watched.levels)
    for plain, changed in zip(levels[0][:2], levels[1][:2], strict=True):
        assert torch.equal(plain, changed)
    moved = bool((levels[0][2] != levels[1][2]).any())
    assert moved == (kind != "none")


def test_independent_draws_are_not_those_of_the_batch():
    """All that the reward sees in one batch differs: N draws and the baseline's, none of them twice."""
    case, seen = Case("gaussian-2d", LINEAR), []
    problem = case.problem(lambda x: (seen.append(x.clone()), case.reward(x))[1])
    regression(case, made("draws", problem, num_draws=3), "gradient-free", 2, size=50, problem=problem).batch(None, 0)
    rows = torch.cat(seen)
    assert len(rows) == 50 * (2 + 3)
    assert len(rows.unique(dim=0)) == len(rows)


# -- making and keeping ------------------------------------------------------------------------------------------------


def test_baselines_start_at_the_log_mean_of_the_pool():
    case = Case("gaussian-2d", LINEAR, torch.float32)
    problem = case.problem()
    rewards = torch.cat([normal(100), torch.tensor([-torch.inf])])
    place = places(case, problem, 10)
    start = math.log(float(rewards.exp().mean()))
    kinds = {"none": Level, "running": RunningLevel, "learned": LearnedLevel, "draws": DrawnLevel}
    for kind, expected in kinds.items():
        baseline = build(Baseline, kind, {}).start(problem, log_mean_exp(rewards), 0)
        assert type(baseline) is expected
        if kind in ("running", "learned"):
            torch.testing.assert_close(baseline(place, stream(0)), torch.full((10,), start), rtol=1e-6, atol=0)
    assert not Level()(place, stream(0)).any()
    with pytest.raises(InputError, match="finite reward"):
        log_mean_exp(torch.full((8,), -torch.inf))


@pytest.mark.parametrize("kind", KINDS)
def test_a_baseline_goes_on_from_its_state(kind):
    """Through a checkpoint's own encoding, bit for bit: levels, weights and Adam's moments."""
    case = Case("gaussian-2d", LINEAR, torch.float32)
    problem = case.problem()
    place = places(case, problem, 64)
    values = uniform(6, 64).float()
    first = made(kind, problem)
    for value in values[:3]:
        first.update(place, value)
    tensors, skeleton = flatten_state(first.state_dict())
    second = made(kind, problem, start=2.0)
    second.load_state_dict(unflatten_state({k: v.clone() for k, v in tensors.items()}, skeleton))
    for value in values[3:]:
        first.update(place, value)
        second.update(place, value)
    assert torch.equal(first(place, stream(0)), second(place, stream(0)))
