"""The transformer at scale: recomputed blocks, and what autocast leaves alone."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from conftest import F64, normal, uniform
from metaflowmaps.networks import dit as dit_module
from metaflowmaps.networks.dit import DiTConfig
from metaflowmaps.random import stream


def network(dtype=torch.float32, **options):
    """A transformer whose every layer matters."""
    sizes = {"patch": 2, "width": 32, "depth": 6, "heads": 2, "encoder_depth": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = DiTConfig(**{**sizes, **options}).network((2, 8, 8)).to(dtype)
    generator = stream(0, "weights")
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=dtype)
    return made


def inputs(dtype=torch.float32, n=3):
    a, b, t = (uniform(n, seed=name).to(dtype) for name in "abt")
    return [normal(n, 2, 8, 8, seed="z").to(dtype), a, b, normal(n, 2, 8, 8, seed="context").to(dtype), t]


def gradients(made, at):
    out = made(*at)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(made.parameters()))]


# -- recomputed blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_blocks_have_the_same_gradient(autocast):
    made, at = network(), inputs()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        remembered = gradients(made, at)
        recomputed = gradients(made.configure(recompute=True), at)
    # the same operations on the same numbers: the same bits
    assert all(torch.equal(x, y) for x, y in zip(remembered, recomputed, strict=True))


def bytes_saved(made, at):
    """Bytes of all that the graph holds for the backward pass, weights left out."""
    storages = {}
    weights = {p.untyped_storage().data_ptr() for p in made.parameters()}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = made(*at)
    total = sum(storages.values())
    out.sum().backward()
    return total


def test_recomputed_blocks_remember_their_inputs_alone():
    made, at = network(), inputs(n=8)
    everything = bytes_saved(made, at)
    inputs_alone = bytes_saved(made.configure(recompute=True), at)
    # a block remembers about 16 + 4·(perceptron 4) arrays of B·N·width, its checkpoint one; the ends remember a few
    assert inputs_alone < everything / 5


def test_forward_mode_goes_through_recomputed_blocks():
    """And a gradient through it; blocks are then remembered."""
    made, at = network(F64), inputs(F64)

    def both():
        tangent = torch.func.jvp(lambda b: made(*at[:2], b, *at[3:]), (at[2],), (torch.ones_like(at[2]),))[1]
        return [tangent.detach(), *torch.autograd.grad(tangent.square().sum(), made.blocks[0].mlp[0].weight)]

    before = both()
    made.configure(recompute=True)
    assert all(torch.equal(x, y) for x, y in zip(before, both(), strict=True))


# -- autocast --------------------------------------------------------------------------------------------------------


def test_autocast_gives_float32_and_rounds_products_only():
    made, at = network(F64), inputs(F64)
    exact = made(*at)
    made, at = made.float(), [x.float() for x in at]
    with torch.autocast("cpu", torch.bfloat16):
        out = made(*at)
    assert out.dtype == torch.float32
    error = float((out - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    # a rounding is 2⁻⁹ of a number; six blocks of four products each add theirs as a random walk: 2⁻⁹·√24 = .01
    assert 1e-4 < error < 0.02


def test_times_survive_autocast():
    """Without blocks all is computed from times and patches once a sample: nothing may be rounded at all."""
    made, at = network(depth=1, encoder_depth=1), inputs()
    made.blocks = torch.nn.ModuleList()
    expected = made(*at)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(*at), expected)
        rounded = [x.bfloat16() for x in at]
        torch.testing.assert_close(made(*rounded), made(*[x.float() for x in rounded]), rtol=0, atol=0)


def test_a_difference_in_time_survives_autocast(monkeypatch):
    """Of step .02: with the times in bfloat16 too it is several times worse."""
    made, at = network(F64, width=64), inputs(F64, n=16)
    h = 0.02

    def difference():
        a, b = at[1] * 0.5, at[2] * 0.5 + 0.4
        ahead, behind = (made(at[0], a, time, *at[3:]).double() for time in (b + h, b - h))
        return (ahead - behind) / (2 * h)

    with torch.no_grad():
        exact = difference()
        made, at = made.float(), [x.float() for x in at]
        errors = []
        for kept in (True, False):
            if not kept:
                monkeypatch.setattr(dit_module, "unrounded", as_given)
            with torch.autocast("cpu", torch.bfloat16):
                errors.append(float((difference() - exact).square().mean().sqrt() / exact.square().mean().sqrt()))
    assert errors[1] > 2 * errors[0]


class as_given:
    """Autocast as it comes."""

    def __init__(self, *given):
        self.given = given

    def __enter__(self):
        return self.given

    def __exit__(self, *_):
        return None
