"""Two-time networks in every convention, made of one Gaussian law whose flow map is known in closed form."""

import math

import pytest
import torch
from torch import nn

import metaflowmaps as mfm
from metaflowmaps.errors import InputError
from metaflowmaps.interop.flow_maps import (
    AnyFlow,
    FlowMapConvention,
    MeanFlow,
    SanaSprint,
    Shortcut,
    StackedTimes,
    TrigFlow,
)
from metaflowmaps.random import stream

F64 = torch.float64
MEAN, STD = torch.tensor([0.5, -1.0], dtype=F64), 0.6


def root(a, b):
    """The standard deviation of a ε + b x_1."""
    return (a**2 + b**2 * STD**2).sqrt()


def jumped(y, here, there):
    """From weights (a, b) to others along the flow of N(MEAN, STD²): what is standardised stays."""
    (a, b), (c, d) = ([w[:, None] for w in pair] for pair in (here, there))
    return d * MEAN + root(c, d) / root(a, b) * (y - b * MEAN)


def linear(t):
    """Weights of noise and data, noise at t = 1."""
    return t, 1 - t


def average(z, t, r):
    """(z_t − z_r)/(t − r), its limit where they meet: the velocity dz/dt."""
    near = torch.where(t - r < 1e-6, (t - 1e-5).clamp_min(0), r)
    return (z - jumped(z, linear(t), linear(near))) / (t - near)[:, None].clamp_min(1e-9)


def angles(tau):
    return tau.sin(), tau.cos()


def trig(y, here, there):
    """F with y' = cos(Δ) y − sin(Δ) F; its limit dy/dτ by a central difference."""
    same = here - there < 1e-6
    turn = torch.where(same, torch.full_like(here, 1e-4), here - there)
    back = (turn.cos()[:, None] * y - jumped(y, angles(here), angles(here - turn))) / turn.sin()[:, None]
    ahead = (jumped(y, angles(here), angles(here + turn)) - turn.cos()[:, None] * y) / turn.sin()[:, None]
    return torch.where(same[:, None], (back + ahead) / 2, back)


def shortcut(x, t, d):
    small = torch.where(d < 1e-6, torch.full_like(d, 1e-6), d)
    return (jumped(x, (1 - t, t), (1 - t - small, t + small)) - x) / small[:, None]


NETWORKS = {
    "mean-flow": (MeanFlow(), lambda z, r, t: average(z, t, r)),
    "mean-flow, t and h": (MeanFlow(order="th"), lambda z, t, h: average(z, t, t - h)),
    "mean-flow, scaled": (MeanFlow(order="tr", scale=1000), lambda z, t, r: average(z, t / 1000, r / 1000)),
    "any-flow": (AnyFlow(), lambda hidden_states, r_timestep, timestep: average(
        hidden_states, timestep / 1000, r_timestep / 1000)),
    "stacked": (StackedTimes(), lambda z, timestep: average(z, timestep[:, 0], timestep[:, 1])),
    "stacked, end first": (StackedTimes(end_first=True, argument="times"), lambda z, times: average(
        z, times[:, 1], times[:, 0])),
    "shortcut": (Shortcut(), shortcut),
    "trig-flow": (TrigFlow(), trig),
}  # fmt: skip


@pytest.fixture(params=NETWORKS)
def model(request):
    convention, network = NETWORKS[request.param]
    return mfm.wrap(network, flow_map=convention, event_shape=(2,))


def states(t, n=5):
    """On the linear path of ours, noise at 0."""
    g = stream(0, "states")
    x_1 = MEAN + STD * torch.randn(n, 2, dtype=F64, generator=g)
    return (1 - t) * torch.randn(n, 2, dtype=F64, generator=g) + t * x_1


@pytest.mark.parametrize(("s", "u"), [(0.0, 1.0), (0.3, 0.8), (0.5, 1.0)])
def test_jumps_are_the_flow_map(model, s, u):
    x, one = states(s), torch.ones(5, dtype=F64)
    exact = jumped(x, ((1 - s) * one, s * one), ((1 - u) * one, u * one))
    torch.testing.assert_close(model.jump(s, u, x), exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.jump(s * one, u * one, x), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [0.0, 0.4, 0.9])
def test_drift_is_the_diagonal(model, t):
    """b = E[x_1 − ε | x]; the networks here take their limits by differences of 1e-4 or less."""
    variance = (1 - t) ** 2 + t**2 * STD**2
    x = states(t)
    exact = MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)
    torch.testing.assert_close(model.drift(t, x), exact, rtol=1e-3, atol=1e-4)


def test_generates_in_any_number_of_jumps(model):
    one, four = (model.generate(6, steps=k, generator=stream(1)) for k in (1, 4))
    torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-5)  # of exact maps; states here are float32


