"""The fused kernel's derivative: by Triton's interpreter where there is no GPU, on the GPU where there is one."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch

from metaflowmaps.training.derivative import fused_error

# a process of its own: the interpreter is chosen when Triton is imported
INTERPRETED = """
import sys
sys.path.insert(0, "tests")
import torch
from conftest import normal, uniform
from metaflowmaps import losses
from metaflowmaps.networks.attention import attend
from metaflowmaps.networks.dit import DiTConfig
from metaflowmaps.training.derivative import fused_error

# float32: sums of 100 products of numbers near 1. float16 (the interpreter has no bfloat16): a rounding is 2⁻¹¹
for width in (16, 24):
    assert fused_error("cpu", width, torch.float32) < 1e-6
    assert 1e-5 < fused_error("cpu", width, torch.float16) < 4e-3

# values, and a head whose scores are far apart
q, k, v, dq, dk, dv = (normal(2, 1, 37, 16, seed=name, dtype=torch.float32) for name in ("q", "k", "v", "a", "b", "c"))
with torch.no_grad():
    given = (30 * q, k, v), (dq, dk, dv)
    out, tangent = torch.func.jvp(lambda *x: attend(*x, fused_tangents=True), *given)
    value, composed = torch.func.jvp(attend, *given)
torch.testing.assert_close(out, value, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(tangent, composed, rtol=1e-3, atol=1e-4)  # scores of 100, rounded at 1e-5

# a loss through a network, and its gradient
torch.manual_seed(0)
network = DiTConfig(patch=2, width=32, depth=2, heads=2, encoder_depth=1).network((1, 8, 8))
with torch.no_grad():
    for p in network.parameters():
        p += 0.1 * torch.randn_like(p)
context, t = normal(2, 1, 8, 8, seed="x").float(), uniform(2).float()
flow = lambda a, b, z: network(z, a, b, context, t)
a, b, z = torch.tensor([0.1, 0.4]), torch.tensor([0.7, 0.5]), normal(2, 1, 8, 8, seed="z").float()

def both(fused):
    network.configure(fused_tangents=fused)
    loss = losses.eulerian(flow, a, b, z, torch.ones_like(z))
    return [loss.detach(), torch.autograd.grad(loss.sum(), network.blocks[0].attention.qkv.weight)[0]]

for x, y in zip(both(True), both(False), strict=True):
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))

# where a gradient through the JVP is wanted the composed form does it
size = lambda w: torch.func.jvp(lambda b: torch.func.functional_call(network, {"blocks.0.attention.qkv.weight": w},
    (z, a, b, context, t)), (b,), (torch.ones_like(b),))[1].square().sum()
weight = network.blocks[0].attention.qkv.weight
network.configure(fused_tangents=True)
(with_fused,) = torch.autograd.grad(size(weight), weight)
network.configure()
assert torch.equal(with_fused, torch.autograd.grad(size(weight), weight)[0])
"""


def has_triton() -> bool:
    """One that the extra ``fused`` allows: the interpreter of 3.6 takes no NumPy of today."""
    try:
        major, minor = importlib.metadata.version("triton").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 7)


@pytest.mark.skipif(not has_triton(), reason="needs triton (pip install 'triton>=3.7')")
def test_the_kernel_by_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width", [64, 72])
def test_the_kernel_on_the_accelerator(width):
    assert fused_error("cuda", width) < 0.03
