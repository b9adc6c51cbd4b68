"""One suite over every reward: what goes in and out, rows that do not mix, gradients that are there if declared."""

import math

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, normal
from metaflowmaps import rewards
from metaflowmaps.rewards import (
    BlackBox,
    Blur,
    ClassifierMixture,
    Colour,
    Downsample,
    Ink,
    InverseProblem,
    Likeness,
    LinearGaussian,
    LogDensity,
    LogitMargin,
    Mask,
    MicroBatched,
    Slant,
    Symmetry,
    Tempered,
    WeightedSum,
)

EVENT = (3, 4, 4)
SIZE = math.prod(EVENT)
W = normal(SIZE, 3, seed="W") / SIZE**0.5
X = normal(5, *EVENT)
TRUTH = normal(1, *EVENT, seed="truth")
LAW = mfm.GaussianMixture(normal(2, SIZE, seed="means"), [0.8, 1.4], [0.3, 0.7])


def classifier(x):
    return (x.flatten(1) @ W.to(x)).tanh()


def plain(x):
    return x.flatten(1)[:, :3].sin().sum(1)


def observed(operator):
    y = operator(TRUTH)[0]
    return lambda strength: InverseProblem(operator, y, 1.2, strength)


REWARDS = {
    "linear gaussian": lambda strength: LinearGaussian(W.T, [0.3, -0.2, 0.1], 0.5, strength),
    "masked": observed(Mask(normal(*EVENT, seed="mask") > 0)),
    "blurred": observed(Blur(0.8)),
    "downsampled": observed(Downsample(2)),
    "bent": observed(lambda x: x.tanh() * x.roll(1, -1)),
    "classifier mixture": lambda strength: ClassifierMixture(classifier, [0.2, 0.0, 0.8], strength),
    "logit margin": lambda strength: LogitMargin(classifier, 1, strength),
    "log-density": lambda strength: LogDensity(lambda x: LAW.log_prob(x.flatten(1)), strength),
    "colour": lambda strength: Colour("blue", strength),
    "symmetry": Symmetry,
    "likeness": lambda strength: Likeness(classifier, X, -X, strength),
    "ink": Ink,
    "slant": Slant,
    "sum": lambda strength: WeightedSum([(0.5, plain), (-2.0, LogitMargin(classifier, 0))], strength),
    "sum with a black box": lambda strength: WeightedSum([(0.5, plain), (1.0, REWARDS["black box"](1.0))], strength),
    "micro-batched": lambda strength: MicroBatched(LogitMargin(classifier, 1, strength), 2),
    "tempered": lambda strength: Tempered(plain, strength),
    "tempered black box": lambda strength: Tempered(REWARDS["black box"](1.0), strength),
    "black box": lambda strength: BlackBox(lambda x: x.numpy()[:, 0].max((1, 2)), strength),
}
WITHOUT_GRADIENT = {name for name in REWARDS if "black box" in name}
ON_THE_CPU = WITHOUT_GRADIENT | {"sum", "tempered", "micro-batched"}  # values are looked at: the meta device has none


@pytest.fixture(params=REWARDS)
def make(request):
    return REWARDS[request.param]


def test_every_reward_of_the_package_is_here():
    public = {getattr(rewards, name) for name in rewards.__all__} - {rewards.Reward}
    # those that look at pictures have their own suite, with tiny models: tests/rewards/test_vision_*.py
    pictures = {c for c in public if c.__module__.startswith("metaflowmaps.rewards.vision.")}
    classes = {c for c in public if isinstance(c, type)} - {Blur, Downsample, Mask} - pictures
    assert {type(make(1.0)) for make in REWARDS.values()} == classes


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_shape_and_dtype(make, dtype, batch):
    value = make(1.3)(X[:batch].to(dtype))
    assert value.shape == (batch,)
    assert value.dtype == dtype
    assert bool(value.isfinite().all())


