"""Layer norm: one function both ways, and right where the fused kernel is not."""

import torch
from torch.autograd import forward_ad
from torch.nn import functional

from conftest import normal
from metaflowmaps.networks.forward_mode import forward_mode, layer_norm

X, V, W = (normal(3, 4, 8, seed=name) for name in "xvw")


def tangent_size(f):
    return lambda x: torch.func.jvp(f, (x,), (V,))[1].square().sum()


def error_of_gradient_through_jvp(f):
    size, h = tangent_size(f), 1e-5
    leaf = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(size(leaf), leaf)
    difference = (size(X + h * W) - size(X - h * W)) / (2 * h)
    return abs((gradient * W).sum() / difference - 1).item()


def test_forward_mode_is_seen_by_whoever_is_inside():
    seen = []

    def look(x):
        seen.append(forward_mode())
        return x.square().sum()

    look(X)
    torch.func.grad(look)(X)
    torch.func.jvp(look, (X,), (V,))
    torch.func.jvp(torch.func.grad(look), (X,), (V,))
    torch.func.vmap(lambda x, v: torch.func.jvp(look, (x,), (v,))[1])(X, V)
    with forward_ad.dual_level():
        look(X)
    look(X)
    assert seen == [False, False, True, True, True, True, False]


def test_layer_norm_is_one_function():
    expected = (X - X.mean(-1, keepdim=True)) / (X.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    with forward_ad.dual_level():
        composed = layer_norm(X)
    for out in (composed, layer_norm(X)):
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)  # float64, sums of 8
    fused = torch.func.grad(lambda x: (layer_norm(x) * W).sum())(X)
    with forward_ad.dual_level():
        composed = torch.func.grad(lambda x: (layer_norm(x) * W).sum())(X)
    torch.testing.assert_close(fused, composed, rtol=0, atol=1e-13)


def test_the_gradient_through_a_jvp_of_layer_norm():
    # central differences with h = 1e-5: h² f'''/6 and 1e-14/h on numbers of order 100
    assert error_of_gradient_through_jvp(layer_norm) < 1e-6


def test_the_fused_kernel_still_needs_its_replacement():
    """When this fails, torch has mended its kernel and the composed form may go."""
    assert error_of_gradient_through_jvp(lambda x: functional.layer_norm(x, (8,), eps=1e-6)) > 0.01