def test_draws_and_steers(model):
    model = model.double()
    x_t = states(0.5, 1)
    draws = model.draw(0.5, x_t, 400, generator=stream(2))
    variance = STD**2 * 0.25 / (0.25 + 0.25 * STD**2)
    gain = 0.5 * STD**2 / (0.25 + 0.25 * STD**2)
    mean = MEAN + gain * (x_t - 0.5 * MEAN)
    # 5 standard errors of 400 picks, half as much again for candidates picked twice
    assert float((draws.mean(0) - mean).abs().max()) < 5 * 1.5 * math.sqrt(variance / 400)
    with torch.no_grad():
        result = mfm.steer(model, lambda x: x[:, 0], 4, mfm.MFMGF(2), mfm.ODE(steps=3), seed=0)
    # a step is the drift, and 2 draws of 3 drifts and a jump each, of each sample
    assert result.cost["forwards"] == 4 * 3 * (1 + 2 * 4)


def test_finest_level_of_a_shortcut_is_its_drift():
    levels = []

    def network(x, t, level):
        levels.append(float(level[0]))
        return shortcut(x, t, 0.5**level)

    model = mfm.wrap(network, flow_map=Shortcut(finest=128), event_shape=(2,))
    model.drift(0.5, states(0.5))
    model.jump(0.5, 0.75, states(0.5))
    model.jump(0.0, 1.0, states(0.0))
    assert levels == [7, 2, 0]
    with pytest.raises(InputError, match="powers of a half"):
        model.jump(0.0, 0.3, states(0.0))


def test_sana_sprint_is_its_pipelines_step():
    """Diffusers' arithmetic written out: angles, the answer turned into F, and the consistency jump."""
    tau, guidance = torch.tensor([1.2, 0.7], dtype=F64), torch.tensor([0.45], dtype=F64)
    seen = []

    def network(hidden_states, timestep, guidance):
        seen.append((timestep, guidance))
        return hidden_states.sin() + timestep[:, None] * guidance[:, None]

    x = torch.randn(2, 2, dtype=F64, generator=stream(3))  # over sigma_data
    t = (tau.sin() / (tau.cos() + tau.sin()))[:, None]
    length = (t**2 + (1 - t) ** 2).sqrt()
    y = x * length
    v = network(y, t[:, 0], guidance.expand(2))
    turned = ((1 - 2 * t) * y + (1 - 2 * t + 2 * t**2) * v) / length
    data = tau.cos()[:, None] * x - tau.sin()[:, None] * turned
    model = mfm.wrap(network, flow_map=SanaSprint(), event_shape=(2,), guidance=guidance)
    torch.testing.assert_close(model.jump(1 - t[:, 0], 1.0, y), data, rtol=1e-12, atol=1e-12)
    assert seen[1][1].shape == (2,)
    assert model.generate(3, steps=2, generator=stream(0)).shape == (3, 2)
    with pytest.raises(InputError, match="no drift"):
        model.drift(0.5, y)
    with pytest.raises(InputError, match="u must be 1"):
        model.jump(0.2, 0.5, y)


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.arange(4.0)[:, None])

    def forward(self, x, r, t, y):
        return self.shift[y] + 0 * x


def test_the_arguments_tell_and_labels_go_along():
    model = mfm.wrap(Labelled(), flow_map=True, event_shape=(2,), num_classes=3)
    assert model.convention == MeanFlow()
    x = torch.zeros(2, 2)
    cond = {"label": torch.tensor([1, 2])}
    assert torch.equal(model.jump(0.0, 0.5, x, cond)[:, 0], torch.tensor([-0.5, -1.0]))
    assert torch.equal(model.jump(0.0, 0.5, x)[:, 0], torch.tensor([-1.5, -1.5]))  # the null class
    with pytest.raises(InputError, match="trained with"):
        model.jump(0.0, 0.5, x, {**cond, "guidance": torch.full((2,), 2.0)})
    with pytest.raises(InputError, match="whole samples"):
        model.jump(0.0, 0.5, x, {"mask": torch.ones(2, 2)})


def test_a_convention_of_ones_own():
    class Backwards(MeanFlow):
        name = "backwards"

        def average(self, network, y, t, r):
            return -network(y, r, t)

    model = mfm.wrap(lambda z, r, t: -average(z, t, r), flow_map=Backwards(), event_shape=(2,))
    one, x = torch.ones(5, dtype=F64), states(0.2)
    torch.testing.assert_close(model.jump(0.2, 1.0, x), jumped(x, (0.8 * one, 0.2 * one), (0 * one, one)))
    assert isinstance(model.convention, FlowMapConvention)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="do not tell"):
        mfm.wrap(lambda a, b, c: a, flow_map=True, event_shape=(2,))
    with pytest.raises(InputError, match="leave out predicts"):
        mfm.wrap(lambda z, r, t: z, predicts="noise", flow_map=True, event_shape=(2,))
    with pytest.raises(InputError, match="mean-flow"):
        mfm.wrap(lambda z, r, t: z, flow_map="meanflow", event_shape=(2,))
    with pytest.raises(InputError, match="power of 2"):
        Shortcut(finest=100)
    with pytest.raises(InputError, match="s <= u"):
        mfm.wrap(lambda z, r, t: z, flow_map=True, event_shape=(2,)).jump(0.7, 0.3, torch.zeros(1, 2))
