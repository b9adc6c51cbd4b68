"""Mask, Blur and Downsample against numbers by hand, another implementation and their own matrices."""

import math

import pytest
import torch
import torch.nn.functional as F

import metaflowmaps as mfm
from conftest import F64, normal
from metaflowmaps.rewards import Blur, Downsample, Mask

EVENT = (2, 4, 6)  # height and width differ: a transposed axis shows
MASK = (normal(*EVENT, seed="mask") > 0).double()
OPERATORS = {
    "mask": Mask(MASK),
    "blur": Blur(0.8),
    "blur wider than the picture": Blur(2.5, kernel_size=15),
    "downsample": Downsample(2),
}


@pytest.fixture(params=OPERATORS)
def operator(request):
    return OPERATORS[request.param]


def dense(operator):
    """The operator as a matrix (p, d): column j is what it makes of the j-th unit vector."""
    units = torch.eye(math.prod(EVENT), dtype=F64).reshape(-1, *EVENT)
    return operator(units).flatten(1).T


def test_linear_and_its_own_transpose_in_the_backward_pass(operator):
    x = normal(3, *EVENT).requires_grad_()
    matrix = dense(operator)
    seen = operator(x)
    # sums of at most 48 products of order 1: rounding is below 48 · 2e-16
    torch.testing.assert_close(seen.flatten(1), x.flatten(1) @ matrix.T, rtol=0, atol=1e-14)
    v = normal(*seen.shape, seed="v")
    (pulled,) = torch.autograd.grad(seen, x, v)
    torch.testing.assert_close(pulled.flatten(1), v.flatten(1) @ matrix, rtol=0, atol=1e-14)  # as above


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_dtype_is_kept(operator, dtype):
    x = normal(3, *EVENT).to(dtype)
    seen = operator(x)
    assert seen.dtype == dtype
    # |x| < 4; a weight, a product and a result rounded to eps each on both axes: 8 eps · 4 covers them
    torch.testing.assert_close(seen.double(), operator(x.double()), rtol=0, atol=32 * torch.finfo(dtype).eps)


def test_the_device_of_x_decides(operator):
    """No tensor of the operator stays behind: the meta device refuses to work with one on the CPU."""
    assert operator(torch.zeros(3, *EVENT, device="meta")).device.type == "meta"


def test_x_is_not_changed(operator):
    x = normal(3, *EVENT)
    kept = x.clone()
    operator(x)
    assert torch.equal(x, kept)


# -- mask ------------------------------------------------------------------------------------------------------------


def test_mask_keeps_what_was_observed_in_order():
    x = torch.arange(12, dtype=F64).reshape(2, 2, 3)
    assert Mask([[1, 0, 0], [0, 1, 1]])(x).tolist() == [[0.0, 4.0, 5.0], [6.0, 10.0, 11.0]]
    assert Mask(torch.tensor([True, False, True]))(x[0]).tolist() == [[0.0, 2.0], [3.0, 5.0]]


@pytest.mark.parametrize("mask", [[0.5, 1.0], [1.0, -1.0], [1.0, math.nan], [2, 0]])
def test_masks_of_other_numbers(mask):
    with pytest.raises(mfm.InputError, match=r"mask > 0\.5"):
        Mask(mask)


def test_masks_that_do_not_fit():
    with pytest.raises(mfm.InputError, match="at least one 1"):
        Mask([0, 0])
    with pytest.raises(mfm.InputError, match="mask must be a number, a tensor or a list"):
        Mask("left half")
    with pytest.raises(mfm.InputError, match=r"mask.expand\(\*event_shape\)"):
        Mask(MASK[:1])(normal(3, *EVENT))
    with pytest.raises(mfm.InputError, match="add a batch dimension"):
        Mask([1, 0])(normal(2))


# -- blur ------------------------------------------------------------------------------------------------------------


def gaussian(std, half):
    """Normalised weights by the formula, in plain Python."""
    raw = [math.exp(-(m**2) / (2 * std**2)) for m in range(-half, half + 1)]
    return torch.tensor([k / sum(raw) for k in raw], dtype=F64)


