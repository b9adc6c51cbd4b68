"""The navigation task: its exact answers against closed forms, its judges on predictors whose errors are known."""

import math

import pytest
import torch
from benchmarks.control_estimators import (
    LAW,
    Exact,
    Navigation,
    PlaneJudge,
    _of_ratio,
    decomposed,
    drift_flow,
    implied_flow,
    make_probes,
    target_errors,
)

import metaflowmaps as mfm
from conftest import CASES, F64, PATHS, normal, uniform
from metaflowmaps.errors import InputError
from metaflowmaps.finetuning import MFMFT, NoBaseline, TuningSetup
from metaflowmaps.finetuning.tuning_problem import TuningProblem
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.path import LinearPath
from metaflowmaps.random import randn, stream
from metaflowmaps.rewards.analytic import LinearGaussian

Z = 4.5  # two-sided level 7e-6: a hundred comparisons together fail by luck for fewer than 1 seed in 1,000


def linear_gaussian(strength=1.3):
    return LinearGaussian(normal(1, 2, seed="A"), normal(1, seed="y"), 0.8, strength)


def states(law, n, seed="states"):
    """(t, x) with t from 0 to .99, where the posterior is a hundred times narrower than the law."""
    t = torch.cat([torch.zeros(1, dtype=F64), uniform(n - 2, seed=seed), torch.full((1,), 0.99, dtype=F64)])
    x_1 = law.sample(n, stream(0, seed)).double()
    return t, (1 - t[:, None]) * normal(n, 2, seed=seed) + t[:, None] * x_1


def task(nodes=64):
    return Exact(LAW.law(), LinearPath(), Navigation(), nodes)


# -- quadrature --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", CASES)
def test_quadrature_agrees_with_closed_forms(name, path):
    """Value and drift under a linear-Gaussian reward, whose tilt is a mixture: two derivations that share no step."""
    law, reward = CASES[name].law, linear_gaussian()
    exact, (t, x) = Exact(law, path, reward), states(CASES[name].law, 12)
    # the integrands are Gaussians wider than three spacings of 1/6 of a component's width: errors below 1e-12; the
    # conversion of D into b at t = .99 multiplies what rounding leaves of it by 100
    torch.testing.assert_close(exact.value(t, x), law.value(path, t, x, reward), rtol=0, atol=1e-10)
    torch.testing.assert_close(exact.denoise(t, x), law.tilt(reward).denoise(path, t, x), rtol=0, atol=1e-10)
    torch.testing.assert_close(exact.drift(t, x), law.tilt(reward).drift(path, t, x), rtol=0, atol=1e-8)
    assert exact.log_evidence() == pytest.approx(float(law.log_evidence(reward)), abs=1e-10)


def test_mean_reward_and_share_are_derivatives_and_ratios_of_the_evidence():
    """d/dλ log E[e^{λr}] is the tilted mean of r; E[e^r]²/E[e^{2r}] needs the evidence at λ and at 2λ."""
    law, h = CASES["per-component-full"].law, 1e-4

    def log_evidence(strength):
        return float(law.log_evidence(linear_gaussian(strength)))

    exact = Exact(law, LinearPath(), linear_gaussian())
    # a central difference is off by h² times a third derivative of order 1: 1e-8, and by rounding over h: 1e-11
    slope = 1.3 * (log_evidence(1.3 + h) - log_evidence(1.3 - h)) / (2 * h)
    assert exact.mean_reward() == pytest.approx(slope, abs=1e-6)
    assert exact.ess_share() == pytest.approx(math.exp(2 * log_evidence(1.3) - log_evidence(2.6)), rel=1e-9)


def test_the_navigation_task_is_resolved():
    """Halving the spacing changes nothing: the error of the coarser grid is the difference, and it falls fast."""
    t, x = states(LAW.law(), 24)
    fine = task(96).drift(t, x)
    coarse, middle = ((task(n).drift(t, x) - fine).norm(dim=1).max() for n in (32, 48))
    assert middle < 0.2 * coarse  # any fixed order p would give (32/48)^p: this is faster than order 4
    assert (task(64).drift(t, x) - fine).norm(dim=1).max() < 1e-3  # of drifts of size 1 to 10


