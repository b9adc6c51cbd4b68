"""Losses at the exact flow map, where every residual or every expected gradient is 0, and off it, where none is."""

import math

import pytest
import torch

import metaflowmaps as mfm
from conftest import CASES, F64, PATHS, coefficients, normal, uniform
from metaflowmaps import losses
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.parameterization import CHARTS
from metaflowmaps.random import stream

MU, DELTA = 0.5, 1.25


class Problem:
    """A law, a batch of contexts drawn from it, and the exact flow of its auxiliary process in a chart.

    ``couple`` gives z_a = α_a ε + β_a x̂ and the data target α̇_a ε + β̇_a x̂ with the x_1 that made the contexts.
    """

    def __init__(self, path, chart, case="per-component-full", n=60, steps=12, high=0.95, copies=1):
        self.path, self.law, self.n, self.steps = path, CASES[case].law, n * copies, steps
        t = uniform(n, high=high)
        t[: n // 10] = 0.0  # the release's tenth of contexts
        x_1 = self.law.sample(n, stream(0, "x_1"))
        x_t = path.interpolate(normal(n, 2, seed="context"), x_1, t)
        a, b = torch.sort(uniform(n, 2, high=0.98, seed="ab")).values.T.contiguous()
        a[:5] = b[:5]  # some jumps have no length
        self.t, self.a, self.b, self.gamma = (v.repeat(copies) for v in (t, a, b, uniform(n, seed="gamma")))
        self.x_1, self.x_t, self.eps = (v.repeat(copies, 1) for v in (x_1, x_t, normal(n, 2, seed="inner")))
        self.chart = CHARTS[chart](path, self.t, self.x_t, MU, DELTA)
        self._posterior = {}

    def velocity(self, a, z):
        """c_a(z): the drift of the whitened posterior on the inner path; the context is repeated where z is stacked."""
        copies = len(z) // self.n
        if copies not in self._posterior:
            wide = self.law.posterior(self.path, self.t.repeat(copies), self.x_t.repeat(copies, 1))
            if isinstance(self.chart.shift, torch.Tensor):
                wide = wide.rescaled(self.chart.shift.repeat(copies, 1), self.chart.scale.repeat(copies, 1))
            self._posterior[copies] = wide
        return self._posterior[copies].drift(self.chart.inner_path, a, z)

    def flow(self, a, b, z):
        """F_{a,b}(z) = (Z − z)/(b − a) by rk4 on ``steps`` equal steps, as the mean of slopes: nothing to divide by."""
        h, total = ((b - a) / self.steps)[:, None], torch.zeros_like(z)
        for i in range(self.steps):
            x, time = z + h * total, a + i * h[:, 0]
            k1 = self.velocity(time, x)
            k2 = self.velocity(time + h[:, 0] / 2, x + h / 2 * k1)
            k3 = self.velocity(time + h[:, 0] / 2, x + h / 2 * k2)
            k4 = self.velocity(time + h[:, 0], x + h * k3)
            total = total + (k1 + 2 * k2 + 2 * k3 + k4) / 6
        return total / self.steps

    def couple(self, a):
        eps, x_hat = self.eps, self.chart.endpoint(self.x_1)
        alpha, beta, alpha_dot, beta_dot = (c[:, None] for c in coefficients(self.chart.inner_path, a))
        return alpha * eps + beta * x_hat, alpha_dot * eps + beta_dot * x_hat


def bump(a, b, z):
    """A perturbation of F that keeps no identity."""
    return torch.sin(2 * z + a[:, None]) + (b - a)[:, None] * torch.cos(3 * b[:, None] - z)


def perturbed(flow, theta):
    return lambda a, b, z: flow(a, b, z) + theta * bump(a, b, z)


# each path and each chart once; the other two pairs in `make attack`
both = pytest.mark.parametrize(
    ("path", "chart"),
    [
        pytest.param(PATHS[path], chart, id=f"{path}-{chart}", marks=[pytest.mark.attack] if long else [])
        for path, chart, long in (
            ("linear", "gaussian", False),
            ("trigonometric", "plain", False),
            ("linear", "plain", True),
            ("trigonometric", "gaussian", True),
        )
    ],
)


# -- residuals -------------------------------------------------------------------------------------------------------


def diagonal_teacher(p, flow, a, b, z):
    return losses.diagonal(flow, a, z, p.velocity(a, z))


def eulerian_teacher(p, flow, a, b, z):
    return losses.eulerian(flow, a, b, z, p.velocity(a, z))


def eulerian_self(p, flow, a, b, z):
    return losses.eulerian(flow, a, b, z, flow(a, a, z))


def lagrangian_teacher(p, flow, a, b, z):
    return losses.lagrangian(flow, a, b, z, p.velocity)


def lagrangian_self(p, flow, a, b, z):
    return losses.lagrangian(flow, a, b, z, lambda a, z: flow(a, a, z))


def difference_teacher(p, flow, a, b, z):
    return losses.lagrangian_difference(flow, a, b, z, p.velocity, h=5e-3)


def difference_self(p, flow, a, b, z):
    return losses.lagrangian_difference(flow, a, b, z, lambda a, z: flow(a, a, z), h=5e-3)


def semigroup(p, flow, a, b, z):
    return losses.semigroup(flow, a, b, z, p.gamma)


# worst squared residuals allowed: what rk4 with 12 steps leaves (measured 8e-9, 3e-7, 4e-10; it falls by 2^8 as the
# steps double) with a factor of ten, and for differences (h²/6 · third derivative)², measured 8e-7
EXACT = {
    diagonal_teacher: 1e-20,
    eulerian_teacher: 1e-7,
    eulerian_self: 1e-7,
    lagrangian_teacher: 3e-6,
    lagrangian_self: 3e-6,
    difference_teacher: 1e-5,
    difference_self: 1e-5,
    semigroup: 1e-8,
}


@pytest.mark.parametrize("loss", EXACT)
@both
def test_nothing_is_left_at_the_exact_map(path, chart, loss):
    n = 60
    p = Problem(path, chart, n=n, copies=3)
    z, _ = p.couple(p.a)
    theta = torch.tensor([0.0, 0.05, 0.1], dtype=F64).repeat_interleave(n)[:, None]  # one call for three maps

    def flow(a, b, z):
        return p.flow(a, b, z) + theta.repeat(len(z) // len(theta), 1) * bump(a, b, z)

    value = loss(p, flow, p.a, p.b, z)
    assert value.shape == (3 * n,)
    exact, near, far = value.split(n)
    assert float(exact.max()) < EXACT[loss]
    # off the map: grows, as the square of the perturbation (the exact residual is 0, so there is no linear part)
    assert float(near.mean()) > 20 * float(exact.mean()) + 1e-4
    assert 3 < float(far.mean() / near.mean()) < 5


# the perturbation of a self target moves with the flow: at b = a a self target is met by any flow, elsewhere by none
@pytest.mark.parametrize(
    "loss", [diagonal_teacher, eulerian_teacher, lagrangian_teacher, difference_teacher, semigroup]
)
@pytest.mark.parametrize("case", ["isotropic", "shared-full"])
def test_and_for_other_laws(loss, case):
    p = Problem(PATHS["linear"], "gaussian", case)
    z, _ = p.couple(p.a)
    assert float(loss(p, p.flow, p.a, p.b, z).max()) < EXACT[loss]


@pytest.mark.parametrize("loss", EXACT)
def test_gaussian_data_is_exact_in_closed_form(path, loss):
    """In the gaussian chart of matching data F = 0: no integrator in between, so the residual is rounding."""
    p = Problem(path, "gaussian")
    p.law = mfm.GaussianMixture(torch.full((1, 2), MU, dtype=F64), DELTA**2)
    z, _ = p.couple(p.a)
    assert float(loss(p, lambda a, b, z: 0 * z, p.a, p.b, z).max()) < 1e-20


# -- expected gradients with data targets ----------------------------------------------------------------------------


def z_score(samples):
    return float(samples.mean() / samples.std() * math.sqrt(len(samples)))


def gradients(loss, flow, theta):
    """d loss_i / d θ of F + θ·bump, per sample, (B,)."""
    each = torch.full((theta[0],), theta[1], dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(loss(perturbed(flow, each[:, None])).sum(), each)
    return g


@pytest.mark.parametrize("which", ["diagonal", "meanflow"])
@both
def test_data_targets_have_no_gradient_on_average(path, chart, which):
    """E[d loss/dθ] = 0 at the exact map: within 4 standard errors (level 6e-5); far outside off it."""
    n = 1_500
    p = Problem(path, chart, n=n, steps=8, high=0.9)
    p.a, p.b = 0.9 * p.a, 0.9 * p.b
    z, target = p.couple(p.a)

    def loss(flow):
        if which == "diagonal":
            return losses.diagonal(flow, p.a, z, target)
        return losses.eulerian(flow, p.a, p.b, z, target)

    assert abs(z_score(gradients(loss, p.flow, (n, 0.0)))) < 4
    for theta in (0.3, -0.3):
        score = z_score(gradients(loss, p.flow, (n, theta)))
        assert score * theta > 0  # uphill
        assert abs(score) > 6


@both
def test_teacher_gradient_is_the_mean_data_gradient(path, chart):
    """Diagonal, at a map that is not exact: the same gradient, without the data target's noise."""
    n = 4_000
    p = Problem(path, chart, n=n, steps=1)
    z, target = p.couple(p.a)
    data, teacher = (
        gradients(lambda flow, c=c: losses.diagonal(flow, p.a, z, c), p.flow, (n, 0.2))
        for c in (target, p.velocity(p.a, z))
    )
    assert abs(z_score(data - teacher)) < 4
    assert z_score(teacher) > 20  # there is a gradient to agree on
    assert float(teacher.std()) < float(data.std())


# -- what carries gradient -------------------------------------------------------------------------------------------


def frozen(p, loss, live, still, z):
    """Each loss written out with its goal from ``still``: the prediction alone follows ``live``. Derivatives by
    float64 differences, so that this knows nothing of JVPs."""
    a, b, h = p.a, p.b, 1e-5
    d, sq = (b - a)[:, None], lambda r: r.square().sum(1)
    c = p.velocity(a, z)
    if loss is eulerian_teacher:
        slope = (still(a + h, b, z + h * c) - still(a - h, b, z - h * c)) / (2 * h)
        return sq(live(a, b, z) - c - d * slope)
    if loss is lagrangian_teacher:
        slope = (live(a, b + h, z) - live(a, b - h, z)) / (2 * h)
        return sq(live(a, b, z) + d * slope - p.velocity(b, z + d * still(a, b, z)))
    g, w = p.gamma[:, None], a + p.gamma * (b - a)
    first = still(a, w, z)
    return sq(live(a, b, z) - g * first - (1 - g) * still(w, b, z + g * d * first))


@pytest.mark.parametrize("loss", [eulerian_teacher, lagrangian_teacher, semigroup])
@both
def test_values_and_gradients_are_those_of_the_formulas(path, chart, loss):
    p = Problem(path, chart, steps=4)
    z, _ = p.couple(p.a)
    theta = torch.tensor(0.3, dtype=F64, requires_grad=True)
    flow = perturbed(p.flow, theta)
    value = loss(p, flow, p.a, p.b, z)
    expected = frozen(p, loss, flow, perturbed(p.flow, 0.3), z)
    # differences: h² · third derivative, 1e-16/h
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    (got,), (reference,) = (torch.autograd.grad(v.mean(), theta) for v in (value, expected))
    torch.testing.assert_close(got, reference, rtol=1e-6, atol=1e-7)


def test_no_gradient_reaches_targets(path):
    p = Problem(path, "plain", n=20, steps=2)
    z, _ = p.couple(p.a)
    knob = torch.tensor(1.0, dtype=F64, requires_grad=True)

    def teacher(a, z):
        return knob * p.velocity(a, z)

    for value in (
        losses.diagonal(p.flow, p.a, z, teacher(p.a, z)),
        losses.eulerian(p.flow, p.a, p.b, z, teacher(p.a, z)),
        losses.lagrangian(p.flow, p.a, p.b, z, teacher),
        losses.lagrangian_difference(p.flow, p.a, p.b, z, teacher),
        losses.semigroup(p.flow, p.a, p.b, z, p.gamma),
    ):
        assert not value.requires_grad


@pytest.mark.parametrize("name", CHARTS)
def test_every_loss_trains_a_network(path, name):
    """Through a real map: finite values, and a gradient at the output layer, in float32."""
    with torch.random.fork_rng():
        net = MLPConfig(width=8, depth=2).network((2,))
    with torch.no_grad():
        net.output.weight.copy_(normal(2, 8, seed="w"))
    model = mfm.MetaFlowMap(net, path, name, MU, DELTA)
    n = 16
    a, b = torch.sort(uniform(n, 2, seed="ab").float()).values.T
    a, b, z, t = a.clone(), b.clone(), normal(n, 2, seed="z").float(), uniform(n).float()
    flow = model.anchor(t, normal(n, 2).float())
    target = normal(n, 2, seed="target").float()
    for value in (
        losses.diagonal(flow, a, z, target),
        losses.eulerian(flow, a, b, z, target),
        losses.lagrangian(flow, a, b, z, lambda a, z: -z),
        losses.lagrangian_difference(flow, a, b, z, lambda a, z: -z),
        losses.semigroup(flow, a, b, z, uniform(n).float()),
    ):
        assert value.shape == (n,)
        assert value.dtype == torch.float32
        (g,) = torch.autograd.grad(value.mean(), net.output.weight)
        assert bool(torch.isfinite(g).all())
        assert g.abs().max() > 1e-4


def test_stacked_states_repeat_the_context(path):
    """(2B) states at (B) contexts are two batches at those contexts, in every chart."""
    for name in CHARTS:
        with torch.random.fork_rng():
            net = MLPConfig(width=8, depth=2, num_classes=2).network((2,)).double()
        with torch.no_grad():
            for i, parameter in enumerate(net.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=str(i)))
        model = mfm.MetaFlowMap(net, path, name, MU, DELTA)
        t, x_t, label = uniform(5), normal(5, 2), torch.tensor([0, 1, 2, 0, 1])
        flow = model.anchor(t, x_t, {"label": label})
        a, b = torch.sort(uniform(10, 2, seed="ab")).values.T
        z = normal(10, 2, seed="z")
        apart = torch.cat([flow(a[i : i + 5], b[i : i + 5], z[i : i + 5]) for i in (0, 5)])
        torch.testing.assert_close(flow(a, b, z), apart, rtol=0, atol=1e-12)


# -- central differences ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("h", [5e-3, 0.1, 2.0])
def test_central_differences_stay_inside(h, dtype):
    """The flow is never asked for b outside [a, 1], nor the velocity for a time outside: at b = a, b = 1, a = 1 too."""
    grid = torch.tensor([0.0, 1e-7, 1e-3, 0.3, 0.995, 1 - 1e-7, 1.0])
    a, b = torch.cartesian_prod(grid, grid).to(dtype).unbind(1)
    a, b = (
        torch.cat([a[a <= b], uniform(200, seed="a").to(dtype)]),
        torch.cat([b[a <= b], torch.ones(200, dtype=dtype)]),
    )
    b[-100:] = a[-100:] + (1 - a[-100:]) * uniform(100).to(dtype)
    b = torch.maximum(a, b.clamp(max=1))
    called = []

    def flow(a, b, z):
        called.append((a, b))
        return torch.sin(z + b[:, None])

    def velocity(b, z):
        called.append((torch.zeros_like(b), b))
        return z

    value = losses.lagrangian_difference(flow, a, b, normal(len(a), 2).to(dtype), velocity, h)
    assert bool(torch.isfinite(value).all())
    assert len(called) == 2  # both forwards in one call
    for low, high in called:
        assert bool((high >= low).all())
        assert bool((high <= 1).all())


@pytest.mark.parametrize("where", ["inside", "b = a", "b = 1"])
@both
def test_central_differences_converge_to_the_jvp(path, chart, where):
    """Value and gradient, at second order in h; at the ends the point itself moves inward by h: first order."""
    p = Problem(path, chart, steps=4)
    a, b = 0.8 * p.a, torch.minimum(0.8 * p.a + 0.1 + 0.1 * p.gamma, torch.ones_like(p.a))
    z, _ = p.couple(a)
    b = {"inside": b, "b = a": a, "b = 1": torch.ones_like(b)}[where]
    theta = torch.tensor(0.3, dtype=F64, requires_grad=True)
    flow = perturbed(p.flow, theta)

    def both(value):
        (g,) = torch.autograd.grad(value.mean(), theta)
        return value.detach(), g

    jvp, jvp_gradient = both(losses.lagrangian(flow, a, b, z, p.velocity))
    errors, gradient_errors = [], []
    for h in (4e-3, 2e-3, 1e-3):
        value, g = both(losses.lagrangian_difference(flow, a, b, z, p.velocity, h))
        errors.append(float((value - jvp).abs().mean()))
        gradient_errors.append(float((g - jvp_gradient).abs()))
    order = 2 if where == "inside" else 1
    for e in (errors, gradient_errors):
        assert abs(math.log2(e[0] / e[2]) / 2 - order) < 0.25
    assert errors[-1] < (1e-3 if where == "inside" else 0.1) * float(jvp.mean())


def test_the_shrunk_step_is_central_about_the_point_it_judges():
    """Near the ends the judged b moves; value, derivative and velocity are all taken there. Cubic flows tell: for
    Z = z + (b−a)F with F quadratic in b the difference errs by h²·(third derivative)/6 exactly."""
    a = torch.tensor([0.2, 0.2, 0.5, 0.9, 0.99], dtype=F64)
    b = torch.tensor([0.2, 1.0, 0.501, 0.95, 0.992], dtype=F64)
    step = torch.tensor([0.01, 0.01, 0.01, 0.01, 0.005], dtype=F64)  # the last has no more room than that
    h, z, seen = 0.01, normal(5, 1), {}

    def flow(a, b, z):
        return (b * b)[:, None] + 0 * z

    def velocity(b, z):
        seen["b"], seen["z"] = b, z
        return 0 * z

    value = losses.lagrangian_difference(flow, a, b, z, velocity, h)
    judged = seen["b"]
    torch.testing.assert_close(judged, torch.tensor([0.21, 0.99, 0.51, 0.95, 0.995], dtype=F64), rtol=0, atol=1e-15)
    # ∂_b[(b−a) b²] = 3b² − 2ab, and step² · 6/6 from the difference
    derivative = 3 * judged**2 - 2 * a * judged + step**2
    torch.testing.assert_close(value, derivative.square(), rtol=1e-11, atol=0)


# -- weights ---------------------------------------------------------------------------------------------------------


def test_adaptive_weight():
    """Eq. 73: w = sg 1/(‖Δ‖² + c)^p."""
    loss = torch.tensor([0.0, 0.03, 4.0], dtype=F64, requires_grad=True)
    expected = torch.tensor([10.0, 5.0, 1 / math.sqrt(4.01)], dtype=F64)
    torch.testing.assert_close(losses.adaptive_weight(loss), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(losses.adaptive_weight(loss, c=1.0, p=1.0), 1 / (1 + loss.detach()), rtol=1e-14, atol=0)
    assert not losses.adaptive_weight(loss).requires_grad
    (g,) = torch.autograd.grad((losses.adaptive_weight(loss) * loss).sum(), loss)
    torch.testing.assert_close(g, expected, rtol=1e-14, atol=0)  # the weight is a constant to the gradient


# -- the Eulerian derivative by differences --------------------------------------------------------------------------


def edges(dtype):
    """Pairs a ≤ b on a grid that has both ends, no length, and hardly any."""
    grid = torch.tensor([0.0, 1e-12, 1e-7, 1e-3, 0.3, 0.301, 0.995, 1 - 1e-7, 1.0])
    a, b = torch.cartesian_prod(grid, grid).to(dtype).unbind(1)
    return a[a <= b], b[a <= b]


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("h", [1e-3, 0.1, 0.49])
def test_eulerian_differences_stay_inside(h, dtype):
    a, b = edges(dtype)
    called = []

    def flow(a, b, z):
        called.append((a, b))
        return torch.sin(z + b[:, None])

    z = normal(len(a), 2).to(dtype)
    value = losses.eulerian(flow, a, b, z, z, h)
    assert bool(torch.isfinite(value).all())
    assert [len(x) for x, _ in called] == [len(a), 2 * len(a)]  # the prediction, and both other nodes in one call
    for low, high in called:
        assert bool(((low >= 0) & (low <= high)).all())


def test_eulerian_differences_are_exact_for_parabolas():
    """In (a, z) jointly of degree two: rounding is all that is left, at both ends of [0, b] too."""
    a, b = edges(F64)
    z, c = normal(len(a), 2), normal(len(a), 2, seed="c")

    def flow(a, b, z):
        return z.square() - 3 * a[:, None] * z + 2 * (a * a - a * b)[:, None]

    exact = 2 * z * c - 3 * z - 3 * a[:, None] * c + (4 * a - 2 * b)[:, None]
    goal = c + (b - a)[:, None] * exact
    value = losses.eulerian(flow, a, b, z, c, 0.1)
    # 1e-16/step on numbers near 10; the step is .1, or b/3 where b − a, which multiplies the error, is at most 3 of it
    torch.testing.assert_close(value, (flow(a, b, z) - goal).square().sum(1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("where", ["inside", "a = 0", "a near b"])
@both
def test_eulerian_differences_converge_to_the_jvp(path, chart, where):
    """Value and gradient at second order in h, at the ends too; for a self target or a teacher, and any chart."""
    p = Problem(path, chart, steps=4)
    a, b = 0.8 * p.a.clamp(0.05), torch.minimum(0.8 * p.a.clamp(0.05) + 0.1 + 0.1 * p.gamma, torch.ones_like(p.a))
    a = {"inside": a, "a = 0": torch.zeros_like(a), "a near b": b - 2e-4}[where]
    z, _ = p.couple(a)
    theta = torch.tensor(0.3, dtype=F64, requires_grad=True)
    flow, c = perturbed(p.flow, theta), p.velocity(a, z)

    def both(h=None):
        value = losses.eulerian(flow, a, b, z, c, h)
        (g,) = torch.autograd.grad(value.mean(), theta)
        return value.detach(), g

    value, gradient = both()
    errors = [((v - value).abs().mean(), (g - gradient).abs()) for v, g in map(both, (2e-3, 1e-3, 5e-4))]
    for first, last in zip(errors[0], errors[2], strict=True):
        assert abs(math.log2(first / last) / 2 - 2) < 0.25
    assert errors[2][0] < 1e-3 * value.mean()
