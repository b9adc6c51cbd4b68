"""Sums and multiples of rewards: linear in their parts, honest about gradients, quiet where a weight is 0."""

import math

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, normal
from metaflowmaps.rewards import BlackBox, LinearGaussian, Tempered, WeightedSum, is_differentiable

X = normal(4, 2)
QUADRATIC = LinearGaussian([[1.0, 0.5]], 0.3, 0.7)


def plain(x):
    return x[:, 0].sin()


def conditional(x, cond=None):
    return x[:, 1] if cond is None else x[:, 1] * cond["by"]


def forbidden(x):
    return torch.full_like(x[:, 0], -torch.inf)


def counted(seen):
    def reward(x):
        seen.append(len(x))
        return x[:, 0]

    return reward


def gradient(reward, cond=None):
    x = X.clone().requires_grad_()
    (out,) = torch.autograd.grad(reward(x, cond).sum(), x)
    return out


# -- sum -------------------------------------------------------------------------------------------------------------


def test_sum_of_its_parts():
    cond = {"by": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)}
    reward = WeightedSum([(2.0, QUADRATIC), (-0.5, plain), (1.5, conditional)], strength=0.4)
    parts = [QUADRATIC(X), X[:, 0].sin(), X[:, 1] * cond["by"]]
    for got, expected in zip(reward.parts(X, cond), parts, strict=True):
        assert torch.equal(got, expected)
    expected = 0.4 * (2 * parts[0] - 0.5 * parts[1] + 1.5 * parts[2])
    # three products and two sums of numbers of order 1 to 20
    torch.testing.assert_close(reward(X, cond), expected, rtol=0, atol=1e-14)


def test_gradient_of_a_sum():
    slopes = torch.stack([X[:, 0].cos(), torch.zeros(4, dtype=F64)], 1)  # ∇ sin x_1
    along = torch.tensor([1.0, 0.5], dtype=F64)
    pull = (0.3 - X @ along)[:, None] * along / 0.7**2
    # as in the values
    torch.testing.assert_close(
        gradient(WeightedSum([(2.0, QUADRATIC), (-0.5, plain)])), 2 * pull - 0.5 * slopes, rtol=0, atol=1e-13
    )


def test_parts_of_weight_zero_are_not_called_but_can_be_seen():
    seen = []
    reward = WeightedSum([(1.0, plain), (0.0, counted(seen)), (0.0, forbidden)])
    assert torch.equal(reward(X), plain(X))
    assert seen == []
    parts = reward.parts(X)
    assert seen == [4]
    assert torch.equal(parts[1], X[:, 0])
    assert bool((parts[2] == -torch.inf).all())


def test_what_is_forbidden_by_one_part_is_forbidden():
    assert bool((WeightedSum([(1.0, plain), (0.1, forbidden)])(X) == -torch.inf).all())


def test_differentiable_if_all_that_count_are():
    box = BlackBox(lambda x: x[:, 0].tolist())
    assert WeightedSum([(1.0, plain), (2.0, QUADRATIC)]).differentiable
    assert WeightedSum([(1.0, plain), (0.0, box)]).differentiable
    mixed = WeightedSum([(1.0, plain), (0.5, box)])
    assert not mixed.differentiable
    x = X.clone().requires_grad_()
    assert not mixed(x).requires_grad  # rather than the gradient of half of it
    assert torch.equal(mixed(x), plain(X) + 0.5 * X[:, 0])
    assert WeightedSum([(1.0, box)], strength=0.0).differentiable
    assert torch.equal(gradient(WeightedSum([(1.0, plain), (0.0, box)])), gradient(lambda x, _: plain(x)))


def test_no_weight_at_all_is_zero_with_a_gradient():
    for reward in (WeightedSum([(0.0, forbidden)]), WeightedSum([(1.0, forbidden)], strength=0.0)):
        assert not reward(X).any()
        assert not gradient(reward).any()