def test_the_optimal_drift_is_the_gradient_of_the_value():
    """b* = b + (σ²/2) ∇V, with ∇V by central differences of V and, again, by autograd."""
    exact = task(96)
    t, x = states(exact.law, 10)
    t = t.clamp_min(0.05)  # σ² is infinite at 0
    h = 1e-4
    steps = h * torch.eye(2, dtype=F64)
    difference = torch.stack([(exact.value(t, x + e) - exact.value(t, x - e)) / (2 * h) for e in steps], 1)
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(exact.value(t, leaf).sum(), leaf)
    tilt = exact.drift(t, x) - exact.law.drift(exact.path, t, x)
    half = exact.path.sigma_squared(t)[:, None] / 2
    # both come from one sum, over different functions: they meet as far as the grid resolves them, 2e-8 at 96 nodes,
    # times the 100 of late conversions; a central difference adds h² times a third derivative, below 1e4 late
    torch.testing.assert_close(half * gradient, tilt, rtol=0, atol=1e-5)
    torch.testing.assert_close(difference, gradient, rtol=0, atol=1e-4)
    assert tilt.norm(dim=1).mean() > 1


def test_quadrature_agrees_with_monte_carlo():
    """Posterior draws of the mixture, weighted by e^r: E[e^r] and the ratio, in standard errors."""
    exact, n = task(), 40_000
    t, x = states(exact.law, 8)
    draws = exact.law.posterior(exact.path, t, x).draw(n, stream(0, "monte carlo"))
    weight = exact.reward(draws.flatten(0, 1)).reshape(n, 8).exp()
    mean, error = weight.mean(0), weight.std(0) / math.sqrt(n)
    assert (((mean - exact.value(t, x).exp()) / error).abs() < Z).all()
    ratio = (weight[..., None] * draws).mean(0) / mean[:, None]
    spread = (weight[..., None] * (draws - ratio)).std(0) / math.sqrt(n) / mean[:, None]
    assert (((ratio - exact.denoise(t, x)) / spread).abs() < Z).all()


def test_without_a_reward_the_law_is_left_alone():
    law = LAW.law()
    exact, (t, x) = Exact(law, LinearPath(), Navigation(0.0), 32), states(law, 6)
    # normalised weights of a polynomial of degree 1: rounding alone, times 100 at t = .99
    torch.testing.assert_close(exact.drift(t, x), law.drift(exact.path, t, x), rtol=0, atol=1e-9)
    assert exact.ess_share() == pytest.approx(1.0)


def test_the_navigation_reward_is_at_most_zero_and_linear_in_its_strength():
    x = 4 * normal(2000, 2)
    r = Navigation(10.0)(x)
    assert (r <= 0).all()
    torch.testing.assert_close(Navigation(5.0)(x), r / 2)
    far = torch.tensor([[50.0, -50.0]])
    assert float(Navigation(10.0)(far)) == -10.0  # flat: nothing pulls from far away


def test_only_laws_of_the_plane_are_taken():
    with pytest.raises(InputError, match="plane"):
        Exact(GaussianMixture([[0.0, 0.0, 0.0]], 1.0), LinearPath(), Navigation())


# -- samples -----------------------------------------------------------------------------------------------------------


def test_samples_are_of_the_tilted_law():
    """Mean position and mean reward against the quadrature, at 20,000 samples; a strength of 9 for 10 shows."""
    exact, n = task(), 20_000
    x = exact.sample(n, stream(0, "samples"))
    origin = torch.zeros(1, 2, dtype=F64)
    z = (x.mean(0) - exact.denoise(0.0, origin)[0]) / x.std(0) * math.sqrt(n)
    assert (z.abs() < Z).all()
    r = exact.reward(x)
    assert abs(float(r.mean()) - exact.mean_reward()) < Z * float(r.std()) / math.sqrt(n)
    weaker = Exact(exact.law, exact.path, Navigation(9.0), 64)
    r = exact.reward(weaker.sample(n, stream(0, "samples")))
    assert abs(float(r.mean()) - exact.mean_reward()) > Z * float(r.std()) / math.sqrt(n)


