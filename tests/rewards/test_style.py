"""Ink and slant: values by hand, gradients, and images with nothing to measure."""

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, normal
from metaflowmaps.rewards import Ink, Slant


def picture(ink):
    """(B, C, H, W) with ink p in [0, 1] as pixels x = 2 p − 1."""
    return 2 * ink - 1


def bar(lean, rows=9, size=20, column=6.0):
    """A stroke of one pixel of ink a row, ``lean`` columns further right with each row upwards, between pixels too."""
    ink = torch.zeros(1, 1, size, size, dtype=F64)
    for i in range(rows):
        at = column + lean * i
        left = int(at)
        ink[0, 0, rows - 1 - i, left] += 1 - (at - left)
        ink[0, 0, rows - 1 - i, left + 1] += at - left
    return ink


# Σ p (v − v̄)² = 60 for nine rows of ink 1, and the floor under it, against strokes of no height, is 1e-3 (1 + 9)
FLOOR = 0.01 / 60


@pytest.mark.parametrize("lean", [0.0, 1.0, 0.5, 0.3, -0.5])
def test_slant_is_the_columns_gained_a_row_upwards(lean):
    ink = bar(lean)
    slant = Slant()(picture(ink))
    torch.testing.assert_close(slant, torch.tensor([lean / (1 + FLOOR)], dtype=F64), rtol=1e-12, atol=1e-14)
    mirrored = Slant()(picture(ink.flip(-1)))
    torch.testing.assert_close(mirrored, -slant, rtol=1e-12, atol=1e-13)
    # nor does it matter where the stroke is, or in how many channels
    moved = Slant()(picture(ink.roll((4, -1), (2, 3)).expand(1, 3, 20, 20)))
    torch.testing.assert_close(moved, slant, rtol=1e-12, atol=1e-13)


def test_slant_does_not_depend_on_the_amount_of_ink():
    # up to the floor, 1e-3 (1 + .9) of 6 for a tenth of the ink: 3e-4
    torch.testing.assert_close(Slant()(picture(0.1 * bar(0.5))), Slant()(picture(bar(0.5))), rtol=3e-4, atol=0)


def test_less_than_no_ink_is_none():
    background = picture(bar(0.5))
    below = torch.where(background == -1, -1.7, background)
    assert torch.equal(Slant()(below), Slant()(background))


def test_what_has_no_height_has_no_slant():
    row, point, empty = torch.zeros(3, 1, 1, 8, 8, dtype=F64)
    row[0, 0, 3, 2:6] = 1
    point[0, 0, 5, 6] = 1
    for ink in (row, point, 0.01 * point, empty, empty - 1):
        # deviations from a centroid, rounded at 1e-16 of 8 pixels and divided by the floor
        torch.testing.assert_close(Slant()(picture(ink)), torch.zeros(1, dtype=F64), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_gradient_of_an_empty_image_is_finite(dtype):
    def gradient(reward, value):
        x = torch.full((1, 1, 8, 8), value, dtype=dtype, requires_grad=True)
        return torch.autograd.grad(reward(x).sum(), x)[0]

    assert not gradient(Slant(), -1.3).any()  # below no ink nothing changes
    # half an ink a unit of x, at most 7 · 7 from the origin, over the floor of 1e-3
    assert gradient(Slant(), -1.0).abs().max() <= 0.5 * 49 / 1e-3
    assert gradient(Slant(), -1 + 1e-5).isfinite().all()


@pytest.mark.parametrize("reward", [Ink(2.0), Slant(0.7)], ids=repr)
def test_the_gradient_is_the_difference_quotient(reward):
    x = torch.cat([picture(bar(0.5, size=12)), 0.9 * normal(2, 1, 12, 12)]).requires_grad_()
    x = (x.detach() + 1e-3).requires_grad_()  # off the kink at no ink
    # gradcheck's step is h = 1e-6: h² r''' and 1e-16/h
    assert torch.autograd.gradcheck(reward, x, atol=1e-7, rtol=1e-6)


def test_ink_is_the_mean_amount():
    half = torch.zeros(1, 2, 4, 6, dtype=F64)
    half[:, 0] = 1
    x = picture(torch.cat([torch.zeros_like(half), torch.ones_like(half), half, 0.25 * half]))
    assert Ink()(x).tolist() == [0.0, 1.0, 0.5, 0.125]
    assert Ink(4.0)(x).tolist() == [0.0, 4.0, 2.0, 0.5]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(Ink(4.0)(leaf).sum(), leaf)
    # λ/2 over 48 numbers
    torch.testing.assert_close(gradient, torch.full_like(x, 4 / 2 / 48), rtol=1e-15, atol=0)


def test_strength():
    x = picture(bar(0.5))
    torch.testing.assert_close(Slant(3.0)(x), 3 * Slant()(x), rtol=1e-15, atol=0)
    assert Slant(0)(x) == Ink(0)(x) == 0


@pytest.mark.parametrize("reward", [Ink(), Slant()], ids=["ink", "slant"])
@pytest.mark.parametrize("shape", [(3, 2), (3, 8, 8), (8,), (2, 1, 0, 8), (2, 0, 8, 8), (2, 1, 1, 8, 8)])
def test_what_is_no_picture_is_refused(reward, shape):
    with pytest.raises(mfm.InputError, match=r"works on pictures \(B, C, H, W\), got") as error:
        reward(torch.zeros(shape))
    assert type(reward).__name__ in str(error.value)
    assert "\n" not in str(error.value)
