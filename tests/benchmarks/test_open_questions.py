"""Benchmarks of the open questions: their helpers against closed forms, and each of them whole, all of it tiny."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import metaflowmaps as mfm
from benchmarks import common, error_propagation, frontier, low_dimensional, review
from conftest import F64
from metaflowmaps.finetuning.state_laws import StateMixture
from metaflowmaps.lab.figures import plots as figures
from metaflowmaps.networks import MLPConfig

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


# -- errors of the base model ------------------------------------------------------------------------------------------


LAW = mfm.GaussianMixture(
    torch.tensor([[-1.0, 0.5], [2.0, 1.0]], dtype=F64), [[[0.5, 0.2], [0.2, 0.3]], [[0.2, 0.0], [0.0, 0.6]]], [0.3, 0.7]
)


def test_the_field_has_unit_size_and_its_mean_under_a_mixture_is_that_of_its_draws():
    field = error_propagation.Field(LAW, 0)
    x_t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    posterior = LAW.posterior(PATH, 0.4, x_t)
    values = field(posterior.draw(40_000, torch.Generator().manual_seed(1)))
    # 40,000 draws of unit size: a mean to .005; the largest of six deviations
    assert (values.mean(0) - field.mean(posterior)).abs().max() < 4 * 0.005
    # its square, of 16,384 points, scatters by less than twice itself
    size = field(LAW.sample(2**14, torch.Generator().manual_seed(2))).square().mean()
    assert size == pytest.approx(1, abs=4 * 2 / 128)


@pytest.mark.parametrize("t", [0.0, 0.5, 0.99, 1.0])
def test_a_wrong_model_s_draws_and_drift_are_wrong_by_the_same_amount(t):
    """D̃ read off the drift is the mean of the moved draws: D + δ τ E f; at t = 1 the drift is finite, D̃ the state."""
    model = error_propagation.WrongModel(PATH, LAW, error_propagation.Field(LAW, 0), 0.2)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    drift = model.drift(t, x)
    assert bool(drift.isfinite().all())
    ahead = PATH.to_denoise(t, x, drift, "drift")
    spread = float(error_propagation.spread_of(PATH, float(LAW.variance.mean()), t))
    moved = 0.2 * spread * model.field.mean(LAW.posterior(PATH, t, x))
    torch.testing.assert_close(ahead, LAW.denoise(PATH, t, x) + moved, rtol=0, atol=1e-9)
    drawn, exact = (m.draw(t, x, 2000, torch.Generator().manual_seed(1)) for m in (model, _right(LAW)))
    # the same draws, moved: what differs from the mean is the scatter of f, of unit size
    assert ((drawn - exact).mean(0) - moved).abs().max() <= 0.2 * spread * 4 / 2000**0.5


def _right(law):
    return error_propagation.WrongModel(PATH, law, error_propagation.Field(law, 0), 0.0)


def test_a_model_wrong_by_nothing_is_exact_and_each_part_may_be_wrong_alone():
    field = error_propagation.Field(LAW, 0)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=F64)

    def made(*wrong):
        model = error_propagation.WrongModel(PATH, LAW, field, *wrong)
        return model.drift(0.4, x), model.draw(0.4, x, 5, torch.Generator().manual_seed(1))

    drift, draws = LAW.drift(PATH, 0.4, x), made(0.0)[1]
    assert torch.equal(made(0.0)[0], drift)
    assert torch.equal(made(0.1, True, False)[1], draws)
    assert torch.equal(made(0.1, False, True)[0], drift)
    assert not torch.equal(made(0.1)[0], drift)
    assert not torch.equal(made(0.1)[1], draws)


def test_slopes_are_those_of_powers():
    assert error_propagation.slope([(math.log(d), math.log(3 * d**1.7)) for d in (0.03, 0.1, 0.3)]) == pytest.approx(
        1.7
    )
    cells = {
        f"δ = {d:g}": {"delta": d, "methods": {"a": {"sw2": math.hypot(0.2, 5 * d)}}} for d in (0.0, 0.03, 0.1, 0.3)
    }
    found = error_propagation.slopes(cells)["a"]
    assert found == pytest.approx({"0.03": 0.15, "0.1": 0.5, "0.3": 1.5, "slope": 1.0})


def test_error_propagation_goes_through_small(results, monkeypatch):
    small = {
        "RESULTS": results, "RUNS": results, "DELTAS": (0.0, 0.1, 0.3), "SAMPLES": 32, "SEEDS": 1, "STATES": 4,
        "DRAWS": 16,
        "METHODS": {name: (error_propagation.METHODS[name][0], mfm.ODE(steps=3)) for name in ("none", "mfm-gf")},
    }  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(error_propagation, name, value)
    error_propagation.main()
    found = json.loads((results / "error-propagation.json").read_text())
    assert list(found["problems"]) == ["δ = 0", "δ = 0.1", "δ = 0.3"]
    assert found["problems"]["δ = 0"]["values"]["0.5"] == {"value": 0, "shift": 0}
    assert found["problems"]["δ = 0.3"]["values"]["0.5"]["shift"] > 0.01
    assert set(found["slopes"]) == {"none", "mfm-gf", *error_propagation.ALONE}
    assert (results / "error-propagation.png").read_text() == "3"


# -- what a review asks for --------------------------------------------------------------------------------------------


@pytest.fixture
def untrained(results, monkeypatch):
    """Any base will do for a rehearsal, and there are no tuned models."""
    model = mfm.MetaFlowMap(MLPConfig(width=8, depth=1).build((2,)), PATH, "gaussian", 0.0, 2.5)
    model.save_pretrained(results / "base")
    monkeypatch.setattr(review, "RESULTS", results)
    monkeypatch.setattr(review, "TUNED", results / "nothing")
    monkeypatch.setattr(review, "trained", lambda config, name: SimpleNamespace(checkpoint=results / "base"))
    return results


def test_effective_modes_count_equal_ones_and_nothing_twice():
    assert review.effective_modes(torch.tensor([0.25, 0.25, 0.5, 0.0])) == pytest.approx(2 * 2**0.5)  # e^{1.5 log 2}
    assert review.effective_modes(torch.full((7,), 3.0)) == pytest.approx(7)


def test_noise_over_signal_of_gradients_that_have_both():
    """g = μ + σ n in P dimensions: P σ²/‖μ‖²; with no mean at all nothing is left over, or a signal of pure chance."""
    g = torch.Generator().manual_seed(0)
    noise, mean = torch.randn(400, 50, generator=g, dtype=F64), torch.randn(50, generator=g, dtype=F64)
    found = review.noise_to_signal(mean + 2 * noise)
    # 20,000 squares scatter by 1 %, the square of the mean by 2 · 2/(√400 ‖μ‖) = 3 %
    assert found["ratio"] == pytest.approx(4 * 50 / float(mean.square().sum()), rel=4 * 0.03)
    assert review.noise_to_signal(mean + 0 * noise) == pytest.approx({"ratio": 0, "cosine": 1}, abs=1e-9)
    alone = review.noise_to_signal(noise - noise.mean(0))
    assert math.isnan(alone["ratio"])  # the mean is 0, and what would scatter into it is taken off


def test_diversity_stress_goes_through_small(untrained, monkeypatch):
    steered = {name: (review.STEERED[name][0], mfm.ODE(steps=2)) for name in ("mfm-gf", "mfm-anneal")}
    for name, value in {"STRENGTHS": (1, 30), "SAMPLES": 32, "SEEDS": 2, "STEERED": steered}.items():
        monkeypatch.setattr(review, name, value)
    review.diversity()
    found = json.loads((untrained / "diversity-stress.json").read_text())["problems"]
    assert list(found) == ["λ = 1", "λ = 30"]
    for cell in found.values():
        assert list(cell["methods"]) == ["exact samples", "mfm-gf", "mfm-anneal"]
        assert cell["methods"]["exact samples"]["mode_l1"] < 0.4  # 64 samples of weights .57, .37, .06
    assert (untrained / "diversity-stress.png").read_text() == "3"


def test_reward_generalisation_goes_through_small(results, monkeypatch):
    some = {"unsteered": review.GENERALISED["unsteered"], "best": (mfm.BestOfN(4, source="map"),)}
    some["unsteered"] = (some["unsteered"][0], mfm.ODE(steps=2))
    small = {"RESULTS": results, "TUNED": results, "REWARDS": ("margin:7",), "PICTURES": 4, "GENERALISED": some}
    for name, value in small.items():
        monkeypatch.setattr(review, name, value)
    review.generalisation()
    cells = json.loads((results / "reward-generalisation.json").read_text())["problems"]["margin:7"]["methods"]
    assert cells["real digits"]["named"] == 1
    assert cells["best"]["guide"] > cells["unsteered"]["guide"]
    assert (results / "reward-generalisation.png").read_text() == "1"


def test_tuning_variance_goes_through_small(untrained, monkeypatch):
    names = ("MFM-FT, gradient-free, 4 draws", "adjoint matching", "DRaFT")
    small = {"TUNING_STRENGTHS": (1,), "EVALUATIONS": 2**10, "BATCHES": 3, "WARM": 1, "STATES": StateMixture(pool=256)}
    small["OBJECTIVES"] = {name: review.OBJECTIVES[name] for name in names}
    for name, value in small.items():
        monkeypatch.setattr(review, name, value)
    review.variance()
    cells = json.loads((untrained / "tuning-variance.json").read_text())["problems"]["λ = 1"]["methods"]
    assert list(cells) == list(names)
    for cell in cells.values():
        assert cell["evaluations"] == pytest.approx(2**10, rel=0.3)  # whole 32 rows
