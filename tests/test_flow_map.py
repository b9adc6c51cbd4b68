"""The meta flow map: identities that hold by construction, whatever the weights; exactness for Gaussian data."""

import math

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, coefficients, ks_bound, ks_distance, normal, uniform
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.parameterization import CHARTS, _angle_over_sine
from metaflowmaps.random import stream

MU, DELTA = 1.25, 0.75  # exact in float32, so that float64 models know them exactly
WHITENED = ["gaussian", "residual"]


def network(dim=2, seed=None, dtype=F64, **options):
    """An MLP as initialised (zero output), or with every weight random."""
    with torch.random.fork_rng():
        net = MLPConfig(width=16, depth=2, **options).network((dim,)).to(dtype)
    if seed is not None:
        with torch.no_grad():
            for i, p in enumerate(net.parameters()):
                p.copy_(normal(*p.shape, seed=f"{seed} {i}") / math.sqrt(p.shape[-1]))
    return net


def random_map(path, parameterization, dim=2, dtype=F64, **options):
    return mfm.MetaFlowMap(network(dim, 0, dtype, **options), path, parameterization, MU, DELTA)


@pytest.fixture(params=CHARTS)
def parameterization(request):
    return request.param


@pytest.fixture
def model(path, parameterization):
    return random_map(path, parameterization)


class Gaussian:
    """Everything about data N(μ, δ² Id), from method.md §3."""

    def __init__(self, path, t, x_t, mu=MU, delta=DELTA):
        self.path = path
        alpha, beta, *_ = (c[:, None] for c in coefficients(path, t))
        den = alpha**2 + beta**2 * delta**2
        self.m = mu + beta * delta**2 / den * (x_t - beta * mu)
        self.tau = delta * alpha / den.sqrt()

    def scale(self, s):
        alpha, beta, *_ = (c[:, None] for c in coefficients(self.path, s))
        return beta, (alpha**2 + beta**2 * self.tau**2).sqrt()

    def flow(self, s, u, x_s):
        (b_s, g_s), (b_u, g_u) = self.scale(s), self.scale(u)
        return b_u * self.m + g_u / g_s * (x_s - b_s * self.m)

    def drift(self, s, x_s):
        """d/du of the flow at u = s: β̇ m + (α̇α + β̇βτ²)/g² (x̄ − β m)."""
        alpha, beta, alpha_dot, beta_dot = (c[:, None] for c in coefficients(self.path, s))
        rate = (alpha_dot * alpha + beta_dot * beta * self.tau**2) / (alpha**2 + beta**2 * self.tau**2)
        return beta_dot * self.m + rate * (x_s - beta * self.m)


def points(n=200, dim=2, high=1.0):
    """Sorted inner times, context times, states."""
    s, u = torch.sort(uniform(n, 2, high=high, seed="su")).values.unbind(1)
    return s.clone(), u.clone(), normal(n, dim, seed="x_s"), uniform(n, high=high), normal(n, dim)


# -- by construction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_no_time_no_motion(path, parameterization, dtype):
    """X_{s,s} = id, bit for bit, with any weights, ends included."""
    model = random_map(path, parameterization, dtype=dtype)
    grid = torch.tensor([0.0, 1e-6, 0.3, 0.9, 1 - 1e-6, 1.0])
    s, t = torch.cartesian_prod(grid, grid).to(dtype).unbind(1)
    x_s, x_t = normal(36, 2, seed="x_s").to(dtype), normal(36, 2).to(dtype)
    assert torch.equal(model(s, s, x_s, t, x_t), x_s)
    assert torch.equal(model(0.3, 0.3, x_s, 0.5, x_t), x_s)


def test_weights_matter(model):
    """The identities here are tested on maps that are not trivial."""
    s, u, x_s, t, x_t = points(high=0.9)
    blank = mfm.MetaFlowMap(network(), model.path, model.parameterization, MU, DELTA)
    assert (model.velocity(s, u, x_s, t, x_t) - blank.velocity(s, u, x_s, t, x_t)).abs().mean() > 0.05


def test_map_and_velocity(model):
    s, u, x_s, t, x_t = points()
    v, x_u = model.velocity(s, u, x_s, t, x_t), model(s, u, x_s, t, x_t)
    far = (u - s) > 1e-2  # the quotient cancels by 1e-16/1e-2
    quotient = (x_u - x_s) / (u - s)[:, None]
    torch.testing.assert_close(v[far], quotient[far], rtol=0, atol=1e-12)


