"""Each guide's shift D* − D at fixed states, against the exact one and against value_gradient."""

import functools
import math

import pytest
import torch
from closed_forms import gaussian_map, gaussian_moment, random_map

import metaflowmaps as mfm
from calls import value_gradient
from conftest import F64, PATHS, coefficients, normal
from metaflowmaps.cost import Meter
from metaflowmaps.draws import Draws, equal_log_weights
from metaflowmaps.random import RowNoise, fresh_seeds, stream
from metaflowmaps.steering import DPS, MFMG, MFMGF, Glass
from metaflowmaps.steering.mfm_g import _leave_one_out, blended
from metaflowmaps.steering.problem import SteeringProblem
from metaflowmaps.value import free_shift

MEAN, VAR = torch.tensor([0.4, -0.3], dtype=F64), 0.5
A, Y = torch.tensor([[1.0, -0.6]], dtype=F64), torch.tensor([1.0], dtype=F64)
# four contexts of one trajectory
TIMES = [0.3, 0.36, 0.42, 0.48]
STATES = torch.tensor([[0.3, -0.1], [0.35, -0.15], [0.4, -0.2], [0.5, -0.2]], dtype=F64)
ROWS = 600


def posterior_at(path, t, x):
    """Mean and covariance of x_1 given x_t = x (d,), for N(MEAN, VAR Id)."""
    alpha, beta, *_ = coefficients(path, torch.tensor(t, dtype=F64))
    v = alpha**2 + beta**2 * VAR
    return MEAN + beta * VAR / v * (x - beta * MEAN), VAR * alpha**2 / v * torch.eye(2, dtype=F64)


@torch.no_grad()
def guided(path, guide, noise_std, rows=ROWS, seed=0):
    """The shift at the last of the contexts, after the guide has seen them all: (rows, 2), and its info."""
    reward = mfm.rewards.LinearGaussian(A, Y, noise_std)
    problem = SteeringProblem(gaussian_map(path, MEAN, math.sqrt(VAR)), reward, Meter())
    problem.begin(fresh_seeds(rows, stream(seed)), None)
    memory = guide.remember(problem)
    for t, x in zip(TIMES, STATES, strict=True):
        drift, shift, info, _ = guide.guide(problem, memory, t, x.expand(rows, 2).clone())
    # drift: b_t(x) itself, whatever the guide
    alpha, beta, alpha_dot, beta_dot = coefficients(path, torch.tensor(TIMES[-1], dtype=F64))
    mean, _ = posterior_at(path, TIMES[-1], STATES[-1])
    expected = alpha_dot / alpha * (STATES[-1] - beta * mean) + beta_dot * mean
    torch.testing.assert_close(drift, expected.expand(rows, 2), rtol=0, atol=1e-12)
    return shift, info


def exact_shift(path, noise_std):
    mean, cov = posterior_at(path, TIMES[-1], STATES[-1])
    return gaussian_moment(mean, cov, A, Y, noise_std)[1] - mean


GUIDES = {
    "gf": lambda n: MFMGF(n, recycle=1),
    "gf, recycled": MFMGF,
    "gf, filled": lambda n: MFMGF(n, recycle=6, fill=True),
    "gf, centred on D": lambda n: MFMGF(n, centre="denoise"),
    "g, plain": lambda n: MFMG(n, blend=False),
    "g, blended, not recycled": lambda n: MFMG(n, recycle=1),
    "g": MFMG,
    "g, two passes": lambda n: MFMG(n, passes=2),
    "glass": lambda n: Glass(n, glass_steps=4, glass_integrator="rk4"),
}


@functools.cache
def errors(name, n, path_name, noise_std):
    path = PATHS[path_name]
    shift, _ = guided(path, GUIDES[name](n), noise_std)
    return shift - exact_shift(path, noise_std)


@pytest.mark.parametrize("name", GUIDES)
def test_shifts_converge_to_the_exact_one(name):
    """Draws are exact here (the map is, for this law): error ∝ N^-1/2, and a bias that vanishes faster."""
    sizes, path_name = [8, 64], list(PATHS)[list(GUIDES).index(name) % 2]  # the paths take turns
    made = [errors(name, n, path_name, 1.0) for n in sizes]
    rms = [float(e.square().mean().sqrt()) for e in made]
    slope = math.log(rms[0] / rms[-1]) / math.log(sizes[0] / sizes[-1])
    # an rms of 1,200 numbers is known to 2 %: ±.014 in a slope over a factor of 8; the rest is the next order at N = 8
    assert abs(slope + 0.5) < 0.07, (slope, rms)
    # 4.5 standard errors, and a ratio's bias: rms² over the spread of one draw, VAR^1/2 and less (times 2)
    bound = 4.5 * made[-1].std(0) / math.sqrt(ROWS) + 2 * made[-1].square().mean(0) / 0.4
    assert bool((made[-1].mean(0).abs() < bound).all()), (made[-1].mean(0), bound)