def test_float32_is_float64_rounded(make):
    # sums of at most 48 terms of order 1 that come to at most 100: 48 · 6e-8 · 100/48, with a factor 10 for what is
    # rounded on the way
    torch.testing.assert_close(make(1.3)(X.float()).double(), make(1.3)(X), rtol=0, atol=6e-5)


@pytest.mark.parametrize("name", sorted(set(REWARDS) - ON_THE_CPU))
def test_nothing_stays_behind_on_the_cpu(name):
    """The meta device refuses to work with a tensor of the reward's own that was not moved to it."""
    assert REWARDS[name](1.3)(torch.zeros(5, *EVENT, device="meta")).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", sorted(set(REWARDS) - WITHOUT_GRADIENT))
def test_the_same_on_a_gpu(name):
    value = REWARDS[name](1.3)(X.cuda())
    assert value.device.type == "cuda"
    # sums of at most 48 terms of order 1, added in another order, that come to at most 100
    torch.testing.assert_close(value.cpu(), REWARDS[name](1.3)(X), rtol=1e-12, atol=1e-12)


def test_declares_itself(make):
    reward = make(1.3)
    assert isinstance(reward, rewards.Reward)
    assert reward.strength == 1.3
    assert isinstance(reward.strength, float)
    shown = repr(reward)
    assert shown.startswith(f"{type(reward).__name__}(")
    assert "strength=1.3" in shown
    assert "\n" not in shown
    assert " at 0x" not in shown


def test_rows_do_not_mix(make):
    reward = make(1.3)
    one_by_one = torch.cat([reward(X[i : i + 1]) for i in range(len(X))])
    # matrix products may add up in another order for another batch: 48 terms, rounded at 1e-16 of values up to 100
    torch.testing.assert_close(reward(X), one_by_one, rtol=1e-13, atol=1e-14)
    # not all the same, so that rows could be told apart
    assert len(set(reward(X).tolist())) == len(X)


def test_x_is_not_changed_and_the_answer_repeats(make):
    reward, x = make(1.3), X.clone()
    state = torch.random.get_rng_state()
    first = reward(x)
    assert torch.equal(x, X)
    assert torch.equal(reward(x), first)
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_condition_of_no_interest_is_ignored(make):
    assert torch.equal(make(1.3)(X, {"label": torch.arange(5)}), make(1.3)(X))


@pytest.mark.parametrize("name", REWARDS)
def test_differentiable_means_what_it_says(name):
    """With a gradient: that of central differences, rows apart. Without: no graph at all."""
    reward, x = REWARDS[name](1.3), X[:2].clone().requires_grad_()
    assert reward.differentiable == (name not in WITHOUT_GRADIENT)
    if reward.differentiable:
        # gradcheck's step is h = 1e-6: differences are off by h² r''' ~ 1e-12 and by rounding, 1e-16 · 100/h = 1e-8
        assert torch.autograd.gradcheck(reward, x, atol=1e-7, rtol=1e-6)
        (gradient,) = torch.autograd.grad(reward(x).sum(), x)
        assert bool(gradient.flatten(1).any(1).all())
    else:
        assert not reward(x).requires_grad
    with torch.no_grad():
        assert not reward(x).requires_grad


def test_strength_multiplies(make):
    one = make(1.0)(X)
    for strength in (0.25, 3.0):
        # the same product taken earlier or later
        torch.testing.assert_close(make(strength)(X), strength * one, rtol=1e-14, atol=1e-15)


def test_strength_zero_is_no_reward(make):
    reward, x = make(0.0), X.clone().requires_grad_()
    value = reward(x)
    assert not value.detach().any()
    assert value.requires_grad == reward.differentiable
    if reward.differentiable:
        assert not torch.autograd.grad(value.sum(), x)[0].any()


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf, "strong", None])
def test_bad_strengths_are_refused(make, strength):
    with pytest.raises(mfm.InputError, match="strength must be a finite number >= 0"):
        make(strength)
