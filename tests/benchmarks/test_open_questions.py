"""Benchmarks of the open questions: their helpers against closed forms, and each of them whole, all of it tiny."""

import json
import math

import pytest
import torch

import metaflowmaps as mfm
from benchmarks import common, frontier, low_dimensional
from conftest import F64
from metaflowmaps.lab.figures import plots as figures

PATH = mfm.LinearPath()


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results go here; references are small, and figures are made, but not painted."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(frontier.Judge, "REFERENCE", 2**10)
    monkeypatch.setattr(frontier.Judge, "EXACT_SETS", 2)
    monkeypatch.setattr(frontier.Judge, "FREQUENCIES", 2)
    monkeypatch.setattr(figures, "save", lambda figure, file: file.write_text(str(len(figure.axes))))
    return tmp_path


# -- data on a low-dimensional set -------------------------------------------------------------------------------------


def test_a_law_shrinks_to_its_plane_and_to_its_points():
    """s multiplies the variance across the plane, and along it as well where the data shrinks to points."""
    basis = low_dimensional.frame()
    torch.testing.assert_close(basis.T @ basis, torch.eye(8, dtype=F64))
    for kind, along in (("plane", 0.25), ("points", 0.25e-4)):
        law = low_dimensional.law_of(kind, 1e-4)
        variances = (basis.T @ law.covariances @ basis).diagonal(dim1=1, dim2=2)
        expected = torch.tensor([along] * 2 + [0.25e-4] * 6, dtype=F64).expand(6, 8)
        torch.testing.assert_close(variances, expected, rtol=1e-9, atol=1e-12)
        # six coordinates of 4,096 samples (or eight): a relative error of 1/√(2 · 6 · 4096) = .0045
        samples = law.sample(4096, torch.Generator().manual_seed(0))
        assert low_dimensional.thickness(kind, law, samples) == pytest.approx(0.005, rel=0.02)


def test_the_gradient_between_two_points_is_steepest_where_their_odds_and_rewards_say():
    """Of two points: V = log(p e^{r_1} + q e^{r_2}), ∇V = (p* − p) ∇log-odds, at most tanh(|r_1 − r_2|/4) β|Δ|/α²."""
    means = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=F64)
    law = mfm.GaussianMixture(means, 1e-12)
    reward = mfm.rewards.LinearGaussian(torch.tensor([0.2, 0.0], dtype=F64), 0.0, 0.3)
    apart = 0.5 * (0.6 / 0.3) ** 2
    for gap in (0.3, 0.1, 0.03):
        expected = math.tanh(apart / 4) * (1 - gap) * 5 / gap**2
        # the largest of 129 log-odds from −8 to 8, the maximum being flat to second order: .06² / 8
        assert low_dimensional.steepest(law, reward, gap) == pytest.approx(expected, rel=1e-3)


def test_the_plugged_in_gradient_is_exact_for_one_gaussian_and_a_linear_reward():
    """V is then linear in D: ∇V = Dᵀ' a/noise² (y far away), which no draw is needed for."""
    law = mfm.GaussianMixture(torch.tensor([[0.5, -1.0]], dtype=F64), [[0.5, 0.2], [0.2, 0.3]])
    reward = mfm.rewards.LinearGaussian(torch.tensor([1.0, 2.0], dtype=F64), 2e8, 1e4)  # e^{2 a·x} up to a factor
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    value, gradient = low_dimensional.exact_gradient(law, reward, 0.4, x)
    plugged = low_dimensional.plugged_in(law, reward, 0.4, x)
    torch.testing.assert_close(plugged, gradient, rtol=1e-5, atol=0)  # what is quadratic has a part of 1e-8
    ahead = law.denoise(PATH, 0.4, x) @ reward.A.T
    assert (value - value[0] - 2 * (ahead - ahead[0])[:, 0]).abs().max() < 1e-2  # of 2e12, by float64


def test_low_dimensional_goes_through_small(results, monkeypatch):
    small = {
        "RESULTS": results, "SHRUNK": (1.0, 1e-4), "GAPS": (0.5, 1e-3), "STATES": 4, "DRAWS": 4,
        "SAMPLES": 32, "SEEDS": 1, "KINDS": ("points",),
        "METHODS": {"mfm-gf": (mfm.MFMGF(2), mfm.ODE(steps=3)), "dps": (mfm.DPS(), mfm.ODE(steps=3))},
        "SCHEDULES": {"SDE, uniform": mfm.SDE(steps=3)},
    }  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(low_dimensional, name, value)
    low_dimensional.main()
    found = json.loads((results / "low-dimensional.json").read_text())
    assert list(found["problems"]) == ["points, s = 1", "points, s = 0.0001"]
    assert "positive definite" in found["s = 0"]["points"]
    for cell in found["problems"].values():
        assert all(at["finite"] for at in cell["estimates"].values())
        assert set(cell["methods"]) == {"mfm-gf", "dps"}
    assert (results / "low-dimensional.png").read_text() == "3"
    before = (results / "low-dimensional.json").stat().st_mtime_ns
    low_dimensional.main()  # what is there is not measured again
    assert (results / "low-dimensional.json").stat().st_mtime_ns == before
