"""The judge of the frontier on digits, where the law is known: a Gaussian under a linear reward."""

import math

import pytest
import torch

import metaflowmaps as mfm
from benchmarks import frontier, frontier_digits
from metaflowmaps.random import stream
from metaflowmaps.steering.diagnostics import without_pilot_pool


class Gaussian:
    """A map whose one-step law is N(0, Id)."""

    event_shape = (4,)

    def generate(self, num, generator=None):
        return torch.randn(num, *self.event_shape, generator=generator)


def reward(x):
    return x[:, 0]


@pytest.fixture(scope="module")
def judge():
    return frontier_digits.PoolJudge(Gaussian(), reward, 256, 2**16)


def test_the_pool_knows_the_evidence_and_how_much_it_is_worth(judge):
    """E[e^x] = e^½, told relative to the largest reward that was met; the ESS is 1/e of the pool."""
    largest = 0.5 - judge.log_evidence
    assert largest == pytest.approx(math.sqrt(2 * math.log(2**16)), abs=0.7)  # of 2^16 normals: 4.3 ± .25
    assert judge.effective == pytest.approx(2**16 / math.e, rel=0.1)  # four times its error, of a fourth moment


def test_samples_of_the_tilted_law_are_at_the_floor_and_others_are_not(judge):
    sets = [torch.randn(256, 4, generator=stream(i, "sets")) for i in range(8)]
    right = judge.distance([x + torch.tensor([1.0, 0, 0, 0]) for x in sets])
    assert right.sw2 / right.floor_sw2 == pytest.approx(1, abs=0.3)  # eight sets against eight
    assert right.reward == pytest.approx(1, abs=0.09)  # four errors of 2,048 samples
    assert judge.distance(sets).sw2 > 3 * right.floor_sw2
    lost = judge.distance([x.index_fill(0, torch.tensor([0]), math.nan) for x in sets])
    assert lost.sw2 > 100 * right.floor_sw2


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("budget", [50, 450])
def test_every_method_costs_about_its_budget(budget):
    """Read off the meter, on the plane; a tenth is left to what whole steps and draws cannot divide."""
    model = mfm.ExactModel(mfm.LinearPath(), mfm.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.5))
    for name, how in frontier.settings(budget).items():
        with without_pilot_pool():
            cost = mfm.steer(model, reward, 8, *how, seed=0).cost["nfe"]
        assert cost == pytest.approx(budget, rel=0.1), name
