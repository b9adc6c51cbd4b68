"""Attention: fused in ordinary calls, differentiable in forward mode, by itself and however deep the transform lies."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import F64, normal
from metaflowmaps.errors import InputError
from metaflowmaps.networks.attention import SelfAttention, attend


class Ops(TorchDispatchMode):
    """The names of the kernels that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def fused(self):
        return any("scaled_dot_product" in name for name in self.names)


def qkv(dtype=F64):
    return [normal(3, 2, 5, 4, seed=name, dtype=dtype) for name in "qkv"]


def written_out(q, k, v):
    weights = torch.einsum("bhnd,bhmd->bhnm", q, k).div(q.shape[-1] ** 0.5).exp()
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)


@pytest.fixture
def module():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SelfAttention(8, 2).double()


def test_ordinary_calls_are_fused_and_forward_mode_is_not(module):
    x = normal(3, 5, 8).requires_grad_()
    with Ops() as before:
        module(x).sum().backward()
    with Ops() as during:
        torch.func.jvp(module, (x.detach(),), (x.detach(),))
    with Ops() as after, torch.no_grad():
        module(x)
    assert before.fused
    assert not during.fused
    assert after.fused


# rounding: sums of 5 products of numbers near 1, in another order
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-14), (torch.float32, 1e-6)])
def test_both_ways_give_the_formula(dtype, tolerance):
    q, k, v = qkv(dtype)
    with forward_ad.dual_level():
        plain = attend(q, k, v)
    for out in (plain, attend(q, k, v)):
        torch.testing.assert_close(out, written_out(q, k, v), rtol=tolerance, atol=tolerance)


def test_gradients_of_both_ways_agree():
    def gradients(inputs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(attend(*leaves).square().sum(), leaves)

    fused = gradients(qkv())
    with forward_ad.dual_level():
        plain = gradients(qkv())
    torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-13)  # float64, a few dozen operations


def difference(f, x, v, h=1e-5):
    return (f(x + h * v) - f(x - h * v)) / (2 * h)


# central differences with h = 1e-5: truncation h² f'''/6 and rounding 1e-16/h are both about 1e-10 or less
CLOSE = {"rtol": 1e-7, "atol": 1e-9}


def test_jvp_is_the_derivative_and_has_a_gradient(module):
    x, v = normal(3, 5, 8), normal(3, 5, 8, seed="v")
    tangent = torch.func.jvp(module, (x,), (v,))[1]
    torch.testing.assert_close(tangent, difference(module, x, v), **CLOSE)

    def size(x):
        return torch.func.jvp(module, (x,), (v,))[1].square().sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(size(leaf), leaf)
    w = normal(3, 5, 8, seed="w")
    torch.testing.assert_close((gradient * w).sum(), difference(size, x, w).detach(), rtol=1e-7, atol=1e-7)


def test_transforms_may_be_nested(module):
    x, v = normal(3, 5, 8), normal(3, 5, 8, seed="v")
    value = torch.func.jvp(module, (x,), (v,))[1]

    def alone(x, v):
        return torch.func.jvp(lambda x: module(x[None])[0], (x,), (v,))[1]

    def summed(x):
        return module(x).square().sum()

    torch.testing.assert_close(torch.func.vmap(alone)(x, v), value, rtol=1e-12, atol=1e-13)
    mapped = torch.func.jvp(torch.func.vmap(lambda x: module(x[None])[0]), (x,), (v,))[1]
    torch.testing.assert_close(mapped, value, rtol=1e-12, atol=1e-13)
    hessian = torch.func.jvp(torch.func.grad(summed), (x,), (v,))[1]
    torch.testing.assert_close(hessian, difference(torch.func.grad(summed), x, v), **CLOSE)
    other = torch.func.grad(lambda x: torch.func.jvp(summed, (x,), (v,))[1])(x)
    torch.testing.assert_close(other, hessian, rtol=1e-12, atol=1e-12)
    row = torch.func.jacfwd(summed)(x)
    torch.testing.assert_close(row, torch.func.grad(summed)(x), rtol=1e-12, atol=1e-13)


def test_dual_tensors_by_hand(module):
    x, v = normal(3, 5, 8), normal(3, 5, 8, seed="v")
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, v))).tangent
    torch.testing.assert_close(tangent, torch.func.jvp(module, (x,), (v,))[1], rtol=0, atol=0)


def test_bad_arguments():
    with pytest.raises(InputError, match="heads must divide width, got 3 and 8") as error:
        SelfAttention(8, 3)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="heads must be at least 1"):
        SelfAttention(8, 0)


def test_head_norms_make_attention_blind_to_the_length_of_queries_and_keys_and_keep_its_derivative():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = SelfAttention(8, 2, head_norms=True).double()
    module.qkv.bias.data.zero_()
    x = normal(2, 5, 8)
    out = module(x)
    module.qkv.weight.data[:16] *= 1e3  # of queries and keys: below it the 1e-6 under the root is 1e-6 of them
    assert (module(x) - out).abs().max() < 1e-4 * out.abs().max()
    module.qkv.weight.data[:16] /= 1e3
    along, h = normal(2, 5, 8, seed="along"), 1e-5
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, along))).tangent
    difference = (module(x + h * along) - module(x - h * along)) / (2 * h)  # h² of rounding 1e-16/h: 1e-10
    torch.testing.assert_close(tangent, difference, rtol=0, atol=1e-8)
