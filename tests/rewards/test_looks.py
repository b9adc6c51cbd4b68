"""Colour, symmetry and likeness: values by hand, what counts nothing, gradients."""

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, normal
from metaflowmaps.rewards import Colour, Likeness, Symmetry


def flat(*rgb):
    """One picture of one colour, red, green and blue in [0, 1], as pixels x = 2 p − 1."""
    return 2 * torch.tensor(rgb, dtype=F64).reshape(1, 3, 1, 1).expand(1, 3, 4, 6) - 1


def test_colour_is_the_length_along_its_own_chroma():
    # blue (0, .4, 1) less its mean .4667 is (−.4667, −.0667, .5333), of norm .7118: its own picture scores just that
    torch.testing.assert_close(Colour("blue")(flat(0, 0.4, 1)), torch.tensor([0.7118], dtype=F64), rtol=0, atol=5e-5)
    # red of (1, 0, 0): d = (2, −1, −1)/√6
    assert Colour("red")(flat(1, 0, 0)).item() == pytest.approx(2 / 6**0.5, rel=1e-12)
    assert Colour("red", 3.0)(flat(0, 1, 0)).item() == pytest.approx(-3 / 6**0.5, rel=1e-12)
    half = torch.cat([flat(1, 0, 0), flat(1, 1, 1)], 3)
    assert Colour("red")(half).item() == pytest.approx(1 / 6**0.5, rel=1e-12)


@pytest.mark.parametrize("grey", [0.0, 0.3, 1.0])
def test_grey_has_no_colour(grey):
    assert abs(Colour("blue")(flat(grey, grey, grey)).item()) < 1e-15


def test_symmetry_is_the_square_to_the_mirror():
    x = normal(3, 2, 4, 6)
    assert Symmetry()(x + x.flip(3)).tolist() == [0.0] * 3
    ink = torch.zeros(1, 1, 1, 4, dtype=F64)
    ink[..., 0] = 1  # against 0 on the right, and twice
    assert Symmetry(2.0)(2 * ink - 1).item() == pytest.approx(-2 * 2 / 4)


@pytest.mark.parametrize("reward", [Colour((0.2, 0.9, 0.1), 2.0), Symmetry(0.7)], ids=repr)
def test_the_gradient_is_the_difference_quotient(reward):
    assert torch.autograd.gradcheck(reward, normal(2, 3, 4, 4).requires_grad_(), atol=1e-7, rtol=1e-6)


def test_likeness_is_the_log_odds_of_two_gaussians():
    """In features that are Gaussians of unit covariance, means ±m: log-odds 2⟨m, f⟩, and half of it at m/2."""
    mean = torch.tensor([1.0, 0.5, 0.0], dtype=F64)
    noise = normal(2, 20_000, 3)
    reward = Likeness(lambda x: x, noise[0] + mean, noise[1] - mean, strength=2.0, ridge=1e-9)
    x = normal(50, 3)
    # the discriminant of n samples is off by 1/√n = .007 a coordinate, times |x| of 3 or so and λ = 2
    torch.testing.assert_close(reward(x), 2 * 2 * x @ mean, rtol=0, atol=0.15)
    (gradient,) = torch.autograd.grad(reward(leaf := x.clone().requires_grad_()).sum(), leaf)
    torch.testing.assert_close(gradient[0], gradient[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Colour("bleu"), "did you mean 'blue'"),
        (lambda: Colour((0.5, 0.5, 0.5)), "is a grey"),
        (lambda: Colour((255, 0, 0)), r"in \[0, 1\]"),
        (lambda: Colour("red")(torch.zeros(2, 1, 4, 4)), r"\(B, 3, H, W\), got \(2, 1, 4, 4\)"),
        (lambda: Symmetry()(torch.zeros(2, 4)), r"\(B, C, H, W\), got \(2, 4\)"),
        (lambda: Likeness(torch.Tensor, torch.zeros(0, 3), torch.zeros(2, 3)), "examples of both kinds"),
    ],
)
def test_what_cannot_be_used_is_refused(make, says):
    with pytest.raises(mfm.InputError, match=says):
        make()