def test_a_reward_too_rough_for_its_grid_is_refused():
    """A stripe between two grid lines: rejection below it would be wrong in silence."""

    def stripe(x):
        return ((x[:, 0] - 0.3005).abs() < 4e-4).to(x.dtype)

    with pytest.raises(InputError, match="smooth"):
        Exact(LAW.law(), LinearPath(), stripe).sample(10, stream(0))


def test_exact_samples_are_at_the_floor_and_others_are_not():
    exact = task(48)
    judge = PlaneJudge(exact, 512)
    one = judge([exact.sample(512, stream(1, "set", i)) for i in range(4)])
    # measured over 64 seeds of 4 sets: .99 with a standard deviation of .07; the base's samples are 13 floors away
    assert abs(one["ratio"] - 1) < Z * 0.07
    assert one["lost"] == 0
    base = judge([exact.law.sample(512, stream(1, "base", i)) for i in range(4)])
    assert base["ratio"] > 5
    assert base["reward"] < one["reward"] - 2


def test_samples_that_are_lost_are_counted_and_do_not_flatter():
    exact = task(48)
    judge = PlaneJudge(exact, 512)
    x = exact.sample(512, stream(1, "set"))
    broken = x.clone()
    broken[:200] = math.nan
    whole, lost = judge([x]), judge([broken])
    assert lost["lost"] == 200
    assert lost["ratio"] > whole["ratio"] + 1


# -- probes ------------------------------------------------------------------------------------------------------------

MEAN, STD = (0.5, -1.0), 1.5
GAUSSIAN = GaussianMixture(torch.tensor([MEAN], dtype=F64), STD**2)


def exact_map(std=STD):
    """An untrained gaussian map is exact on N(MEAN, STD²)."""
    return MetaFlowMap(MLPConfig(width=8, depth=1).network((2,)), LinearPath(), "gaussian", torch.tensor(MEAN), std)


def linear_exact():
    return Exact(GAUSSIAN, LinearPath(), linear_gaussian())


def test_probes_are_of_the_tilted_marginals_and_even_in_the_angle():
    exact = linear_exact()
    probes = make_probes(exact, exact_map(), 4000, 0.9)
    tilted = exact.law.tilt(linear_gaussian())
    mean, cov = tilted.means[0], tilted.covariances[0]
    t = probes.t[:, None]
    # whitened by the exact marginal: standard normals
    scale = torch.linalg.cholesky((1 - t[..., None]) ** 2 * torch.eye(2, dtype=F64) + t[..., None] ** 2 * cov)
    white = torch.linalg.solve_triangular(scale, (probes.x - t * mean)[..., None], upper=False)[..., 0]
    assert (white.mean(0).abs() * math.sqrt(4000) < Z).all()
    assert ((white.square().mean(0) - 1).abs() * math.sqrt(4000 / 2) < Z).all()
    angle = torch.atan2(STD * probes.t, 1 - probes.t) * 2 / math.pi  # a of the chart at context 0, written out
    torch.testing.assert_close(probes.a, angle, rtol=0, atol=1e-12)
    torch.testing.assert_close(probes.a.diff(), torch.full((3999,), 0.9 / 4000, dtype=F64), rtol=0, atol=1e-9)


def test_probes_hold_the_drifts_in_the_coordinates_of_the_map():
    """An exact map meets the base's F; F goes to drifts and to D by the path's own conversions."""
    exact, model = linear_exact(), exact_map()
    probes = make_probes(exact, model, 200, 0.99)
    # float32, where z comes of differences of order 1
    torch.testing.assert_close(drift_flow(model, probes), probes.base, rtol=0, atol=1e-4)
    wrong = probes.tilted + normal(200, 2, seed="F")
    drift = probes.chart.velocity_out(probes.t, probes.t, probes.x, wrong)
    ahead = LinearPath().to_denoise(probes.t, probes.x, drift, "drift")
    moved = ahead - exact.denoise(probes.t, probes.x)
    torch.testing.assert_close(moved, probes.gain * (wrong - probes.tilted), rtol=1e-9, atol=1e-9)