def test_map_is_the_charts_jump(model):
    """X = state_out(Z_{a,b}(state_in)): velocity_out, whose slopes know no 0/0, agrees."""
    s, u, x_s, t, x_t = points()
    flow = model.anchor(t, x_t)
    chart = flow.chart
    z = flow.jump(chart.time_in(s), chart.time_in(u), chart.state_in(s, x_s))
    torch.testing.assert_close(model(s, u, x_s, t, x_t), chart.state_out(u, z), rtol=0, atol=1e-11)


def test_velocity_is_continuous_at_no_time(model):
    """v_{s,s+1e-9} → v_{s,s}: no 0/0. Its slope in u is below 1e2 for s, t <= .95."""
    _, _, x_s, t, x_t = points(high=0.95)
    s = torch.cat([torch.zeros(5, dtype=F64), uniform(195, high=0.95, seed="s")])
    near, at = (model.velocity(s, s + gap, x_s, t, x_t) for gap in (1e-9, 0.0))
    torch.testing.assert_close(near, at, rtol=0, atol=1e-6)
    # and v_{s,s} is the time derivative of the map
    h = 1e-6
    rate = (model(s, s + h, x_s, t, x_t) - x_s) / h
    torch.testing.assert_close(rate, at, rtol=0, atol=1e-3)