@pytest.mark.parametrize(("std", "kernel_size", "half"), [(1.0, None, 3), (0.7, 7, 3), (2.0, 5, 2), (0.34, None, 2)])
def test_blur_of_a_point_is_the_kernel(std, kernel_size, half):
    blur = Blur(std, kernel_size)
    k = gaussian(std, half)
    assert blur.kernel_size == len(k)
    torch.testing.assert_close(blur.kernel, k, rtol=1e-14, atol=0)  # two roundings of exp and of a sum of few terms
    x = torch.zeros(1, 2, 9, 11, dtype=F64)
    x[0, 0, 4, 5] = 1.0
    expected = torch.zeros_like(x)
    expected[0, 0, 4 - half : 5 + half, 5 - half : 6 + half] = k[:, None] * k
    torch.testing.assert_close(blur(x), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("std", [0.5, 1.3, 6.0])
def test_blur_is_a_convolution_of_the_padded_picture(std):
    half = math.ceil(3 * std)
    k = gaussian(std, half)
    x = normal(3, 2, 9, 7)
    padded = F.pad(x, (half,) * 4, mode="replicate").flatten(0, 1)[:, None]
    expected = F.conv2d(padded, (k[:, None] * k)[None, None]).reshape(x.shape)
    # up to 37² products of order 1 with weights that sum to 1, added in another order
    torch.testing.assert_close(Blur(std)(x), expected, rtol=0, atol=1e-14)


def test_blur_keeps_constants_and_a_narrow_one_keeps_everything():
    constant = torch.full((2, 3, 5, 7), 0.3, dtype=F64)
    # weights that sum to 1 within rounding
    torch.testing.assert_close(Blur(4.0)(constant), constant, rtol=1e-15 * 16, atol=0)
    x = normal(2, 3, 5, 7)
    # e^{−1250} is 0 in float64; each of two convolutions may round once (eps 2.2e-16)
    torch.testing.assert_close(Blur(0.02)(x), x, rtol=1e-15, atol=0)


def test_blurs_that_do_not_work():
    with pytest.raises(mfm.InputError, match="std must be a positive number"):
        Blur(0.0)
    with pytest.raises(mfm.InputError, match="must be odd, got 4; use 5"):
        Blur(1.0, 4)
    for size in (0, -3, 2.5):
        with pytest.raises(mfm.InputError, match="kernel_size must be at least 1"):
            Blur(1.0, size)


@pytest.mark.parametrize("operator", [Blur(1.0), Downsample(2)])
def test_operators_on_pictures_say_so(operator):
    for shape in ((3, 4), (3, 4, 4), (3, 2, 0, 4)):
        with pytest.raises(mfm.InputError, match=r"pictures \(B, C, H, W\).*x\.reshape"):
            operator(normal(*shape))
    with pytest.raises(mfm.InputError, match=r"\.float\(\)"):
        operator(torch.ones(1, 1, 4, 4, dtype=torch.int64))


# -- downsample ------------------------------------------------------------------------------------------------------


def test_downsample_by_hand():
    x = torch.tensor([[1.0, 3.0, 0.0, 2.0, 5.0, 5.0], [5.0, 7.0, 2.0, 0.0, 6.0, 4.0]], dtype=F64)[None, None]
    assert Downsample(2)(x).tolist() == [[[[4.0, 1.0, 5.0]]]]
    assert torch.equal(Downsample(1)(x), x)


def test_downsample_is_average_pooling():
    x = normal(3, 2, 6, 9)
    # means of nine numbers of order 1, added in another order
    torch.testing.assert_close(Downsample(3)(x), F.avg_pool2d(x, 3), rtol=0, atol=1e-15)


def test_factors_that_do_not_fit():
    with pytest.raises(mfm.InputError, match=r"got 4 × 6: crop to 4 × 4 or choose another factor"):
        Downsample(4)(normal(1, *EVENT))
    for factor in (0, -2, 1.5):
        with pytest.raises(mfm.InputError, match="factor must be at least 1"):
            Downsample(factor)


def test_they_print_what_they_are():
    shown = [repr(o) for o in (Mask([[1, 0], [1, 1]]), Blur(1.5), Downsample(2))]
    assert shown == ["Mask(shape=(2, 2), observed=3)", "Blur(std=1.5, kernel_size=11)", "Downsample(2)"]
