"""Simulators with known posteriors: draws of the posterior go with the simulations; a classifier tells laws apart."""

import pytest
import torch
from benchmarks.classifier_test import c2st
from benchmarks.simulators import TASKS

from benchmarks import classifier_test
from metaflowmaps.metrics.two_sample import two_sample_test
from metaflowmaps.random import stream


@pytest.mark.parametrize("name", TASKS)
def test_posterior_draws_go_with_the_simulations(name):
    task = TASKS[name]
    theta, x = task.simulate(300, stream(0, "simulate"))
    drawn = torch.cat([task.posterior(one, 1, stream(k, "posterior")) for k, one in enumerate(x)])
    # pairs of two coordinates each; the other half of the simulations, so that both sets are independent
    made, again, other = (torch.cat([part[:, :2], x[:, :2]], 1) for part in (theta, drawn, drawn.flip(0)))
    half = len(made) // 2
    assert two_sample_test(made[:half], again[half:], permutations=99, generator=stream(0, "test")).p_value > 0.05
    assert two_sample_test(made[:half], other[half:], permutations=99, generator=stream(0, "test")).p_value < 0.05


def test_a_classifier_tells_laws_apart_and_not_one_from_itself(monkeypatch):
    monkeypatch.setattr(classifier_test, "STEPS", 50)
    x, y = (torch.randn(600, 2, generator=stream(k, "draws")) for k in range(2))
    assert abs(c2st(x, y) - 0.5) < 5 * 0.5 / 1200**0.5  # five standard errors of 1,200 guesses
    assert c2st(x, y + 2) > 0.8  # the best possible: Φ(√2) = .92
