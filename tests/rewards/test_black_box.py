"""Functions that torch cannot differentiate: what goes in, what may come back, and no gradient ever."""

import numpy as np
import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, normal
from metaflowmaps.rewards import BlackBox
from metaflowmaps.rewards.checked import checked_reward

X = normal(4, 2)
EXPECTED = 2.5 * X[:, 0]
RETURNS = {
    "tensor": lambda x: x[:, 0],
    "float32 tensor": lambda x: x[:, 0].float(),
    "array": lambda x: x.numpy()[:, 0],
    "read-only array": lambda x: np.broadcast_to(x.numpy()[:, 0], (4,)),
    "float32 array": lambda x: x.numpy()[:, 0].astype(np.float32),
    "list of floats": lambda x: [float(v) for v in x[:, 0]],
    "list of tensors": lambda x: list(x[:, 0]),
    "list of numpy numbers": lambda x: list(x.numpy()[:, 0]),
    "list of 0-d arrays": lambda x: [np.array(v) for v in x[:, 0].tolist()],
    "tuple": lambda x: tuple(x[:, 0].tolist()),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", RETURNS)
def test_whatever_holds_one_number_a_row(name):
    value = BlackBox(RETURNS[name], strength=2.5)(X)
    assert value.dtype == F64
    # exact but for a function that rounds to float32
    torch.testing.assert_close(value, EXPECTED, rtol=1e-7 if "float32" in name else 1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_dtype_is_that_of_x(dtype):
    for function in RETURNS.values():
        assert BlackBox(function)(X.to(dtype)).dtype == dtype


def test_a_list_of_tensors_that_numpy_does_not_know():
    value = BlackBox(lambda x: list(x[:, 0]))(X.to(torch.bfloat16))
    assert torch.equal(value, X[:, 0].to(torch.bfloat16))


def test_whole_numbers_and_booleans():
    for function in (lambda x: [1, 2, 3, 4], lambda x: np.array([1, 2, 3, 4]), lambda x: torch.tensor([1, 2, 3, 4])):
        assert BlackBox(function, 0.5)(X).tolist() == [0.5, 1.0, 1.5, 2.0]
    for function in (lambda x: x[:, 0] > 0, lambda x: x.numpy()[:, 0] > 0):
        assert torch.equal(BlackBox(function)(X), (X[:, 0] > 0).double())


def test_no_gradient_even_where_there_could_be_one():
    x = X.clone().requires_grad_()
    assert not BlackBox(lambda x: x[:, 0])(x).requires_grad

    def insists(x):
        with torch.enable_grad():
            return x.requires_grad_()[:, 0] * 2

    assert not BlackBox(insists)(x).requires_grad
    assert not BlackBox(lambda y: x[:, 0] * 2)(x).requires_grad  # nor through the back door


def test_what_goes_in_is_a_copy_without_a_graph():
    x = X.clone().requires_grad_()
    seen = []

    def vandal(given):
        seen.append((given.requires_grad, torch.is_grad_enabled()))
        given.zero_()
        return [0.0] * len(given)

    BlackBox(vandal)(x)
    assert seen == [(False, False)]
    assert torch.equal(x.detach(), X)


def test_what_comes_back_is_not_shared():
    """A function may fill the same buffer at each call."""
    for buffer in (np.zeros(4), torch.zeros(4, dtype=F64)):

        def function(x, buffer=buffer):
            buffer[:] = 1 if isinstance(buffer, np.ndarray) else torch.ones(4)
            return buffer

        first = BlackBox(function)(X)
        buffer[:] = 7
        assert first.tolist() == [1.0] * 4


def test_conditions_reach_the_function():
    cond = {"prompt": torch.arange(4)}
    assert BlackBox(lambda x, cond: cond["prompt"])(X, cond).tolist() == [0, 1, 2, 3]


def test_strength_zero_does_not_ask():
    asked = []
    assert BlackBox(asked.append, 0.0)(X).tolist() == [0.0] * 4
    assert asked == []


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda x: [1.0], r"\(1,\)"),
        (lambda x: 0.5, r"\(\)"),
        (lambda x: x, r"\(4, 2\)"),
        (lambda x: x.numpy()[:, :1], r"\(4, 1\)"),
        (lambda x: [], r"\(0,\)"),
    ],
)
def test_other_lengths_are_refused(function, got):
    with pytest.raises(mfm.InputError, match=f"must return one number a row, 4 of them .*got shape {got}"):
        BlackBox(function)(X)


@pytest.mark.parametrize("out", ["good", ["a", "b", "c", "d"], [[1.0], [1.0, 2.0]], {"score": 1.0}, object()])
def test_what_is_no_number_is_refused(out):
    with pytest.raises(mfm.InputError, match="must return one number a row in a flat list, array or tensor; got"):
        BlackBox(lambda x: out)(X)


def test_a_function_is_needed():
    with pytest.raises(mfm.InputError, match=r"BlackBox needs a function of x .* got \[1\.0\]"):
        BlackBox([1.0])


def test_it_prints_what_it_is():
    def aesthetic(x):
        return x[:, 0]

    assert repr(BlackBox(aesthetic, 3)) == "BlackBox(aesthetic, strength=3)"


def test_a_function_is_given_x_where_it_says():
    """On the CPU by default: NumPy takes nothing from an accelerator. A device without numbers stands for one here."""
    seen = []

    def where(x, cond=None):
        seen.append((x.device.type, None if cond is None else cond["label"].device.type))
        return [0.0] * len(x)

    label = {"label": torch.zeros(4, dtype=torch.int64)}
    for device in ("cpu", None, "meta"):
        BlackBox(where, device=device)(X, label)
    assert seen == [("cpu", "cpu"), ("cpu", "cpu"), ("meta", "meta")]


@pytest.mark.gpu
def test_numpy_rewards_steer_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x = X.to("cuda")
    assert BlackBox(RETURNS["array"], 2.5)(x).device == x.device
    with pytest.raises(mfm.InputError, match=r"wrap it as mfm\.rewards\.BlackBox"):
        checked_reward(RETURNS["array"])(x)


def test_numpy_on_what_it_cannot_take_is_told_of_the_black_box():
    def refusing(x):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    with pytest.raises(mfm.InputError, match=r"wrap it as mfm\.rewards\.BlackBox"):
        checked_reward(refusing)(X)
