"""What samples say against themselves: each warning fires on a failure made for it, and good runs are quiet."""

import warnings

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, PATHS, normal, paper_law
from metaflowmaps.random import stream
from metaflowmaps.steering import diagnostics
from metaflowmaps.steering.diagnostics import SteeredBatch, bias_of, findings

MODEL = mfm.ExactModel(PATHS["linear"], paper_law())
SHARP = mfm.rewards.LinearGaussian(torch.tensor([1.2, -0.8], dtype=F64), -1.0, 0.2)  # the paper's
MILD = mfm.rewards.LinearGaussian(torch.tensor([1.2, -0.8], dtype=F64), -1.0, 2.0)


def notes(method, reward=SHARP, process=None, n=256):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = mfm.steer(MODEL, reward, n, method, process or method.usual(steps=25), seed=0)
    assert [str(w.message) for w in caught] == list(result.notes)
    assert all("\n" not in note for note in result.notes)
    return " | ".join(result.notes)


GOOD = {
    "rejection": (mfm.Rejection(bound=0.0), SHARP),
    "pool": (mfm.Resampling(n=32), SHARP),
    "many draws": (mfm.MFMGF(num_draws=16), MILD),
    "default draws": (mfm.MFMGF(), MILD),
    "particles": (mfm.SMC(num_draws=4), MILD),
    "exact": (mfm.Exact(), SHARP),
    "no steering": (mfm.Unsteered(), SHARP),  # it aims at nothing
    "search": (mfm.Search(), SHARP),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_runs_are_quiet(name):
    assert notes(*GOOD[name]) == ""


def test_too_few_draws_are_said_with_the_number_to_try():
    """The mode of a sharp reward is chosen by the first draws: one a step is too few, though all were exact."""
    assert "short of draws" in notes(mfm.MFMGF(num_draws=1))
    assert "use num_draws=2 or more" in notes(mfm.MFMGF(num_draws=1))


@pytest.mark.parametrize(("collapsed", "said"), [(5, False), (6, True)])
def test_a_collapse_is_said_where_it_is_at_most_steps(collapsed, said):
    ess = torch.tensor([1.0] * collapsed + [3.0] * (10 - collapsed))
    info = {"ess": ess, "base_ess": torch.full((10,), 4.0)}
    batch = SteeredBatch(None, mfm.MFMGF(), None, torch.zeros(0, 2), torch.zeros(0), info, None)
    assert [note[:28] for note in findings(batch)] == ["one draw carries all the wei"] * said


def test_a_missed_mode_is_said():
    """DPS has mode weights (.98, .02, 0) for (.57, .37, .06)."""
    assert "one-step samples weighed by e^r disagree" in notes(mfm.DPS())


def test_a_reward_that_no_draw_has_seen_is_said():
    """50 on one sample in 100: without steering nearly none is there, yet the best one-step sample is."""
    rare = paper_law().sample(100_000, stream(0, "rare"))[:, 0].quantile(0.99)

    def reward(x):
        return 50.0 * (x[:, 0] > rare)

    blind = mfm.MFMGF(num_draws=1, recycle=1)  # one draw is its own mean: no shift at all
    assert "one-step samples has reward 50, above 90%" in notes(blind, reward)


RARE = mfm.rewards.LinearGaussian(torch.tensor([1.2, -0.8], dtype=F64), -8.0, 0.7)  # log E[e^r] = -16.8


@pytest.mark.parametrize("method", [mfm.DPS(), mfm.TDS(), mfm.Resampling()])
def test_where_the_pool_sees_nothing_a_method_without_draws_is_unconfirmed(method):
    """DPS has rewards as high as the law's there, and the pool an effective size of 1: nothing could contradict it."""
    assert "nothing here confirms these samples" in notes(method, RARE)


def test_methods_that_know_their_own_error_are_not_called_unconfirmed():
    assert notes(mfm.Exact(), RARE) == ""
    assert "confirms" not in notes(mfm.MFMGF(), RARE)  # its own draws tell: too few


def left_behind(samples, reward=SHARP, size=1024):
    seen = paper_law().sample(size, stream(0, "pool"))
    pool = diagnostics._Pool(None, seen, reward(seen).double())
    batch = SteeredBatch(None, mfm.MFMGF(), mfm.ODE(), samples, reward(samples), {}, None)
    return list(diagnostics._left_behind(batch, pool))


@pytest.mark.parametrize("reward", [SHARP, MILD, RARE])
@pytest.mark.parametrize("n", [64, 4096])
def test_samples_left_in_another_mode_are_counted_and_exact_ones_are_none(reward, n):
    """Three in thousands move no mean of theirs by a standard error, and SW2 by several floors."""
    exact = paper_law().tilt(reward).sample(n, stream(0, "exact", n))
    assert left_behind(exact, reward) == []
    assert left_behind(exact, reward, 64) == []  # where a small pool has nothing lower, one more of it is allowed for
    lost = exact.clone()
    lost[:2] = torch.tensor([40.0, -40.0])
    assert left_behind(lost, reward) == []  # two may be chance
    lost[2] = lost[0]
    assert f"3 of {n} samples were left" in left_behind(lost, reward)[0]


def test_evidence_that_particles_got_wrong_is_said():
    assert "the evidence" in notes(mfm.TDS(), SHARP)


def test_samples_off_the_support_are_said():
    """A steering term a hundred times as long as the drift carries samples where no data are."""
    found = notes(mfm.MFMGF(recycle=1), MILD, mfm.ODE(steps=25, renormalize="rescale", renormalize_to=100.0))
    assert "nothing that the model would make" in found


def test_what_the_model_would_make_is_meant_in_its_own_units():
    """Of data a hundredth as wide, samples a tenth off are nothing like them."""
    narrow = mfm.ExactModel(PATHS["linear"], mfm.GaussianMixture(torch.zeros(1, 2, dtype=F64), 1e-4))
    far = mfm.ODE(steps=25, renormalize="rescale", renormalize_to=0.5)
    with pytest.warns(UserWarning, match="nothing that the model would make"):
        mfm.steer(narrow, lambda x: x[:, 1], 256, mfm.MFMGF(num_draws=16), far, seed=0)


def test_the_check_costs_a_fortieth_and_is_not_in_the_cost():
    """A run of few evaluations has no pool; the samples and their cost are those of the method alone."""
    seen = []

    def reward(x):
        seen.append(len(x))
        return MILD(x)

    n, steps, draws = 40, 10, 4
    result = mfm.steer(MODEL, reward, n, mfm.MFMGF(num_draws=draws), mfm.ODE(steps=steps), seed=0)
    spent = n * steps * (1 + 2 * draws)
    assert result.cost["nfe"] == spent / n
    assert sum(seen) == n * steps * draws + n + spent // 40  # draws, the finished samples, the pool
    seen.clear()
    mfm.steer(MODEL, reward, 4, mfm.MFMGF(num_draws=draws), mfm.ODE(steps=steps), seed=0)
    assert sum(seen) == 4 * steps * draws + 4


def test_bias_is_the_mean_move_in_standard_deviations_beyond_chance():
    samples, n = 2 * normal(4096, 3), 4096
    assert float(bias_of(normal(n, 3, seed="noise"), samples)) == 0  # a mean of noise is 1/√n
    move = 0.5 + 0.1 * normal(n, 3, seed="small")
    # ‖(.5, .5, .5)‖ of a spread √(3 · 4); samples' spread is known to 1/√(6 n) < 1 %
    assert float(bias_of(move, samples)) == pytest.approx(0.25, rel=0.02)
    assert bias_of(move[:5], samples[:5]).isnan()


def test_notes_are_kept(tmp_path):
    result = mfm.steer(MODEL, SHARP, 256, mfm.DPS(), mfm.ODE(steps=25), seed=0)
    result.save(tmp_path / "samples.safetensors")
    assert mfm.SteerResult.load(tmp_path / "samples.safetensors").notes == result.notes != ()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_samples_are_not_lost_by_looking_at_them(error):
    """A reward that fails after the last sample is scored: in the pool."""
    left = [25 * 256 * 4 + 256]  # draws, and the finished samples

    def reward(x):
        left[0] -= len(x)
        if left[0] < 0:
            raise error
        return MILD(x)

    with pytest.warns(UserWarning, match="were not looked at"):
        result = mfm.steer(MODEL, reward, 256, mfm.MFMGF(), mfm.ODE(steps=25), seed=0)
    assert len(result.samples) == len(result.rewards) == 256
    assert not result.interrupted
