"""CRPS, energy score and coverage, against their definitions and on laws where they are known."""

import math

import pytest
import torch

from metaflowmaps.errors import InputError
from metaflowmaps.metrics.scores import coverage, crps, energy_score
from metaflowmaps.random import stream


def test_scores_are_their_definitions():
    draws, truth = (torch.randn(n, 3, 2, generator=stream(0, n)).double() for n in (5, 1))
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    expected = (draws - truth).abs().mean(0) - sum((draws[i] - draws[j]).abs() for i, j in pairs) / len(pairs) / 2
    torch.testing.assert_close(crps(draws, truth[0]), expected.mean(1))
    norms = (draws - truth).norm(dim=2).mean(0) - sum((draws[i] - draws[j]).norm(dim=1) for i, j in pairs) / 40
    torch.testing.assert_close(energy_score(draws, truth[0]), norms)


def test_the_crps_of_a_normal_forecast_is_known():
    draws, truth = torch.randn(400, 500, 1, generator=stream(0, "draws")), torch.zeros(500, 1)
    # at its centre: E|X| − ½ E|X − X'| = √(2/π) − 1/√π; five standard errors of 500 forecasts that scatter by .02
    assert float(crps(draws, truth).mean()) == pytest.approx(math.sqrt(2 / math.pi) - 1 / math.sqrt(math.pi), abs=5e-3)


def test_scores_do_not_depend_on_how_many_draws_there_are_and_prefer_the_truth():
    truth = torch.randn(2000, 1, generator=stream(0, "truth"))
    few, many, wide = (
        float(crps(scale * torch.randn(n, 2000, 1, generator=stream(1, n)), truth).mean())
        for n, scale in ((4, 1.0), (200, 1.0), (201, 2.0))
    )
    assert few == pytest.approx(many, abs=0.06)  # five standard errors: a forecast of 4 draws scatters by .5
    assert many < wide


def test_a_calibrated_forecast_covers_what_it_says():
    draws, truth = (
        torch.randn(999, 2000, 1, generator=stream(0, "draws")),
        torch.randn(2000, 1, generator=stream(1, "y")),
    )
    shares = coverage(draws, truth)
    for level in (0.5, 0.9):
        assert abs(shares[f"{level:g}"] - level) < 5 * math.sqrt(level * (1 - level) / 2000) + 2e-3  # of the quantiles


def test_a_point_forecast_is_scored_by_its_error_and_shapes_must_agree():
    assert crps(torch.full((1, 2, 1), 3.0), torch.zeros(2, 1)).tolist() == [3.0, 3.0]
    assert energy_score(torch.full((1, 2, 1), 3.0), torch.zeros(2, 1)).tolist() == [3.0, 3.0]
    with pytest.raises(InputError, match="as the truth is"):
        crps(torch.zeros(4, 3), torch.zeros(3, 1))