def rms(name, n, noise_std):
    return float(errors(name, n, "linear", noise_std).square().mean().sqrt())


def test_recycling_pays():
    """Three more contexts' draws for nothing. (Each ratio is known to 3 %.)"""
    assert rms("gf, recycled", 16, 1.0) < 0.55 * rms("gf", 16, 1.0)
    assert rms("g", 16, 1.0) < 0.88 * rms("g, blended, not recycled", 16, 1.0)
    assert rms("gf, filled", 8, 1.0) < 0.95 * rms("gf, recycled", 8, 1.0)


def test_the_blend_tames_the_gradient_where_the_reward_is_sharp():
    """σ = .3 in a posterior of .5: with one draw the plain form overstates by 1 + τ²|a|²/σ² = 3.6 on average."""
    assert rms("g, blended, not recycled", 1, 0.3) < 0.35 * rms("g, plain", 1, 0.3)
    assert rms("g", 4, 0.3) < 0.3 * rms("g, plain", 4, 0.3)
    # and is no worse than the gradient-free form alone, by more than 10 %
    for n in (1, 4, 16):
        assert rms("g", n, 0.3) < 1.1 * rms("gf, recycled", n, 0.3)
    _, info = guided(PATHS["linear"], MFMG(4), 0.3, rows=200)
    assert float(info["gradient_share"].min()) >= 0
    assert float(info["gradient_share"].max()) <= 1
    assert 0.01 < float(info["gradient_share"].mean()) < 0.9


@pytest.mark.parametrize(("slopes", "near"), [((3.0, 1.0), 0.1), ((3.0, 1.0), 10.0), ((0.2, 0.1), 1.0)])
def test_the_blend_by_hand(slopes, near):
    """Two draws D ± s of one reward: F = 0, v_F = s²/2, G = ḡ, v_G = δ²/2 with g = ḡ ± δ; no move beyond √v_F."""
    g = torch.tensor(slopes, dtype=F64)
    middle, apart = g.mean(), (g[0] - g[1]) / 2
    x_1 = torch.tensor([0.7 + near, 0.7 - near], dtype=F64).reshape(2, 1, 1)
    made = Draws(x_1, torch.full((2, 1), 5.0, dtype=F64), g.reshape(2, 1, 1))
    shift, share = blended(made, made, equal_log_weights(made.rewards), torch.full((1, 1), 0.7, dtype=F64))
    expected = near**2 / (near**2 + apart**2)
    moved = torch.minimum(expected * middle, torch.tensor(near / math.sqrt(2), dtype=F64))
    torch.testing.assert_close(share, expected.expand(1), rtol=1e-12, atol=0)  # roundings of float64
    torch.testing.assert_close(shift, moved.expand(1, 1), rtol=1e-12, atol=0)


def test_the_preset_of_pictures_is_the_papers(path):
    """The gradient of one draw by itself: nothing recycled, nothing blended."""
    preset, paper = (guided(path, guide, 0.5, rows=50)[0] for guide in (mfm.IMAGES.method, MFMG(1, **MFMG.published)))
    torch.testing.assert_close(preset, paper, rtol=0, atol=0)
    assert mfm.IMAGES.process == mfm.ODE(steps=50, renormalize="rescale")


def test_the_jackknife_by_two_passes_is_that_by_one(path):
    """Where one draw has all the weight, the estimate without it is that of the next: no gradient is negligible."""
    one, two = (
        guided(path, MFMG(4, blend=False, correction="jackknife", passes=passes), 0.05, rows=50)[0] for passes in (1, 2)
    )
    torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e200])
def test_gradients_that_say_nothing_leave_the_gradient_free_form(value):
    """Not a number, infinite, or of a square that is infinite: no move from F."""
    made = Draws(normal(2, 3, 2), normal(2, 3, seed="rewards"), torch.full((2, 3, 2), value, dtype=F64))
    base = equal_log_weights(made.rewards)
    shift, share = blended(made, made, base, torch.zeros(3, 2, dtype=F64))
    assert torch.equal(shift, free_shift(made, base))
    assert not share.any()