@pytest.mark.parametrize("s", [0.0, 0.4, 1.0])
def test_velocity_is_continuous_at_the_data_end(model, s):
    """t < 1: nothing happens at u → 1, nor at s → 1."""
    _, _, x_s, t, x_t = points(high=0.8)
    near, at = (model.velocity(min(s, 1 - gap), 1 - gap, x_s, t, x_t) for gap in (1e-8, 0.0))
    torch.testing.assert_close(near, at, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", WHITENED)
@pytest.mark.parametrize("t", [1.0, 1 - 1e-9])
def test_a_clean_context_leaves_nothing_to_the_network(path, name, t):
    """t → 1: X_{s,u} = β_u x + (α_u/α_s)(x̄ − β_s x) whatever the weights (method.md §3)."""
    s, u, x_s, _, x_t = points(high=0.9)
    (a_s, b_s, *_), (a_u, b_u, *_) = coefficients(path, s), coefficients(path, u)
    limit = b_u[:, None] * x_t + (a_u / a_s)[:, None] * (x_s - b_s[:, None] * x_t)
    model = random_map(path, name)
    # τ = 2e-9 at 1 − 1e-9 (trigonometric: 1.6e-9), times a network of size 1, over g_s >= 0.1
    torch.testing.assert_close(model(s, u, x_s, t, x_t), limit, rtol=0, atol=1e-13 if t == 1 else 1e-6)
    one = torch.ones_like(s)
    torch.testing.assert_close(model(s, one, x_s, t, x_t), x_t, rtol=0, atol=1e-13 if t == 1 else 1e-6)
    far = u - s > 1e-2
    v = model.velocity(s, u, x_s, t, x_t)
    torch.testing.assert_close(v[far], ((limit - x_s) / (u - s)[:, None])[far], rtol=0, atol=1e-4 if t < 1 else 1e-11)


def test_finite_everywhere(path, parameterization):
    """Values and gradients, in float32, at every combination of ends (s = t = 1 has no velocity to speak of)."""
    model = random_map(path, parameterization, dtype=torch.float32)
    grid = torch.tensor([0.0, 1e-6, 0.5, 1 - 1e-6, 1.0])
    s, u, t = torch.cartesian_prod(grid, grid, grid).unbind(1)
    keep = (s <= u) & ~((s == 1) & (t == 1))
    s, u, t = s[keep], u[keep], t[keep]
    x_s, x_t = (normal(len(s), 2, seed=k).float().requires_grad_() for k in ("x_s", "x_t"))
    out = model(s, u, x_s, t, x_t)
    gradients = torch.autograd.grad(out.sum(), (x_s, x_t, *model.parameters()))
    assert all(bool(torch.isfinite(g).all()) for g in (out, *gradients))


# -- charts ----------------------------------------------------------------------------------------------------------


def test_chart_round_trips(model):
    s, _, x_s, t, x_t = points()
    s[:2], s[2:4] = 0.0, 1.0
    chart = model.anchor(t, x_t).chart
    a = chart.time_in(s)
    assert bool(((a >= 0) & (a <= 1)).all())
    assert torch.equal(a[:2], s[:2])
    assert torch.equal(a[2:4], s[2:4])
    torch.testing.assert_close(chart.time_out(a), s, rtol=0, atol=1e-13)
    torch.testing.assert_close(chart.state_out(s, chart.state_in(s, x_s)), x_s, rtol=0, atol=1e-13)
    torch.testing.assert_close(chart.state_in(s, chart.state_out(s, x_s)), x_s, rtol=0, atol=1e-11)
    x_1 = chart.endpoint(normal(200, 2, seed="x_1"))
    torch.testing.assert_close(chart.shift + chart.scale * x_1, normal(200, 2, seed="x_1"), rtol=0, atol=1e-13)


def test_the_auxiliary_process_is_the_inner_path(model):
    """z of α_s ε + β_s x_1 is α_a ε + β_a x̂ on the inner path: the coupling that data targets use."""
    s, _, eps, t, x_t = points(high=0.98)
    x_1 = normal(200, 2, seed="x_1")
    chart = model.anchor(t, x_t).chart
    z = chart.state_in(s, model.path.interpolate(eps, x_1, s))
    inner = chart.inner_path.interpolate(eps, chart.endpoint(x_1), chart.time_in(s))
    torch.testing.assert_close(z, inner, rtol=0, atol=1e-11)


def test_gaussian_chart_is_the_notes(path):
    """method.md §3: m, τ, g, θ(s) = atan2(β_s τ, α_s) ∈ [0, π/2], z = (x̄ − β_s m)/g_s, x̂ = (x_1 − m)/τ."""
    s, u, x_s, t, x_t = points()
    model, exact = random_map(path, "gaussian"), Gaussian(path, t, x_t)
    flow = model.anchor(t, x_t)
    chart = flow.chart
    beta, g = exact.scale(s)
    torch.testing.assert_close(chart.state_in(s, x_s), (x_s - beta * exact.m) / g, rtol=0, atol=1e-11)
    alpha_s = coefficients(path, s)[0]
    angle = torch.atan2(beta[:, 0] * exact.tau[:, 0], alpha_s)
    torch.testing.assert_close(chart.time_in(s), angle * 2 / math.pi, rtol=0, atol=1e-13)
    torch.testing.assert_close(chart.shift, exact.m, rtol=0, atol=1e-13)
    torch.testing.assert_close(chart.scale, exact.tau, rtol=0, atol=1e-13)
    # what the network sees and says; checkpoints depend on it: whitened x_t, the angle of t, and F = (π/2) net
    alpha, beta, *_ = coefficients(path, t)
    x_white = (x_t - (beta * MU)[:, None]) / (alpha**2 + beta**2 * DELTA**2).sqrt()[:, None]
    net = model.network(x_s, s, u, x_white, torch.atan2(beta * DELTA, alpha) * 2 / math.pi)
    torch.testing.assert_close(flow(s, u, x_s), math.pi / 2 * net, rtol=0, atol=1e-12)


def test_residual_form_is_the_notes():
    """Linear path: v^G = m + [(−2 + (u+s)(1+τ²))/(g_s(g_u+g_s))](x̄ − s m); v = v^G + τ net; weight 1/τ²."""
    s, u, x_s, t, x_t = points()
    path = mfm.LinearPath()
    model, exact = random_map(path, "residual"), Gaussian(path, t, x_t)
    blank = mfm.MetaFlowMap(network(), path, "residual", MU, DELTA)
    (beta, g_s), (_, g_u) = exact.scale(s), exact.scale(u)
    centred, total = x_s - beta * exact.m, (u + s)[:, None]
    v_g = exact.m + (-2 + total * (1 + exact.tau**2)) / (g_s * (g_u + g_s)) * centred
    torch.testing.assert_close(blank.velocity(s, u, x_s, t, x_t), v_g, rtol=0, atol=1e-11)
    chart = model.anchor(t, x_t).chart
    net = model.network(centred / g_s, s, u, chart.context, chart.context_time)
    torch.testing.assert_close(model.velocity(s, u, x_s, t, x_t), v_g + exact.tau * net, rtol=0, atol=1e-11)
    expected = exact.tau[:, 0].clamp_min(1e-3) ** -2
    torch.testing.assert_close(chart.weight, expected)


def test_velocity_in_is_the_inverse_of_velocity_out(model):
    """Both ways at u = s: F_{a,a} -> v_{s,s} -> dz/da = F_{a,a}."""
    s, _, x_s, t, x_t = points(high=0.98)
    chart = model.anchor(t, x_t).chart
    f = normal(200, 2, seed="F")
    if model.parameterization == "residual":  # there F is v itself
        torch.testing.assert_close(chart.velocity_out(s, s, x_s, f), f, rtol=0, atol=0)
    back = chart.velocity_in(s, x_s, chart.velocity_out(s, s, x_s, f))
    torch.testing.assert_close(back, f, rtol=0, atol=1e-10)


def test_velocity_in_is_the_chain_rule(model):
    """dz/da along dx̄/ds = v: [z(s+h, x̄+hv) − z(s−h, x̄−hv)]/[a(s+h) − a(s−h)]."""
    s, t = uniform(200, low=0.02, high=0.95, seed="s"), uniform(200, high=0.95)
    x_s, x_t, v, h = normal(200, 2, seed="x_s"), normal(200, 2), normal(200, 2, seed="v"), 1e-5
    chart = model.anchor(t, x_t).chart
    (z_1, a_1), (z_0, a_0) = ((chart.state_in(s + e * h, x_s + e * h * v), chart.time_in(s + e * h)) for e in (1, -1))
    # h² times a third derivative, up to 1e4 where 1−s and 1−t are .05; rounding 1e-16/h
    expected = (z_1 - z_0) / (a_1 - a_0)[:, None]
    torch.testing.assert_close(chart.velocity_in(s, x_s, v), expected, rtol=1e-5, atol=1e-5)


# -- Gaussian data: exact untrained ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHITENED)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_untrained_and_exact_for_gaussian_data(path, name, dim):
    mean = torch.linspace(-1.0, 1.0, dim).double() + MU  # event-shaped, exact in float32
    model = mfm.MetaFlowMap(network(dim), path, name, mean, DELTA).double()
    law = mfm.GaussianMixture(mean[None], DELTA**2)
    s, u, x_s, t, x_t = points(dim=dim)
    exact = Gaussian(path, t, x_t, mean)
    # the flow map
    torch.testing.assert_close(model(s, u, x_s, t, x_t), exact.flow(s, u, x_s), rtol=0, atol=1e-12)
    # its diagonal is the auxiliary drift: by hand, and the mixture's
    v = model.velocity(s, s, x_s, t, x_t)
    torch.testing.assert_close(v, exact.drift(s, x_s), rtol=0, atol=1e-9)  # 1/g_s² amplifies where s, t are near 1
    torch.testing.assert_close(v, law.auxiliary_drift(path, s, x_s, t, x_t), rtol=0, atol=1e-9)
    # one step from noise is the exact posterior, m + τ ε
    zero, one = torch.zeros_like(s), torch.ones_like(s)
    drawn = exact.m + exact.tau * x_s
    torch.testing.assert_close(model(zero, one, x_s, t, x_t), drawn, rtol=0, atol=1e-13)
    posterior = law.posterior(path, t, x_t)
    torch.testing.assert_close(exact.m, posterior.mean, rtol=0, atol=1e-13)
    torch.testing.assert_close(exact.tau**2, posterior.variance[:, :1], rtol=0, atol=1e-13)
    # by-products, at the ends too
    t[0], t[1] = 0.0, 1.0
    torch.testing.assert_close(model.drift(t, x_t), law.drift(path, t, x_t), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.denoise(t, x_t), law.denoise(path, t, x_t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", WHITENED)
@pytest.mark.parametrize("steps", [1, 3])
def test_untrained_draws_have_the_posteriors_law(path, name, steps):
    n, t = 4_000, torch.tensor([0.0, 0.5, 0.9], dtype=F64)
    x_t = torch.tensor([[0.3], [-0.5], [1.0]], dtype=F64)
    model = mfm.MetaFlowMap(network(1), path, name, MU, DELTA)
    draws = model.draw(t, x_t, n, steps, generator=stream(0, "draws"))
    assert draws.shape == (n, 3, 1)
    exact = Gaussian(path, t, x_t)
    for row in range(3):
        m, v = exact.m[row], exact.tau[row] ** 2
        # level 1e-4 by Massart's bound, fixed seed
        assert ks_distance(draws[:, row, 0], m, v, torch.ones(1, dtype=F64)) < ks_bound(n)


@pytest.mark.parametrize("name", WHITENED)
@pytest.mark.parametrize("steps", [1, 4])
def test_untrained_generation_has_the_datas_law(path, name, steps):
    n = 4_000
    model = mfm.MetaFlowMap(network(1), path, name, MU, DELTA)
    x = model.generate(n, steps, generator=stream(0, "generate"))
    assert x.shape == (n, 1)
    mean, variance = torch.tensor([MU], dtype=F64), torch.tensor([DELTA**2], dtype=F64)
    assert ks_distance(x[:, 0], mean, variance, torch.ones(1, dtype=F64)) < ks_bound(n)
    assert torch.equal(x, model.generate(n, steps, generator=stream(0, "generate")))


def test_a_double_model_keeps_a_double_mean():
    """data_mean = 0.1 means 0.1 in float64, not its float32 rounding (1.5e-9 away)."""
    model = mfm.MetaFlowMap(network(1), mfm.LinearPath(), "gaussian", torch.tensor([0.1], dtype=F64), 1.0)
    x = torch.zeros(1, 1, dtype=F64)
    torch.testing.assert_close(model.denoise(0.0, x), torch.full_like(x, 0.1), rtol=0, atol=1e-15)


# -- by-products and drawing -----------------------------------------------------------------------------------------


def test_by_products_are_the_velocitys(model):
    """b_t(x) = v_{t,t}(x; 0, ·) and D_t(x) = (v_{0,0}(x̄; t, x) − α̇_0 x̄)/β̇_0, at x̄ = 0."""
    t, x = uniform(50), normal(50, 2)
    zeros = torch.zeros_like(x)
    torch.testing.assert_close(model.drift(t, x), model.velocity(t, t, x, 0.0, zeros), rtol=0, atol=0)
    scale = 1 if model.path.name == "linear" else 2 / math.pi
    v = model.velocity(0.0, 0.0, zeros, t, x)
    torch.testing.assert_close(model.denoise(t, x), scale * v, rtol=0, atol=1e-14)


def test_draw_is_differentiable_in_the_context(model):
    x_t = normal(3, 2).requires_grad_()
    for steps in (1, 2):
        assert torch.autograd.gradcheck(lambda x, k=steps: model.draw(0.4, x, 2, k, generator=stream(0)), x_t)


def test_draw_is_push_of_noise(model):
    """Row (i, j) of the draws is the map at context j: contexts and noises line up."""
    t, x_t = uniform(3), normal(3, 2)
    noise = torch.randn(4, 3, 2, generator=stream(5), dtype=F64)
    draws = model.draw(t, x_t, 4, generator=stream(5))
    for i in range(4):
        # one batched call against four: rounding only
        torch.testing.assert_close(draws[i], model(0.0, 1.0, noise[i], t, x_t), rtol=0, atol=1e-13)
        assert torch.equal(model.push(noise[i], t, x_t), model.push(noise[i], t, x_t, 1))  # of one step, unless asked
    assert model.draw(0.3, x_t.clone(), 2, generator=stream(1)).shape == (2, 3, 2)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_push_composes(model, steps):
    """k jumps, equal in the chart's time: uniform s, or (gaussian) uniform angle θ(s) = atan2(β_s τ, α_s)."""
    t, x_t, noise = uniform(20, high=0.95), normal(20, 2), normal(20, 2, seed="noise")
    tau = Gaussian(model.path, t, x_t).tau[:, 0]
    x = noise
    for i in range(steps):
        ends = []
        for a in (i / steps, (i + 1) / steps):
            ratio = math.tan(math.pi / 2 * a) / tau  # β_s/α_s at the angle a
            angle = ratio / (1 + ratio) if model.path.name == "linear" else torch.atan(ratio) * 2 / math.pi
            ends.append(torch.full_like(t, a) if a in (0, 1) or model.parameterization != "gaussian" else angle)
        x = model(*ends, x, t, x_t)
    # times differ by rounding; the map's slope in them is below 1e2 here
    torch.testing.assert_close(model.push(noise, t, x_t, steps), x, rtol=0, atol=1e-11)


def test_push_of_the_exact_map_does_not_depend_on_steps(path):
    model = mfm.MetaFlowMap(network(), path, "gaussian", MU, DELTA)
    t, x_t, noise = uniform(20), normal(20, 2), normal(20, 2, seed="noise")
    one, many = (model.push(noise, t, x_t, k) for k in (1, 7))
    torch.testing.assert_close(one, many, rtol=0, atol=1e-12)


def test_results_do_not_depend_on_the_batch(model):
    s, u, x_s, t, x_t = points(20)
    whole = model(s, u, x_s, t, x_t)
    for i in range(20):
        row = slice(i, i + 1)
        torch.testing.assert_close(model(s[row], u[row], x_s[row], t[row], x_t[row]), whole[row], rtol=0, atol=1e-13)


# -- conditions ------------------------------------------------------------------------------------------------------


def test_labels(path, parameterization):
    model = random_map(path, parameterization, num_classes=3)
    s, u, x_s, t, x_t = points(8, high=0.9)

    def at(label):
        cond = None if label is None else {"label": torch.full((8,), label)}
        return model(s, u, x_s, t, x_t, cond)

    outputs = [at(label) for label in range(4)]
    for i in range(4):
        for j in range(i):
            assert (outputs[i] - outputs[j]).abs().mean() > 1e-3
    torch.testing.assert_close(at(None), outputs[3], rtol=0, atol=0)  # no label is the null class
    # each row has its own, and draws repeat them in the order of the contexts
    label = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    mixed = model(s, u, x_s, t, x_t, {"label": label})
    expected = torch.stack([outputs[int(k)][i] for i, k in enumerate(label)])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-13)
    draws = model.draw(t, x_t, 3, generator=stream(0), cond={"label": label})
    alone = torch.randn(3, 8, 2, generator=stream(0), dtype=F64)
    one = model(0.0, 1.0, alone[1], t, x_t, {"label": label})
    torch.testing.assert_close(draws[1], one, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("classes", "label", "message"),
    [(0, 1, "knows no classes"), (1, 2, r"labels must lie in 0\.\.1"), (1, -1, r"labels must lie in 0\.\.1")],
)
def test_labels_that_are_no_class_are_refused(path, classes, label, message):
    model = random_map(path, "gaussian", num_classes=classes)
    for known in range(classes + 1):  # the last is the null class
        assert model.drift(0.5, normal(1, 2), {"label": torch.tensor([known])}).isfinite().all()
    with pytest.raises(mfm.InputError, match=message):
        model.drift(0.5, normal(1, 2), {"label": torch.tensor([label])})


def test_an_angle_over_its_sine_is_smooth_where_its_series_begins():
    """(2/π) atan2(y, x)/y as written, which loses nothing for y > 0, to a few roundings; its limit 2/(π x) at 0."""
    cosine = torch.tensor([0.3, 1.0], dtype=F64)[:, None]
    ratio = torch.tensor([1e-12, 1e-5, 0.9e-3, 0.999e-3, 1.001e-3, 2e-3, 0.5, 1e3], dtype=F64)
    expected = 2 / math.pi * torch.atan2(ratio * cosine, cosine) / (ratio * cosine)
    torch.testing.assert_close(_angle_over_sine(ratio * cosine, cosine), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(_angle_over_sine(0 * cosine, cosine), 2 / math.pi / cosine, rtol=1e-14, atol=0)


def test_fresh_labels_change_nothing(path):
    """Label vectors start at zero: conditioning begins as the unconditional network."""
    net = network(2, num_classes=3)
    x, t = normal(4, 2), uniform(4)
    h = net.labels(torch.arange(4))
    assert not h.any()
    assert torch.equal(net(x, t, t, x, t, torch.arange(4)), net(x, t, t, x, t))


# -- refusals --------------------------------------------------------------------------------------------------------

GOOD = {"s": 0.2, "u": 0.7, "x_s": torch.zeros(3, 2, dtype=F64), "t": 0.5, "x_t": torch.zeros(3, 2, dtype=F64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"s": 0.8}, "inner times must satisfy s <= u, got s = 0.8, u = 0.7"),
        ({"s": torch.tensor([0.1, 0.9, 0.2])}, "inner times must satisfy s <= u"),
        ({"s": -0.1}, r"s must lie in \[0, 1\] \(0 is noise, 1 is data\), got -0.1"),
        ({"u": 1.5}, r"u must lie in \[0, 1\]"),
        ({"t": math.nan}, r"t must lie in \[0, 1\] .* got nan"),
        ({"s": math.nan}, r"s must lie in \[0, 1\]"),
        ({"u": torch.tensor([0.7, math.nan, 0.7])}, r"u must lie in \[0, 1\]"),
        ({"t": torch.tensor([1, 0, 1])}, "t must be a float or a floating-point tensor, got dtype torch.int64"),
        ({"t": torch.tensor([0.1, 0.2])}, r"tensor of shape \(3,\)"),
        ({"t": torch.tensor([[0.1], [0.2], [0.3]])}, r"tensor of shape \(3,\)"),
        ({"s": torch.tensor([0.1, 0.2]), "u": torch.tensor([0.5, 0.6, 0.7])}, r"shape \(3,\)"),
        ({"x_s": torch.zeros(4, 2, dtype=F64)}, "x_s and x_t must have the same shape"),
        ({"x_s": torch.zeros(3, 5, dtype=F64), "x_t": torch.zeros(3, 5, dtype=F64)}, r"event shape \(2,\), got \(5,\)"),
        ({"x_s": torch.zeros(2, dtype=F64)}, "add a batch dimension"),
        ({"x_s": torch.zeros(3, 2, dtype=torch.int64)}, r"convert it with .float\(\)"),
        ({"x_t": torch.zeros(3, 2)}, "the same dtype, got torch.float64 and torch.float32"),
        ({"x_s": torch.zeros(3, 2), "x_t": torch.zeros(3, 2)}, "the model's dtype torch.float64, got torch.float32"),
    ],
)
def test_bad_calls_are_refused(model, change, message):
    for call in (model.forward, model.velocity):
        with pytest.raises(mfm.InputError, match=message):
            call(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameterization": "gausian"}, "did you mean 'gaussian'"),
        ({"data_std": 0.0}, "data_std must be a positive number"),
        ({"data_std": math.nan}, "data_std must be a positive number"),
        ({"data_std": 0.9e-8}, "data_std must lie between 1e-8 and 1e8"),
        ({"data_std": 1.1e8}, "data_std must lie between 1e-8 and 1e8"),
        ({"data_mean": math.inf}, "data_mean must be finite"),
        ({"data_mean": torch.zeros(3)}, "data_mean"),  # neither a number nor event-shaped
        ({"data_mean": torch.zeros(5, 1)}, "data_mean"),  # would broadcast against a batch of five
        ({"path": "linear"}, "LinearPath"),
        ({"network": torch.nn.Linear(2, 2)}, "event_shape"),
    ],
)
def test_bad_maps_are_refused(options, message):
    with pytest.raises(mfm.InputError, match=message):
        mfm.MetaFlowMap(**{"network": network(), "path": mfm.LinearPath(), **options})


def test_bad_counts_are_refused(model):
    x = normal(3, 2)
    for call in (
        lambda: model.draw(0.5, x, 0),
        lambda: model.draw(0.5, x, 1, steps=0),
        lambda: model.generate(0),
        lambda: model.generate(1, steps=0),
    ):
        with pytest.raises(mfm.InputError, match="at least 1"):
            call()


def test_draws_at_a_state_that_is_not_finite_are_refused():
    model = mfm.MetaFlowMap(MLPConfig(width=8, depth=2).network((2,)), mfm.LinearPath())
    x = torch.zeros(3, 2)
    x[1, 0] = math.nan
    for ask in (lambda: model.draw(0.5, x, 2), lambda: mfm.value_gradient(model, lambda x: x[:, 0], 0.5, x, 2)):
        with pytest.raises(mfm.InputError, match="x_t is not finite in 1 of 3 rows"):
            ask()
