"""Integrators: their order, their cost, their grids."""

import math

import pytest
import torch

import metaflowmaps as mfm
from conftest import CASES, F64, coefficients, normal
from metaflowmaps.sampling import INTEGRATORS, integrate, time_grid, uniform_grid

CASE = CASES["per-component-full"]


@pytest.fixture(scope="module")
def references():
    """rk4 with 400 steps: its error is a hundredth of the finest measured below (order 4, 128 against 400 steps)."""
    x = normal(32, 2)
    paths = mfm.LinearPath(), mfm.TrigonometricPath()
    return {p: integrate(lambda t, x, p=p: CASE.law.drift(p, t, x), x, uniform_grid(400), "rk4") for p in paths}


@pytest.mark.parametrize("method", INTEGRATORS)
def test_order(method, path, references):
    """Error ∝ h^order on the mixture's drift: the slope in log-log within a quarter of the declared order."""
    x, order = normal(32, 2), INTEGRATORS[method].order
    # fine enough to be asymptotic, coarse enough to stay above 1e-13
    steps = {1: [128, 256, 512], 2: [64, 128, 256], 4: [32, 64, 128]}[order]

    def error(n):
        end = integrate(lambda t, x: CASE.law.drift(path, t, x), x, uniform_grid(n), method)
        return float((end - references[path]).square().mean().sqrt())

    errors = [error(n) for n in steps]
    slope = math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])
    assert errors[-1] > 1e-12
    assert abs(slope - order) < 0.25, f"{method}: order {slope:.2f}, declared {order}"


@pytest.mark.parametrize("method", INTEGRATORS)
def test_calls_and_times(method):
    times = []

    def f(t, x):
        times.append(float(t))
        return x

    integrate(f, normal(2, 2), uniform_grid(5, 0.2, 0.7), method)
    assert len(times) == 5 * INTEGRATORS[method].calls
    assert min(times) == 0.2
    assert max(times) <= 0.7


@pytest.mark.parametrize(("method", "gain"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_polynomials_in_time_are_exact_to_the_order(method, gain):
    """dx/dt = p t^{p−1}: quadrature of degree order − 1 is exact on any grid (Euler: p = 1, rk4: p = 4)."""
    grid = torch.tensor([0.0, 0.3, 0.45, 1.0], dtype=F64)
    x = torch.zeros(1, 1, dtype=F64)
    end = integrate(lambda t, x: torch.full_like(x, gain * float(t) ** (gain - 1)), x, grid, method)
    torch.testing.assert_close(end, torch.ones_like(x), rtol=0, atol=1e-15)


def test_state_keeps_its_dtype():
    end = integrate(lambda t, x: -x, normal(2, 2).float(), uniform_grid(4), "rk4")
    assert end.dtype == torch.float32


def test_uniform_grid():
    grid = uniform_grid(7)
    assert grid.dtype == F64
    assert (grid[0], grid[-1], len(grid)) == (0, 1, 8)
    torch.testing.assert_close(grid.diff(), torch.full((7,), 1 / 7, dtype=F64), rtol=0, atol=1e-15)
    with pytest.raises(mfm.InputError, match="steps must be at least 1"):
        uniform_grid(0)


def test_power_grid():
    """(0.01 + 0.99 i/K)^2.5, as MFM-Search has it; to a few roundings of float64, the end exactly."""
    grid = time_grid(mfm.LinearPath(), "power", 4)
    expected = torch.tensor([(0.01 + 0.99 * i / 4) ** 2.5 for i in range(5)], dtype=F64)
    torch.testing.assert_close(grid, expected, rtol=1e-14, atol=0)
    assert grid[-1] == 1


def test_log_snr_grid(path):
    """0, then equal steps of log β/α from t = .01 to .99, then 1; to 1e-12, of α = 1 − t near its end."""
    grid = time_grid(path, "log-snr", 6)
    assert (len(grid), grid[0], grid[-1]) == (7, 0, 1)
    alpha, beta, *_ = coefficients(path, grid[1:-1])
    steps = (beta / alpha).log().diff()
    torch.testing.assert_close(steps, steps.mean().expand(4), rtol=1e-12, atol=0)
    torch.testing.assert_close(grid[[1, -2]], torch.tensor([0.01, 0.99], dtype=F64), rtol=1e-12, atol=0)
    for few in (1, 2):  # no room for both ends
        assert torch.equal(time_grid(path, "log-snr", few), uniform_grid(few))


@pytest.mark.parametrize(
    "grid", [[0.0], [], [0.0, 0.5, 0.5, 1.0], [1.0, 0.0], [[0.0, 1.0]], [0.0, math.nan, 1.0]], ids=str
)
def test_bad_grids_are_refused(grid):
    with pytest.raises(mfm.InputError, match="strictly increasing"):
        integrate(lambda t, x: x, normal(2, 2), torch.tensor(grid, dtype=F64))


def test_unknown_integrator_is_refused():
    with pytest.raises(mfm.InputError, match="did you mean 'rk4'"):
        integrate(lambda t, x: x, normal(2, 2), uniform_grid(2), "rk5")
