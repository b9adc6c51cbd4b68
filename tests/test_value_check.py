"""What samples of the model say of a value from many draws: of a missed mode, and nothing of good estimates."""

import warnings

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, PATHS, paper_law
from metaflowmaps.random import stream

PATH = PATHS["linear"]
# a mode of weight .03 that the reward lifts by e^16; at t = .5 and x = 0 two draws in 10⁵ are in it
LAW = mfm.GaussianMixture(
    torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]], dtype=F64), 0.1, torch.tensor([0.97, 0.03], dtype=F64)
)


def lifted(x):
    return 16.0 * (x[:, 0] > 2)


def warned(posterior, reward, t, x, n, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = mfm.value_gradient(posterior, reward, t, x, n, "gradient-free", stream(0), **options)
    return got, " | ".join(str(w.message) for w in caught)


def test_a_mode_that_no_draw_has_seen_is_said():
    """V is 16 + log p(mode | x_t); 4,096 draws that never met it have V̂ = 0 with an error of 0."""
    x = torch.zeros(1, 3)
    share = float(LAW.posterior(PATH, 0.5, x).weights[0, 1])
    assert share < 1e-4
    got, said = warned(mfm.ExactPosterior(PATH, LAW), lifted, 0.5, x, 4096)
    assert float(got.value) == 0  # the seed is one of those that miss it
    assert float(got.std_err) == 0
    assert "have missed a mode that the reward favours" in said
    assert "1 of 1 states" in said


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.8])
def test_good_estimates_are_quiet(t):
    law, path = paper_law(), PATH
    x = path.interpolate(torch.randn(8, 2, generator=stream(1), dtype=F64), law.sample(8, stream(2)), t)
    mild = mfm.rewards.LinearGaussian(torch.tensor([1.2, -0.8], dtype=F64), -1.0, 2.0)
    x = x.float()
    assert warned(mfm.ExactPosterior(path, law), mild, t, x, 512)[1] == ""
    assert warned(mfm.TweediePosterior(path, mfm.ExactModel(path, law).drift), mild, t, x, 512)[1] == ""


def test_few_draws_cost_no_samples_and_the_estimate_is_the_same():
    calls = []

    class Counted(mfm.ExactPosterior):
        def draw(self, t, x_t, num_draws, generator=None, cond=None):
            calls.append(num_draws * len(x_t))
            return super().draw(t, x_t, num_draws, generator, cond)

    x = torch.zeros(2, 3)
    few, _ = warned(Counted(PATH, LAW), lifted, 0.3, x, 16)
    assert sum(calls) == 32
    assert few.value.shape == (2,)


def test_states_of_several_conditions_have_samples_of_their_own():
    class Labelled(mfm.ExactPosterior):
        def draw(self, t, x_t, num_draws, generator=None, cond=None):
            return super().draw(t, x_t, num_draws, generator) + 10.0 * cond["label"].to(x_t)[:, None]

    labels = torch.tensor([0, 1])
    x = torch.zeros(2, 3)
    _, said = warned(Labelled(PATH, LAW), lambda x: 0 * x[:, 0], 0.0, x, 2048, cond={"label": labels})
    assert said == ""
