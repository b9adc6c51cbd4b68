"""What the meters say of students whose every figure is known."""

import json
import math
from pathlib import Path

import pytest
import torch
from exact import LEVEL, MEAN, NOISE, STD, WANTED, Case, MixtureMap, Round, gaussian_map

import metaflowmaps as mfm
from conftest import F64, coefficients
from metaflowmaps.finetuning.meters import Meters, Watched, kept_records
from metaflowmaps.finetuning.tuning_config import MetersConfig
from metaflowmaps.finetuning.tuning_problem import TuningProblem
from metaflowmaps.random import stream


def divergence(mean, std, other_mean, other_std):
    """KL(N(mean, std² Id) ‖ N(other_mean, other_std² Id)), with spreads as numbers."""
    ratio = (std / other_std) ** 2
    return 0.5 * float(len(mean) * (ratio - 1 - math.log(ratio)) + (mean - other_mean).square().sum() / other_std**2)


@pytest.mark.parametrize("last", [0.3, 0.7, 0.9936])
def test_the_distance_to_the_base_is_the_divergence_of_the_processes(last, path):
    """Up to time T the tilted process is the base's, reweighted by e^{V_T(x_T)}: their divergence is that of the x_T.

    Both Gaussian. Eight seeds of 2,000 samples each give the mean and its standard error; the samples are exact.
    """
    exact = Round(path)
    problem = TuningProblem(gaussian_map(path, MEAN, STD), exact.reward, last=last)
    student = gaussian_map(path, exact.mean, exact.std).requires_grad_(False)
    found = []
    for seed in range(8):
        x_1 = exact.mean + exact.std * torch.randn(2000, 2, generator=stream(seed), dtype=F64)
        found.append(Meters(problem, MetersConfig(), seed, Path()).distance_to_base(student, x_1, {}))
    angle = math.tan(math.pi / 2 * last) / STD  # β/α at the last time
    t = angle / (1 + angle) if path.name == "linear" else 2 / math.pi * math.atan(angle)
    alpha, beta = (float(c) for c in coefficients(path, torch.tensor(t, dtype=F64))[:2])
    ends = [(beta * mean, math.hypot(alpha, beta * std)) for mean, std in ((exact.mean, exact.std), (MEAN, STD))]
    expected = divergence(*ends[0], *ends[1])
    found = torch.tensor(found, dtype=F64)
    error = float(found.std()) / math.sqrt(8)
    assert abs(float(found.mean()) - expected) < LEVEL * error
    assert error < 0.01 * expected  # it can tell a per cent or two


def test_the_bound_is_reached_at_the_tilted_law_alone(path):
    """E[r] − KL(q ‖ p_1) = log E[e^r] − KL(q ‖ p_1 e^r), for students that make Gaussians q: base, tilted, beyond.

    Allowed: 4.5 standard errors of the mean reward, Var r = Σ_i (κ⁴/2 + κ²δ_i²) for (x − y)/s ~ N(δ, κ² Id), and .03
    for the Euler steps. Diversity, which is slow, is looked at on few.
    """
    exact, n = Round(path), 4000
    problem = TuningProblem(gaussian_map(path, MEAN, STD), exact.reward)
    settings = MetersConfig(samples=n, steps=100)
    meters = Meters(problem, settings, 0, Path(), Watched(features=lambda x: x[:16]))
    evidence = float(mfm.GaussianMixture(MEAN[None], STD**2).log_evidence(exact.reward))
    figures = {}
    for name, mean, std in (("base", MEAN, STD), ("tilted", exact.mean, exact.std), ("beyond", 2 * exact.mean, 0.3)):
        figures[name] = meters.measure(gaussian_map(path, mean, std))
        expected = evidence - divergence(mean, std, exact.mean, exact.std)
        kappa, delta = std / NOISE, (mean - WANTED) / NOISE
        error = math.sqrt(float(kappa**4 + kappa**2 * delta.square().sum()) / n)
        assert abs(figures[name]["bound"] - expected) < LEVEL * error + 0.03
        assert figures[name]["lost"] == 0
    assert abs(figures["base"]["distance_to_base"]) < 1e-12  # the same drift, from the same whitening
    assert figures["tilted"]["bound"] > figures["base"]["bound"] + 0.3
    assert figures["tilted"]["bound"] > figures["beyond"]["bound"] + 0.3
    assert figures["tilted"]["distance_to_base"] > 0.2


