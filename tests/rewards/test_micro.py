"""Rewards in parts: the values and gradients of the whole, whatever memory allows."""

import pytest
import torch

import metaflowmaps as mfm
from conftest import normal
from metaflowmaps.rewards import BlackBox, InverseProblem, LogitMargin, MicroBatched
from metaflowmaps.rewards.checked import checked_reward
from metaflowmaps.rewards.micro import Parts

X = normal(7, 2, 3)
UP = normal(7, seed="up")
W = normal(6, 4, seed="W")


def bumpy(x):
    return (x.flatten(1) @ W.to(x)).sin().prod(1)


def differentiated(reward, x=X, up=UP, cond=None):
    x = x.clone().requires_grad_(True)
    r = reward(x, cond) if cond is not None else reward(x)
    return r.detach(), torch.autograd.grad(r, x, up)[0]


class Hungry:
    """Runs out of memory above so many rows; remembers the sizes it was asked for."""

    def __init__(self, limit, error=lambda text: RuntimeError(f"CUDA {text}. Tried to allocate 2 GiB"), back=False):
        self.limit, self.error, self.back, self.sizes = limit, error, back, []

    def __call__(self, x):
        self.sizes.append(len(x))
        if len(x) > self.limit and not self.back:
            raise self.error("out of memory")
        r = bumpy(x)
        if self.back and r.requires_grad:
            r.register_hook(self._backward)
        return r

    def _backward(self, gradient):
        if len(gradient) > self.limit:
            raise self.error("out of memory")


@pytest.mark.parametrize("rows", [None, 1, 2, 3, 7, 100])
def test_values_and_gradients_are_those_of_the_whole(rows):
    value, gradient = differentiated(bumpy)
    in_parts = differentiated(MicroBatched(bumpy, rows))
    # a row's own arithmetic, in matrix products of another height, and one product with what comes from above
    torch.testing.assert_close(in_parts, (value, gradient), rtol=1e-13, atol=1e-15)
    with torch.no_grad():
        torch.testing.assert_close(MicroBatched(bumpy, rows)(X), value, rtol=1e-13, atol=1e-15)
    assert torch.autograd.gradcheck(MicroBatched(bumpy, rows), X.clone().requires_grad_(True))


def test_parts_are_as_large_as_was_asked_for():
    seen = Hungry(100)
    MicroBatched(seen, 3)(X)
    assert seen.sizes == [3, 3, 1]
    seen.sizes.clear()
    Parts(3)(lambda x, rows: seen(x), X, {})  # as the pictures' rewards go, whose rows are each by itself
    assert seen.sizes == [3, 3, 1]


