"""−λ‖y − A(x)‖²/(2σ²): by hand, against LinearGaussian, with an observation a row, and as observed."""

import math

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, normal
from metaflowmaps.random import stream
from metaflowmaps.rewards import Blur, Downsample, InverseProblem, LinearGaussian, Mask

EVENT = (2, 4, 6)
MATRIX = normal(5, math.prod(EVENT), seed="A")
LINEAR = {
    "mask": Mask(normal(*EVENT, seed="mask") > 0),
    "blur": Blur(0.8),
    "downsample": Downsample(2),
    "matrix": lambda x: x.flatten(1) @ MATRIX.to(x).T,
}
X = normal(3, *EVENT)


def test_by_hand():
    """A(x) = (x_1 x_2, sin x_1), y = (1, 0), σ = 0.5, λ = 3, in plain Python."""

    def bend(x):
        return torch.stack([x[:, 0] * x[:, 1], x[:, 0].sin()], 1)

    x = normal(4, 2)
    expected = [-3.0 * ((1 - a * b) ** 2 + math.sin(a) ** 2) / (2 * 0.5**2) for a, b in x.tolist()]
    value = InverseProblem(bend, [1.0, 0.0], 0.5, strength=3.0)(x)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=F64), rtol=1e-14, atol=0)  # a few roundings


def test_an_operator_with_one_number_a_sample():
    x = normal(4, 2)
    value = InverseProblem(lambda x: x[:, 0], 0.7, 1.0)(x)
    torch.testing.assert_close(value, -0.5 * (0.7 - x[:, 0]) ** 2, rtol=1e-14, atol=0)  # a few roundings