@pytest.mark.parametrize("rest", [0.3, 1e-2, 1e-6, 0.0])
def test_a_draw_that_is_everything_counts_as_a_thousand_to_one(rest):
    """Weights 1 − w and w at 0 and 1: without the first the mean moves by −1, or, below w = 1e-3, by −1000 w."""
    weights, y = torch.tensor([[1 - rest], [rest]], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64).reshape(2, 1, 1)
    moves = _leave_one_out(weights, y)[:, 0, 0]
    expected = [-(1 - rest) * min(1.0, 1000 * rest), rest]
    # 1 − w is known to an ulp of 1, which is 1e-10 of w = 1e-6
    torch.testing.assert_close(moves, torch.tensor(expected, dtype=F64), rtol=1e-9, atol=0)


# -- by definition ---------------------------------------------------------------------------------------------------


SLOPE = torch.tensor([0.5, -0.2], dtype=F64)


def mild(x):
    return x @ SLOPE.to(x) - 0.1 * x.square().sum(1)


@pytest.mark.parametrize(("correction", "noise"), [("none", "antithetic"), ("jackknife", "independent")])
@pytest.mark.parametrize("kind", ["gf", "g", "glass", "glass, g"])
def test_without_a_past_it_is_value_gradient(kind, noise, correction, path):
    """D* − D = (α²/β) ∇V̂ from the very draws."""
    model, t, x = random_map(path, F64), 0.37, normal(5, 2)
    options = {"correction": correction, "noise": noise}
    guide = {
        "gf": lambda: MFMGF(4, recycle=1, **options),
        "g": lambda: MFMG(4, blend=False, **options),
        "glass": lambda: Glass(4, glass_steps=3, estimator=MFMGF(recycle=1, **options)),
        "glass, g": lambda: Glass(4, glass_steps=3, estimator=MFMG(blend=False, **options)),
    }[kind]()
    problem = SteeringProblem(model, mild, Meter())
    seeds = fresh_seeds(len(x), stream(7))
    problem.begin(seeds, None)
    with torch.no_grad():
        _, shift, info, _ = guide.guide(problem, guide.remember(problem), t, x)
    posterior = mfm.GlassPosterior(path, model.drift, 3) if "glass" in kind else mfm.MapPosterior(model)
    method = "gradient" if kind.endswith("g") else "gradient-free"
    got = value_gradient(posterior, mild, t, x, 4, method, RowNoise(seeds, "draws"), **options)
    alpha, beta, *_ = coefficients(path, torch.tensor(t, dtype=F64))
    torch.testing.assert_close(shift, alpha**2 / beta * got.gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(info["ess"], got.ess)
    if noise == "independent":
        torch.testing.assert_close(info["value_std_err"], got.std_err)
    else:  # draws of a pool are not told apart by pairs: nothing is claimed
        assert info["value_std_err"].isnan().all()
    torch.testing.assert_close(info["gradient_norm"], got.gradient.norm(dim=1), rtol=1e-9, atol=1e-9)
    if correction == "none":
        torch.testing.assert_close(info["value"], got.value)


@pytest.mark.parametrize("t", [0.0, 0.004, 0.3, 0.9])
def test_dps_is_the_rewards_gradient_at_the_posterior_mean(t, path):
    """(α²/β) (∂D/∂x) ∇r(D), with ∂D/∂x = β VAR/v for this law; looked at no earlier than .01."""
    x, seen = normal(5, 2), max(t, 0.01)
    problem = SteeringProblem(gaussian_map(path, MEAN, math.sqrt(VAR)), mild, Meter())
    problem.begin(torch.arange(5), None)
    with torch.no_grad():
        drift, shift, info, _ = DPS().guide(problem, None, t, x)
    alpha, beta, *_ = coefficients(path, torch.tensor(seen, dtype=F64))
    v = alpha**2 + beta**2 * VAR
    point = MEAN + beta * VAR / v * (x - beta * MEAN)
    gradient = beta * VAR / v * (SLOPE - 0.2 * point)
    torch.testing.assert_close(shift, alpha**2 / beta * gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(info["value"], mild(point), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(info["gradient_norm"], gradient.norm(dim=1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(drift, problem.drift(t, x))