def test_a_model_s_flow_at_the_probes_is_its_drift():
    """Read off the network directly, against the public drift of a map whose weights are not zero."""
    exact, model = linear_exact(), exact_map()
    with torch.no_grad():
        model.network.output.weight.normal_(generator=stream(0, "weights"))
    probes = make_probes(exact, model, 200, 0.95)
    flow = drift_flow(model, probes)
    assert flow.square().mean() > 0.1
    drift = model.drift(probes.t.float(), probes.x.float()).detach()
    torch.testing.assert_close(flow, probes.carried(drift), rtol=1e-4, atol=1e-3)  # float32, through 1/(1 − t)


def test_draws_imply_the_drift_they_are_the_posterior_of():
    """Mean of one-step draws -> D -> drift: an exact map implies its own drift, one with another spread does not."""
    exact = linear_exact()
    probes = make_probes(exact, exact_map(), 200, 0.9)
    implied = implied_flow(exact_map(), probes)
    # quasi-random means of 128 normals scatter by about .01; independent ones would by .09, 16 times the square
    error = (implied - probes.base).square().sum(1).mean()
    assert error < 2 * (math.pi / 2 * 0.02) ** 2
    other = implied_flow(exact_map(2.0), probes)
    assert (other - probes.base).square().sum(1).mean() > 10 * error


# -- bias and variance -------------------------------------------------------------------------------------------------


def test_bias_and_variance_of_predictors_that_have_both():
    """b̂ = b* + bias(state) + σ(state) n, with few runs: both parts are right on average over 2,000 repetitions."""
    runs, n, repeats = 3, 12, 2000
    exact, bias = normal(n, 2, seed="exact"), 0.4 * normal(n, 2, seed="bias")
    sigma, gain = 0.2 + uniform(n, 1, seed="sigma"), 0.5 + uniform(n, 1, seed="gain")
    g = stream(0, "repeats")
    parts = torch.tensor(
        [decomposed(exact + bias + sigma * randn((runs, n, 2), g, F64), exact, gain) for _ in range(repeats)]
    )
    known_bias = float((gain * bias).square().sum(1).mean())
    known_variance = float(2 * (gain * sigma).square().mean())
    z = (parts.mean(0) - torch.tensor([known_bias, known_variance, known_bias + known_variance])) / parts.std(0)
    assert (z.abs() * math.sqrt(repeats) < Z).all()
    # the bound sees the correction: without −variance/S the mean would be further off than it allows
    assert known_variance / runs > 3 * Z * float(parts[:, 0].std()) / math.sqrt(repeats)


def test_bias_and_variance_add_to_the_mean_squared_error():
    exact, estimates = normal(50, 2, seed="exact"), normal(4, 50, 2, seed="estimates")
    parts = decomposed(estimates, exact)
    assert parts.total == pytest.approx(float((estimates - exact).square().sum(-1).mean()), rel=1e-12)
    same = decomposed(estimates[:1].expand(3, -1, -1), exact)
    assert same.variance == pytest.approx(0, abs=1e-12)
    with pytest.raises(InputError, match="two"):
        decomposed(estimates[:1], exact)


@pytest.mark.parametrize("weighted", [False, True])
def test_bias_and_variance_of_weighted_targets_that_have_both(weighted):
    """z ~ N(0, 1), w = e^{sz}, v = μ + cz: E[wv]/E[w] = μ + cs and E[w²(v − μ − cs)²]/E[w]² = c²(1 + s²) e^{s²}."""
    groups, n, s, c = 400, 4000, 0.5, 0.7
    z = normal(groups, n, 1, seed="z")
    mu = normal(n, 1, seed="mu")
    s = s if weighted else 0.0
    variance = c**2 * (1 + s**2) * math.exp(s**2)
    right = _of_ratio(mu + c * z, torch.exp(s * z), mu + c * s)
    # w²(v − μ − cs)² scatters by 6 times its mean: 1,600,000 of them by .005 of it; terms of 1/G come to .01
    assert right.variance == pytest.approx(variance, rel=Z * 0.005 + 0.01)
    # unbiased: what the ratio scatters by is taken off (ratios have terms of 1/G² besides, 1/400 of that)
    assert abs(right.bias_squared) < Z * right.error + 10 * variance / groups**2
    assert Z * right.error + 10 * variance / groups**2 < 0.3 * variance / groups  # or nobody would see it missing
    wrong = _of_ratio(mu + c * z, torch.exp(s * z), mu + c * s - 0.3)
    assert abs(wrong.bias_squared - 0.09) < Z * wrong.error + 10 * variance / groups**2


