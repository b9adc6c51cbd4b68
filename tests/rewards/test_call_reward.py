"""Where cond goes: functions of one argument, of two, with options of their own, modules and builtins."""

import functools

import pytest
import torch
from torch import nn

from conftest import normal
from metaflowmaps.rewards import LinearGaussian, Reward, call_reward, is_differentiable

COND = {"label": torch.tensor([1, 2, 3])}
NOTHING = "the function's own default"
X = normal(3, 2)


class Callable:
    def __call__(self, x, cond=NOTHING):
        return cond

    def one(self, x):
        return NOTHING

    def two(self, x, cond):
        return cond


class Module(nn.Module):
    def forward(self, x):
        return NOTHING


class ConditionalModule(nn.Module):
    def forward(self, x, cond=None):
        return cond


def third(x, scale=2.0, cond=None):
    assert scale == 2.0
    return cond


def positional_only(x, cond, /):
    return cond


def keyword_only(x, *, cond=None):
    return cond


@pytest.mark.parametrize(
    "reward",
    [
        lambda x: NOTHING,
        lambda x, scale=NOTHING: scale,
        lambda x, **rest: rest.get("cond", NOTHING),
        Callable(),  # a default other than None is an option, whatever its name
        Callable().one,
        Module(),
        functools.partial(third, cond=NOTHING),  # bound by its owner
    ],
)
def test_functions_without_a_place_for_cond(reward):
    assert call_reward(reward, X) is NOTHING
    assert call_reward(reward, X, COND) is NOTHING


@pytest.mark.parametrize(
    "reward",
    [
        lambda x, cond=None: cond,
        lambda x, cond: cond,
        lambda x, context: context,
        lambda x, context=None: context,
        third,
        positional_only,
        keyword_only,
        Callable().two,
        ConditionalModule(),
        functools.partial(third, scale=2.0),
        functools.partial(lambda a, x, cond: cond, "a"),
    ],
)
def test_functions_with_a_place_for_cond(reward):
    assert call_reward(reward, X, COND) is COND
    assert call_reward(reward, X) is None


def test_open_argument_lists_are_given_what_there_is():
    """As torch.compile and decorators make them: f(*args) must serve around f(x) and around f(x, cond)."""
    for reward in (lambda *args: args[1:], lambda x, *rest: rest):
        assert call_reward(reward, X) == ()
        assert call_reward(reward, X, COND) == (COND,)


@pytest.mark.parametrize("builtin", [torch.sum, torch.numel])
def test_builtins_without_a_signature_take_x_alone(builtin):
    assert call_reward(builtin, X) == call_reward(builtin, X, COND) == builtin(X)


def test_modules_keep_their_hooks():
    module, seen = Module(), []
    module.register_forward_hook(lambda *_: seen.append(1))
    call_reward(module, X)
    assert seen == [1]


def test_what_declares_nothing_is_differentiable():
    def declared(x):
        return x.sum(1)

    assert is_differentiable(declared)
    declared.differentiable = False
    assert not is_differentiable(declared)


def test_the_protocol_asks_for_declarations():
    assert isinstance(LinearGaussian([1.0, 0.0], 0.0, 1.0), Reward)
    assert not isinstance(lambda x: x.sum(1), Reward)