def test_what_has_no_drift_has_no_distance():
    case = Case("gaussian-2d", mfm.LinearPath())
    meters = Meters(case.problem(), MetersConfig(samples=64, steps=2), 0, Path(), tuned={"drift": False, "map": True})
    figures = meters.measure(case.base())
    assert "reward" in figures
    assert not {"distance_to_base", "bound"} & figures.keys()


@pytest.mark.parametrize("one_step", [False, True])
def test_rewards_are_those_of_the_samples_that_are_tuned(one_step):
    """One-step samples of a map, or its ODE's: by the closed form for a Gaussian map, against both laws' means.

    An Euler step of the ODE from 0 lands at the mean, without spread: r there; the map has the spread as well.
    """
    case = Case("gaussian-2d", mfm.LinearPath())
    meters = Meters(
        case.problem(), MetersConfig(samples=4000, steps=1), 0, Path(), tuned={"drift": True, "map": one_step}
    )
    a, precision = case.reward.A[0].to(F64), case.reward.precision
    gap = float(case.reward.y) - float(a @ case.mean)
    spread = float(a @ case.law.covariances[0] @ a) if one_step else 0.0
    expected = -0.5 * precision * (gap**2 + spread)
    error = precision * (gap**2 + spread) / math.sqrt(4000)  # of a squared normal, at most
    assert meters.measure(case.base())["reward"] == pytest.approx(expected, abs=LEVEL * error if one_step else 1e-9)
    assert precision * spread / 2 > LEVEL * error or not one_step


class Half(torch.nn.Module):
    """A network that says NaN where z is below 0."""

    event_shape = (1,)

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, z, a, b, context, context_time):
        return torch.where(z < 0, torch.nan, 0 * z)


def test_lost_samples_are_counted_and_left_out():
    """Half of the noise is below 0: 4.5 standard deviations of a coin. With fewer than 8 left nothing else is said."""
    case = Case("gaussian-1d", mfm.LinearPath())
    student = mfm.MetaFlowMap(Half(), case.path, data_mean=torch.tensor([5.0]), data_std=1.0)
    figures = Meters(case.problem(), MetersConfig(samples=1000), 0, Path()).measure(student)
    assert abs(figures["lost"] - 500) < LEVEL * math.sqrt(250)
    assert math.isfinite(figures["reward"])
    blind = case.problem()
    blind.reward = lambda x, cond: torch.full((len(x),), math.nan).index_fill(0, torch.arange(0, len(x), 2), 1.0)
    assert Meters(blind, MetersConfig(samples=1000), 0, Path()).measure(blind.base)["lost"] == 500
    few = Meters(case.problem(), MetersConfig(samples=8), 0, Path()).measure(student)
    assert few.keys() == {"lost"}
    assert few["lost"] > 0


def test_records_are_written_and_not_billed(tmp_path):
    case = Case("gaussian-2d", mfm.LinearPath())
    problem = case.problem()
    others = {"first": lambda x: x[:, 0]}
    meters = Meters(problem, MetersConfig(samples=64, steps=2), 0, tmp_path, Watched(others))
    student = MixtureMap(case.path, case.tilted, case.mean, case.std)
    records = [meters(student, step) for step in (0, 500, 1000)]
    assert not any(problem.calls.values())
    assert [json.loads(line) for line in meters.file.read_text().splitlines()] == records
    assert [r["step"] for r in records] == [0, 500, 1000]
    assert {k: v for k, v in records[0].items() if k != "step"} == {k: v for k, v in records[1].items() if k != "step"}
    assert {"reward", "first", "distance", "vendi", "distance_to_base", "lost"} <= records[0].keys()
    with meters.file.open("a") as file:
        file.write('{"step": 12')  # cut short
    assert kept_records(tmp_path, 700) == records[:2]
    assert kept_records(tmp_path, 700) == records[:2]  # and the file says no more
    assert kept_records(tmp_path / "nothing", 700) == []