# -- targets of the objectives -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made():
    """A Gaussian law under a linear-Gaussian reward, an exact map, and draws at its probes."""
    exact, model = linear_exact(), exact_map()
    problem = TuningProblem(model, linear_gaussian())
    probes = make_probes(exact, model, 48, 0.95)
    states = problem.at(probes.t.float(), probes.x.float(), {})
    return problem, probes, problem.draws(states, 2048, True, stream(0, "draws"))


def errors(made, form, n):
    problem, probes, draws = made
    objective = MFMFT(n, form, NoBaseline()).start(TuningSetup(problem, None, 1, 0))
    return target_errors(problem, objective, probes, draws, n, rows=2**12)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("form", ["gradient", "gradient-free"])
def test_weighted_targets_are_unbiased_from_any_number_of_draws(made, form, n):
    found = errors(made, form, n).weighted
    assert abs(found.bias_squared) < Z * found.error
    # the whole tilt would be seen
    probes = made[1]
    assert float((probes.tilted - probes.base).square().sum(1).mean()) > 10 * Z * found.error


def test_one_draw_without_its_weight_is_the_base(made):
    """Gradient-free, N = 1: the mean of the velocities that lead to the draws is the base's own drift."""
    probes, found = made[1], errors(made, "gradient-free", 1).plain
    whole = float((probes.tilted - probes.base).square().sum(1).mean())
    assert abs(found.bias_squared - whole) < 0.05 * whole  # 2,048 draws: 2 % of a standard deviation in each mean


def test_one_gradient_without_its_weight_is_the_gradient_of_the_mean_reward(made):
    """N = 1: b + (σ²/2) E[∇_x r(X)], and for X = m + τε, r linear-Gaussian, E[∇r] = (dm/dx) π Aᵀ(y − A m)."""
    probes, found, reward = made[1], errors(made, "gradient", 1).plain, linear_gaussian()
    t = probes.t[:, None]
    den = (1 - t) ** 2 + t**2 * STD**2
    slope = t * STD**2 / den
    m = torch.tensor(MEAN) + slope * (probes.x - t * torch.tensor(MEAN))
    pull = slope * reward.precision * (reward.y - m @ reward.A.T) @ reward.A
    drift = GAUSSIAN.drift(LinearPath(), probes.t, probes.x) + (1 - t) / t * pull
    expected = probes.carried(drift)
    late = probes.t >= 0.01  # below, the other form stands in
    assert late.sum() > 40
    expected = torch.where(late[:, None], expected, probes.base)
    known = float((expected - probes.tilted).square().sum(1).mean())
    assert abs(found.bias_squared - known) < 0.1 * known


def test_more_draws_bring_the_self_normalised_target_nearer(made):
    few, many = (errors(made, "gradient-free", n).plain.bias_squared for n in (1, 16))
    # bias of a ratio estimator is O(1/N), its square O(1/N²): 16 draws leave less than a tenth
    assert many < 0.1 * few


def test_too_few_draws_for_two_groups_are_refused(made):
    problem, probes, draws = made
    objective = MFMFT(4, "gradient", NoBaseline()).start(TuningSetup(problem, None, 1, 0))
    with pytest.raises(InputError, match="two groups"):
        target_errors(problem, objective, probes, draws, 2048)


def test_the_reward_is_usable_by_the_package():
    assert isinstance(Navigation(), mfm.rewards.Reward)
    assert Navigation().differentiable
