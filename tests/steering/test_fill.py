"""mfm-gf with fill=True: a whole pool of draws at the first step."""

import torch

import metaflowmaps as mfm
from calls import steer
from conftest import F64, paper_law
from metaflowmaps.random import stream

MODEL = mfm.ExactModel(mfm.LinearPath(), paper_law())
REWARD = mfm.rewards.LinearGaussian([1.2, -0.8], -1.0, 0.2)


def steered(reward, **options):
    return steer(MODEL, reward, 512, "mfm-gf", 2, 10, generator=stream(0, "fill"), **options)


def test_it_costs_the_pool_once():
    # K + 2NK, and N (L − 1) more draws with their rewards at the first step
    assert steered(REWARD, recycle=4).cost["nfe"] == 10 + 2 * 2 * 10
    assert steered(REWARD, recycle=4, fill=True).cost["nfe"] == 10 + 2 * 2 * 10 + 2 * 2 * 3


def test_the_first_estimate_rests_on_the_whole_pool():
    seen = [steered(REWARD, recycle=4, fill=fill).info["base_ess"] for fill in (False, True)]
    # draws of one context have equal weights, to rounding: 2 of them, or 4 × 2
    torch.testing.assert_close(seen[0][0], torch.tensor(2.0, dtype=F64), rtol=1e-9, atol=0)
    torch.testing.assert_close(seen[1][0], torch.tensor(8.0, dtype=F64), rtol=1e-9, atol=0)


def test_zero_reward_is_the_base_sampler():
    zero = mfm.rewards.Tempered(REWARD, 0.0)
    base = steer(MODEL, zero, 512, "none", steps=10, generator=stream(0, "fill"))
    assert torch.equal(steered(zero, recycle=4, fill=True).samples, base.samples)


def test_the_early_choice_of_a_mode_improves():
    # one draw a step, 50 steps: mode weights off by about .09 without and .03 with (docs/log.md); 2,048 samples of the
    # exact law are off by .02 on average
    exact = paper_law().tilt(REWARD)

    def error(fill):
        x = steer(
            MODEL, REWARD, 2048, "mfm-gf", 1, 25, generator=stream(0, "mode"), fill=fill
        ).samples.double()  # fmt: skip
        shares = torch.bincount(torch.cdist(x, exact.means).argmin(1), minlength=3) / len(x)
        return float((shares - exact.weights).abs().sum())

    assert error(True) < 0.6 * error(False)