def test_the_graph_goes_on_below():
    """x itself comes from somewhere."""
    z = X.clone().requires_grad_(True)
    (whole,) = torch.autograd.grad(bumpy(z.tanh() * 2).sum(), z)
    (parted,) = torch.autograd.grad(MicroBatched(bumpy, 2)(z.tanh() * 2).sum(), z)
    torch.testing.assert_close(parted, whole, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("back", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "error",
    [
        lambda text: torch.cuda.OutOfMemoryError(f"CUDA {text}"),
        lambda text: RuntimeError(f"MPS backend {text}"),
        lambda text: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["cuda", "mps", "cpu"],
)
def test_where_memory_runs_out_parts_are_halved(error, back):
    hungry = Hungry(1, error, back)
    reward = MicroBatched(hungry)
    with pytest.warns(UserWarning, match="going on with micro_batch=1") as told:
        made = differentiated(reward)
    assert len(told) == 1
    torch.testing.assert_close(made, differentiated(bumpy), rtol=1e-13, atol=1e-15)
    assert hungry.sizes == [7, 3, 1, 2, 1, 1, 4, 2, 1, 1, 2, 1, 1]
    hungry.sizes.clear()
    differentiated(reward)  # what was learnt is remembered: no warning, which would be an error here
    assert hungry.sizes == [1] * 7


def test_what_is_done_is_kept():
    """Memory that runs out later does not begin again."""
    calls = []

    def late(x):
        calls.append(len(x))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return bumpy(x)

    with pytest.warns(UserWarning, match="micro_batch=1"):
        value = MicroBatched(late, 2)(X)
    torch.testing.assert_close(value, bumpy(X), rtol=1e-13, atol=1e-15)
    assert calls == [2, 2, 2, 1, 1, 1]


def test_not_even_one_row_fits():
    with pytest.raises(mfm.InputError, match="RuntimeError: CUDA out of memory"):
        MicroBatched(Hungry(0))(X)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    sizes = []

    def broken(x):
        sizes.append(len(x))
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(mfm.InputError, match="shapes cannot be multiplied"):
        MicroBatched(broken)(X)
    assert sizes == [7]


def test_no_memory_is_held_by_what_failed():
    """Tensors of an attempt are freed before the next one begins."""
    import weakref

    held = []

    def hungry(x):
        attempt = x * 2
        alive = [ref() for ref in held if ref() is not None]
        held.append(weakref.ref(attempt))
        if len(x) > 1:
            raise RuntimeError("out of memory")
        assert not alive
        return bumpy(x)

    with pytest.warns(UserWarning, match="memory ran out"):
        MicroBatched(hungry)(X[:2])


def test_a_condition_goes_with_its_rows():
    label = torch.arange(7) % 3

    def chosen(x, cond):
        assert cond["shared"] == "as it is"
        return x.flatten(1).sin().gather(1, cond["label"][:, None])[:, 0]

    cond = {"label": label, "shared": "as it is"}
    whole = differentiated(chosen, cond=cond)
    torch.testing.assert_close(differentiated(MicroBatched(chosen, 2), cond=cond), whole, rtol=0, atol=0)


def test_rows_with_an_observation_each_stay_together():
    y = normal(2, 2, 3, seed="y")
    reward = InverseProblem(lambda x: x.tanh(), y, 0.5)
    x = normal(6, 2, 3)
    sizes = []

    def counting(part):
        sizes.append(len(part))
        return reward(part)

    counting.rows_for = reward.rows_for
    torch.testing.assert_close(MicroBatched(counting, 3)(x), reward(x), rtol=0, atol=0)
    assert sizes == [2, 2, 2]  # 3 would give a row another's observation


def test_what_has_no_gradient_still_has_none():
    x = X.clone().requires_grad_(True)
    boxed = MicroBatched(BlackBox(lambda v: v.numpy().max((1, 2))), 2)
    assert not boxed.differentiable
    assert not boxed(x).requires_grad
    assert not MicroBatched(lambda v: v.detach().flatten(1).sum(1), 2)(x).requires_grad


def test_a_second_derivative_is_refused_and_not_wrong():
    x = X.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(MicroBatched(bumpy, 2)(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.square().sum(), x)


def test_it_is_a_reward_like_the_one_inside():
    inner = LogitMargin(lambda x: x.flatten(1) @ W, 1, strength=2.5)
    reward = MicroBatched(inner, 4)
    assert reward.differentiable
    assert reward.strength == 2.5
    assert repr(reward).startswith("MicroBatched(LogitMargin(")
    torch.testing.assert_close(checked_reward(reward)(X), inner(X), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("rows", [0, -1, 2.5, "all"])
def test_rows_must_be_a_count(rows):
    with pytest.raises(mfm.InputError, match="micro_batch must be at least 1"):
        MicroBatched(bumpy, rows)


def test_a_reward_of_another_shape_is_refused():
    with pytest.raises(mfm.InputError, match=r"one number a sample, shape \(2,\), got \(2, 6\)"):
        MicroBatched(lambda x: x.flatten(1), 2)(X)
    with pytest.raises(mfm.InputError, match="a reward is a function"):
        MicroBatched(3.0)