def test_a_part_that_lost_its_gradient_is_not_given_one():
    """So that what asks for a gradient can refuse: zeros would go unnoticed."""
    x = X.clone().requires_grad_()
    assert not WeightedSum([(1.0, lambda x: plain(x.detach()))])(x).requires_grad


def test_parts_may_come_from_a_generator():
    assert torch.equal(WeightedSum((w, plain) for w in (1.0, 2.0))(X), plain(X) + 2 * plain(X))


def test_a_part_that_fails_is_named():
    def pictures(x):
        return x

    with pytest.raises(mfm.InputError, match=r"part 1, pictures: the reward must return one number a sample"):
        WeightedSum([(1.0, plain), (1.0, pictures)])(X)
    # (B, 1) and (B,) would add up to (B, B)
    with pytest.raises(mfm.InputError, match=r"part 0, <lambda>: .*shape \(4,\), got \(4, 1\)"):
        WeightedSum([(1.0, lambda x: x[:, :1]), (1.0, plain)])(X)
    with pytest.raises(mfm.InputError, match=r"part 0, BlackBox.*: a BlackBox function must return one number a row"):
        WeightedSum([(1.0, BlackBox(lambda x: [1.0]))]).parts(X)


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [plain],
        plain,
        3,
        None,
        [(1.0, plain, 2)],
        [(plain, 1.0)],
        [(1.0, 2.0)],
        [(plain, plain)],
        [("ab", 3)],
        {1.0: plain},
    ],
)
def test_what_is_not_pairs(parts):
    with pytest.raises(mfm.InputError, match=r"pairs \(weight, reward\), as in \[\(1\.0, first\)"):
        WeightedSum(parts)


@pytest.mark.parametrize("weight", [math.nan, math.inf, [1.0, 2.0]])
def test_weights_that_are_no_number(weight):
    with pytest.raises(mfm.InputError, match="a weight must be one finite number"):
        WeightedSum([(weight, plain)])


# -- tempered --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.3, 1.0, 4.0])
def test_tempered_multiplies(strength):
    reward = Tempered(QUADRATIC, strength)
    assert torch.equal(reward(X), strength * QUADRATIC(X))
    # the same product, taken after the derivative instead of before
    torch.testing.assert_close(gradient(reward), strength * gradient(QUADRATIC), rtol=1e-14, atol=0)
    cond = {"by": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)}
    assert torch.equal(Tempered(conditional, strength)(X, cond), strength * (X[:, 1] * cond["by"]))


def test_tempered_to_nothing():
    """Zeros with a gradient of zero, even where the reward is −inf or has no gradient; it is not called."""
    seen = []
    for part in (forbidden, counted(seen), BlackBox(lambda x: seen.append(1))):
        reward = Tempered(part, 0.0)
        assert reward.differentiable
        assert not reward(X).any()
        assert not gradient(reward).any()
    assert seen == []


def test_tempered_is_as_differentiable_as_its_reward():
    def declared(x):
        return x[:, 0]

    declared.differentiable = False
    x = X.clone().requires_grad_()
    assert is_differentiable(Tempered(plain, 2.0))
    assert Tempered(plain, 2.0)(x).requires_grad
    for part in (declared, BlackBox(lambda x: x[:, 0])):
        assert not is_differentiable(Tempered(part, 2.0))
        assert not Tempered(part, 2.0)(x).requires_grad


def test_tempered_refuses():
    with pytest.raises(mfm.InputError, match="a reward is a function of x"):
        Tempered(3.0, 1.0)
    with pytest.raises(mfm.InputError, match="strength must be a finite number >= 0"):
        Tempered(plain, -1.0)
    with pytest.raises(mfm.InputError, match="one number a sample"):
        Tempered(lambda x: x, 1.0)(X)


def test_they_print_what_they_are():
    box = BlackBox(plain)
    assert repr(WeightedSum([(1, plain), (-0.5, Tempered(box, 2))])) == (
        "WeightedSum([(1, plain), (-0.5, Tempered(BlackBox(plain, strength=1), strength=2))], strength=1)"
    )
