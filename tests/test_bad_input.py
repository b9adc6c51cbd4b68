"""Whatever is thrown at a public constructor or taken for a time, it is either usable or refused in one line.

Property-based: hypothesis makes up the values, derandomised, so that a run is a function of the code.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import metaflowmaps as mfm
from conftest import F64, PATHS, normal
from metaflowmaps.networks import MLPConfig, NetworkConfig
from metaflowmaps.random import stream
from metaflowmaps.work.choices import build

tried = settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)

NUMBERS = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1.0, 0.5, 0, 1, 2, -1, True]),
    st.floats(1e-3, 1e3),
    st.integers(-3, 5),
)
RAGGED = st.sampled_from([[], [[]], [[1.0], [1.0, 2.0]], [[], [1.0]], None, "one"])


def lists(depth):
    inner = NUMBERS if depth == 1 else lists(depth - 1)
    return st.lists(inner, max_size=3)


@st.composite
def tensors(draw, max_dims=4):
    shape = draw(st.lists(st.integers(0, 3), max_size=max_dims))
    dtype = draw(st.sampled_from([torch.float32, F64, torch.int64, torch.bool, torch.float16]))
    size = math.prod(shape)
    values = draw(st.lists(st.floats(-3, 3), min_size=size, max_size=size))
    out = torch.tensor(values, dtype=F64).reshape(shape).to(dtype)
    if size and dtype.is_floating_point and draw(st.booleans()):
        out.view(-1)[draw(st.integers(0, size - 1))] = draw(st.sampled_from([math.nan, math.inf, 0.0, -1.0]))
    return out


@st.composite
def matrices(draw, stack=False):
    """Square, often symmetric, now and then positive definite."""
    k, d = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = k * d * d
    m = torch.tensor(draw(st.lists(st.floats(-2, 2), min_size=size, max_size=size)), dtype=F64).reshape(k, d, d)
    m = draw(st.sampled_from([m, m + m.mT, m @ m.mT, m @ m.mT + 0.1 * torch.eye(d, dtype=F64)]))
    return m if stack else m[0]


ANYTHING = st.one_of(NUMBERS, lists(1), lists(2), lists(3), tensors(), matrices(), matrices(stack=True), RAGGED)
MEANS = st.one_of(
    ANYTHING, st.lists(st.lists(st.floats(-3, 3), min_size=2, max_size=2), min_size=1, max_size=3), tensors(2)
)


def or_refused(make):
    """The object, or None where it was refused properly. Any other exception fails the test."""
    try:
        return make()
    except mfm.InputError as error:
        message = str(error)
        assert message
        assert "\n" not in message, f"more than one line: {message!r}"
        return None


def finite(x):
    return bool(torch.isfinite(x).all())


# -- laws and rewards ------------------------------------------------------------------------------------------------


@tried
@given(MEANS, st.one_of(ANYTHING, st.floats(0.1, 2)), st.one_of(st.none(), ANYTHING))
@example([[0.0, 0.0]], 1.0, [1.0])
@example([[0.0, 0.0], [1.0, 1.0]], [0.5, 1], [0.25, 0.75])
@example(torch.zeros(1, 2, dtype=torch.int64), 1, None)
@example([[0, 0]], torch.eye(2, dtype=torch.int64), None)
@example([[0.0], [1.0, 2.0]], 1.0, None)
@example([[0.0]], None, None)
@example([[0.0], [1.0]], 1.0, [0.0, 1.0])
@example([[0.0], [1.0]], 1.0, [0.0, 0.0])
def test_mixtures(means, covariances, weights):
    law = or_refused(lambda: mfm.GaussianMixture(means, covariances, weights))
    if law is None:
        return
    path, x = PATHS["linear"], normal(2, law.dim)
    assert law.means.ndim == 2
    torch.testing.assert_close(law.weights.sum(), torch.ones((), dtype=F64))
    assert float(torch.linalg.eigvalsh(law.covariances).min()) > 0
    for value in (law.sample(3, stream(0)), law.log_prob(x), law.drift(path, 0.5, x), law.score(path, 0.5, x)):
        assert finite(value)
    assert finite(law.posterior(path, 0.5, x).draw(2, stream(0)))


@pytest.mark.parametrize("variance", [1e-60, 1e60])
def test_variances_that_the_laws_dtype_cannot_hold(variance):
    """Means typed as numbers make a float32 law; a variance that is 0 or infinite there must not turn into NaN."""
    law = or_refused(lambda: mfm.GaussianMixture([[0.0, 0.0]], variance))
    if law is not None:
        assert finite(law.sample(3, stream(0)))
        assert not torch.isnan(law.log_prob(law.sample(3, stream(0)))).any()


@tried
@given(ANYTHING, ANYTHING, st.one_of(NUMBERS, RAGGED), st.one_of(NUMBERS, RAGGED))
@example([1.0, 2.0], 0.5, 0.2, 1.0)
@example(torch.eye(2), torch.zeros(2), 1, 0)
@example(torch.zeros(0, 2), torch.zeros(0), 1.0, 1.0)
@example(torch.zeros(2, 0), torch.zeros(2), 1.0, 1.0)
def test_rewards(matrix, y, noise_std, strength):
    reward = or_refused(lambda: mfm.rewards.LinearGaussian(matrix, y, noise_std, strength))
    if reward is None:
        return
    p, d = reward.A.shape
    assert min(p, d) > 0
    value = reward(normal(3, d))
    assert value.shape == (3,)
    assert finite(value)
    assert bool((value <= 0).all())


# -- maps and networks -----------------------------------------------------------------------------------------------

SIZES = st.one_of(st.integers(-2, 6), st.sampled_from([2.0, 1.5, math.nan, math.inf, None, "two", [2]]))


@tried
@given(SIZES, SIZES, SIZES, st.sampled_from(["silu", "gelu", "tanh", "sillu", "", None, 3]), SIZES)
@example(2, 4, 1, "silu", 0)
@example(2, 4, 1, "relu", 0)
def test_networks(dim, width, depth, activation, num_classes):
    options = {"width": width, "depth": depth, "activation": activation, "num_classes": num_classes}
    with torch.random.fork_rng():
        net = or_refused(lambda: build(NetworkConfig, "mlp", options).network((dim,)))
    if net is not None:
        t = torch.full((3,), 0.5)
        assert finite(net(torch.zeros(3, dim), t, t, torch.zeros(3, dim), t))


@tried
@given(
    st.one_of(st.sampled_from(["plain", "gaussian", "residual", "Gaussian", "", None, 3])),
    st.one_of(NUMBERS, ANYTHING),
    st.one_of(NUMBERS, ANYTHING),
)
@example("gaussian", 0.0, 1.0)
@example("gaussian", [0.5, 1.0], 1)
@example("gaussian", torch.zeros(2, 1), 1.0)
@example("gaussian", torch.zeros(3), 1.0)
def test_maps(parameterization, data_mean, data_std):
    with torch.random.fork_rng():
        net = MLPConfig(width=4, depth=1).network((2,))
    model = or_refused(
        lambda: mfm.MetaFlowMap(net, mfm.LinearPath(), parameterization, data_mean=data_mean, data_std=data_std)
    )
    if model is not None:
        x = normal(2, 2).float()
        for t in (0.0, 0.5, 1.0):
            draws = model.draw(t, x, 2, generator=stream(0))
            assert draws.shape == (2, 2, 2)
            assert finite(draws)
        assert finite(model.drift(0.5, x))


COUNTS = st.one_of(st.integers(-3, 4), st.sampled_from([1.5, math.nan, None, "two"]))


@pytest.mark.parametrize("kind", ["map", "glass", "exact", "tweedie"])
@settings(tried, max_examples=40)
@given(steps=COUNTS, num_draws=COUNTS)
@example(steps=2, num_draws=2)
def test_posteriors(kind, steps, num_draws):
    path, law = PATHS["linear"], mfm.GaussianMixture(torch.zeros(1, 2), 1.0)
    with torch.random.fork_rng():
        model = mfm.MetaFlowMap(MLPConfig(width=4, depth=1).network((2,)), path)

    def drift(t, x):
        return law.drift(path, t, x)

    posterior = or_refused(
        {
            "map": lambda: mfm.MapPosterior(model, steps),
            "glass": lambda: mfm.GlassPosterior(path, drift, steps),
            "exact": lambda: mfm.ExactPosterior(path, law),
            "tweedie": lambda: mfm.TweediePosterior(path, drift),
        }[kind]
    )
    if posterior is not None:
        draws = or_refused(lambda: posterior.draw(0.5, torch.zeros(3, 2), num_draws, stream(0)))
        assert draws is None or (draws.shape == (num_draws, 3, 2) and finite(draws))


@pytest.mark.parametrize(
    "cond",
    [
        {"label": torch.tensor([0, 4, 1])},  # the null class is 3, the last
        {"label": torch.tensor([0, -1, 1])},
        {"label": torch.tensor([0, 1])},
        {"label": torch.tensor([0.0, 1.0, 2.0])},
        {"label": 1},
        {"labels": torch.tensor([0, 1, 2])},
    ],
    ids=["too large", "negative", "wrong batch", "not int64", "not a tensor", "unknown key"],
)
def test_conditions(cond):
    with torch.random.fork_rng():
        model = mfm.MetaFlowMap(MLPConfig(width=4, depth=1, num_classes=3).network((2,)), mfm.LinearPath())
    x = torch.zeros(3, 2)
    for call in (lambda: model(0.0, 1.0, x, 0.5, x, cond), lambda: model.draw(0.5, x, 2, cond=cond)):
        with pytest.raises(mfm.InputError):
            call()


# -- times -----------------------------------------------------------------------------------------------------------

TIMES = st.one_of(
    NUMBERS,
    st.floats(-0.5, 1.5),
    tensors(2),
    st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3).map(torch.tensor),
    st.sampled_from([None, "0.5", [0.1, 0.2, 0.3], torch.tensor(0.5), torch.tensor([0.1, math.nan, 0.2])]),
)


def inside(t):
    t = torch.as_tensor(t, dtype=F64)
    return bool(((t >= 0) & (t <= 1)).all())


@settings(tried, max_examples=100)
@given(TIMES, TIMES, TIMES)
@example(0.2, 0.7, 0.5)
@example(torch.tensor([0.1, 0.2]), torch.tensor([0.2, 0.3, 0.4]), 0.5)
@example(0.5, 0.5, 1.0)
def test_times(s, u, t):
    """On every entry that takes times: a finite answer, and then the times were good ones; or one line."""
    with torch.random.fork_rng():
        model = mfm.MetaFlowMap(MLPConfig(width=4, depth=1).network((2,)), mfm.LinearPath())
    law, path, x = mfm.GaussianMixture(torch.zeros(1, 2), 1.0), PATHS["linear"], torch.ones(3, 2)
    for call, times in (
        (lambda: model(s, u, x, t, x), (s, u, t)),
        (lambda: model.velocity(s, u, x, t, x), (s, u, t)),
        (lambda: model.drift(t, x), (t,)),
        (lambda: model.denoise(t, x), (t,)),
        (lambda: model.draw(t, x, 2, generator=stream(0)), (t,)),
        (lambda: model.draw(t, x, 2, steps=2, generator=stream(0)), (t,)),
        (lambda: path.interpolate(x, x, t), (t,)),
        (lambda: law.drift(path, t, x), (t,)),
        (lambda: law.posterior(path, t, x).mean, (t,)),
        (lambda: mfm.glass_drift(path, lambda t, x: law.drift(path, t, x), s, x, t, x), (s, t)),
        (lambda: mfm.TweediePosterior(path, lambda t, x: law.drift(path, t, x)).draw(t, x, 1), (t,)),
    ):
        answer = or_refused(call)
        if answer is not None:
            assert finite(answer)
            assert all(inside(time) for time in times)