def test_an_operator_in_another_precision():
    value = InverseProblem(lambda x: LINEAR["matrix"](x.float()), [1.0] * 5, 0.7)(X)
    assert value.dtype == F64
    # float32 sums of 48 products of order 1, in five residuals of order 7
    torch.testing.assert_close(value, InverseProblem(LINEAR["matrix"], [1.0] * 5, 0.7)(X), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_operators_give_the_analytic_reward(name):
    operator = LINEAR[name]
    y = operator(normal(1, *EVENT, seed="truth"))[0]
    matrix = operator(torch.eye(math.prod(EVENT), dtype=F64).reshape(-1, *EVENT)).flatten(1).T
    analytic = LinearGaussian(matrix, y.flatten(), 0.3, strength=1.7)
    # sums of at most 48 squares, of residuals of order 1 rounded at 1e-15: relative to their sum 1e-13 is ample
    torch.testing.assert_close(InverseProblem(operator, y, 0.3, 1.7)(X), analytic(X.flatten(1)), rtol=1e-13, atol=0)
    assert InverseProblem(operator, y, 0.3, 1.7).precision == analytic.precision


def test_an_observation_a_row():
    operator = LINEAR["downsample"]
    y = operator(normal(3, *EVENT, seed="truth"))
    together = InverseProblem(operator, y, 0.3)(X)
    for i in range(3):
        assert together[i] == InverseProblem(operator, y[i], 0.3)(X[i : i + 1])  # the same operations on the same row


def test_the_truth_is_a_maximum():
    operator = LINEAR["blur"]
    truth = normal(1, *EVENT, seed="truth").requires_grad_()
    reward = InverseProblem(operator, operator(truth.detach())[0], 0.3)
    value = reward(truth)
    (gradient,) = torch.autograd.grad(value.sum(), truth)
    assert value.item() == 0
    assert not gradient.any()


# -- observing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_observe_adds_the_generators_noise(dtype):
    operator, x = LINEAR["downsample"], X.to(dtype)
    state = torch.random.get_rng_state()
    problem = InverseProblem.observe(operator, x, 0.2, stream(0, "noise"), strength=1.4)
    assert torch.equal(state, torch.random.get_rng_state())
    noise = torch.randn((3, 2, 2, 3), generator=stream(0, "noise"), dtype=dtype)
    # float64 holds what was added in dtype: one product and one sum, which may be fused
    torch.testing.assert_close(problem.y.to(dtype), operator(x) + 0.2 * noise, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert (problem.noise_std, problem.strength) == (0.2, 1.4)
    # what is left at the truth is the noise; residuals ~0.2 of numbers ~1, cancelled in dtype
    left = -0.5 * 1.4 * noise.square().flatten(1).sum(1)
    torch.testing.assert_close(problem(x), left, rtol=40 * torch.finfo(dtype).eps, atol=0)


def test_one_picture_observed_serves_any_batch():
    truth = X[:1].clone().requires_grad_()
    problem = InverseProblem.observe(LINEAR["blur"], truth, 0.2, stream(0))
    assert tuple(problem.y.shape) == EVENT
    assert not problem.y.requires_grad
    assert problem(normal(7, *EVENT)).shape == (7,)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_observations_that_do_not_fit():
    y = LINEAR["downsample"](X)
    with pytest.raises(mfm.InputError, match=r"y must have shape \(2, 2, 3\).*or \(5, 2, 2, 3\).*got \(3, 2, 2, 3\)$"):
        InverseProblem(LINEAR["downsample"], y, 1.0)(normal(5, *EVENT))
    with pytest.raises(mfm.InputError, match=r"y\[0\] is one observation for the whole batch"):
        InverseProblem(LINEAR["downsample"], y[:1], 1.0)(X)
    with pytest.raises(mfm.InputError, match=r"got \(\)$"):  # a number is not broadcast to a picture
        InverseProblem(LINEAR["downsample"], 0.5, 1.0)(X)
    with pytest.raises(mfm.InputError, match=r"got \(5, 4, 6\)$"):  # nor five pictures to five channels
        InverseProblem(lambda x: x, normal(5, 4, 6), 1.0)(normal(5, 5, 4, 6)[:4, :1])


@pytest.mark.parametrize("y", [[], [math.nan], [1.0, math.inf]])
def test_observations_that_are_not_numbers(y):
    with pytest.raises(mfm.InputError, match="y must hold finite numbers, and at least one"):
        InverseProblem(lambda x: x, y, 1.0)


@pytest.mark.parametrize(
    "operator", [lambda x: x[:2], lambda x: x.sum(), lambda x: x.tolist(), lambda x: x > 0, lambda x: None]
)
def test_operators_without_a_row_a_sample(operator):
    for use in (lambda: InverseProblem(operator, [1.0, 2.0], 1.0)(X), lambda: InverseProblem.observe(operator, X, 1.0)):
        with pytest.raises(mfm.InputError, match=r"one row a sample, shape \(3, …\), got"):
            use()


def test_other_refusals():
    with pytest.raises(mfm.InputError, match=r"such as mfm\.rewards\.Blur\(2\.0\), got 3"):
        InverseProblem(3, [1.0], 1.0)
    with pytest.raises(mfm.InputError, match="noise_std must be a positive number"):
        InverseProblem(Blur(1.0), [1.0], 0.0)
    with pytest.raises(mfm.InputError, match="noise_std must be a positive number"):
        InverseProblem.observe(Blur(1.0), X, -0.1)
    with pytest.raises(mfm.InputError, match="add a batch dimension"):
        InverseProblem.observe(lambda x: x, X[0, 0, 0], 0.1)


def test_it_prints_what_it_is():
    problem = InverseProblem(Blur(1.5), torch.zeros(1, 28, 28), 0.1)
    assert repr(problem) == (
        "InverseProblem(Blur(std=1.5, kernel_size=11), y of shape (1, 28, 28), noise_std=0.1, strength=1)"
    )


def test_copies_of_the_batch_meet_their_own_observations():
    # k draws a state arrive as k copies of the batch: row i of each copy belongs to y[i]
    x, y = normal(3, 4, seed="x"), normal(3, 4, seed="y")
    reward = mfm.rewards.InverseProblem(lambda v: 2 * v, y, 0.5)
    copies = torch.cat([x, x + 1])
    torch.testing.assert_close(reward(copies), torch.cat([reward(x), reward(x + 1)]), rtol=0, atol=0)
