"""Compiled networks: what is trusted and remembered, what is compiled again, and what runs as it is written."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import metaflowmaps as mfm
from conftest import F64, normal, uniform
from metaflowmaps.errors import InputError
from metaflowmaps.networks import DiTConfig, MLPConfig, UNetConfig, compiling
from metaflowmaps.networks.compiling import Comparison, Compilable, cache_file, compare, compilable, use_compiled
from metaflowmaps.random import stream

CPU = torch.device("cpu")
EVENT = (2, 6, 6)
CONFIGS = {
    "mlp": MLPConfig(width=16, depth=3, num_classes=3, guidance=True, modulation=True),
    "unet": UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention=(3,), num_classes=3),
    "dit": DiTConfig(width=16, depth=3, heads=2, num_classes=3),
}


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "_checked", {})


def counters():
    """What torch has compiled; the package never asks (and seconds to import, which few tests should pay)."""
    from torch._dynamo.utils import counters

    return counters


def awake(name, dtype=torch.float32):
    """A network of which no layer gives 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = CONFIGS[name].network(EVENT).to(dtype)
    generator = stream(0, "weights")
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=dtype)
    return made


def inputs(n=3, dtype=torch.float32):
    a, b, t = (uniform(n, seed=name).to(dtype) for name in "abt")
    z, context = (normal(n, *EVENT, seed=name).to(dtype) for name in ("z", "context"))
    return [z, a, b, context, t, torch.arange(n) % 4]


def gradients(made, at):
    out = made(*at)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [p for p in made.parameters() if p.ndim > 1])]


def stand_in(monkeypatch, compiled):
    """What a compiler makes of any core; nothing is compiled, and what belongs to it takes seconds to import."""
    calls = []
    monkeypatch.setattr(compiling, "compiled_core", lambda kind: calls.append(kind) or compiled)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    return calls


# -- trust -----------------------------------------------------------------------------------------------------------


def right(part, *inputs):
    return part.core(*inputs)


def no_compiler(part, *inputs):
    raise RuntimeError("No working C++ compiler\nwas found")


@pytest.mark.parametrize(
    ("compiled", "says"),
    [
        (
            lambda part, x, *more: part.core(1.3 * x - 0.3 * x.detach(), *more),
            r"off by 0\.\d+ \(at most 0.001\): use another version of torch, or set compile=false",
        ),
        (lambda part, *x: 1.01 * part.core(*x), r"off by 0\.0"),
        (lambda part, *x: torch.nan * part.core(*x), "off by nan"),
        (no_compiler, r"RuntimeError: No working C\+\+ compiler was found\): install g\+\+, or set compile=false"),
    ],
    ids=["gradient", "value", "nan", "fails"],
)
def test_a_compiler_that_is_wrong_is_refused(compiled, says, monkeypatch):
    """On any torch: what counts is whether it computes what is written."""
    stand_in(monkeypatch, compiled)
    network = awake("dit")
    before = torch.get_rng_state()
    with pytest.raises(InputError, match=says) as caught:
        use_compiled(network, True, CPU)
    assert "\n" not in str(caught.value)
    assert not any(block.compiled for block in network.blocks)
    assert torch.equal(torch.get_rng_state(), before)


def test_auto_goes_on_as_written_where_the_compiler_is_wrong(monkeypatch):
    monkeypatch.setattr(compiling, "compare", lambda *given: (Comparison(0.4, 1e-3, 5.0), True))
    network = awake("dit")
    line = use_compiled(network, "auto", "cuda")
    assert line.startswith("not compiled: torch.compile is wrong with torch ")
    assert not any(block.compiled for block in network.blocks)


def test_auto_compiles_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(compiling, "compare", lambda *given: (Comparison(1e-6, 1e-3, 5.0), True))
    network = awake("dit")
    assert use_compiled(network, "auto", CPU) is None
    assert not any(block.compiled for block in network.blocks)
    assert "(checked in 5 s: off by 1e-06)" in use_compiled(network, "auto", "cuda")
    assert all(block.compiled for block in network.blocks)
    assert use_compiled(network, False, "cuda") is None
    assert not any(block.compiled for block in network.blocks)


def test_a_network_that_does_not_say_what_can_be_compiled_is_left_as_it_is():
    other = torch.nn.Linear(2, 2)
    assert use_compiled(other, "auto", "cuda") is None
    with pytest.raises(InputError, match="and Linear does not: set compile=false"):
        use_compiled(other, True)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_network_beside_itself_agrees(name, precision, monkeypatch):
    kinds = stand_in(monkeypatch, right)
    found, fresh = compare(awake(name), CPU, precision)
    assert found.agrees
    assert fresh
    assert (found.error == 0) == (precision == "float32")  # the reference is in float32
    if name == "dit":
        assert len(kinds) == 2  # of two blocks, whatever the depth


def test_a_comparison_is_made_once_and_remembered(monkeypatch):
    calls = stand_in(monkeypatch, right)
    assert compare(awake("mlp"), CPU, "float32")[1]
    made = len(calls)
    for forget in (False, True):  # in this process, and in another
        if forget:
            compiling._checked.clear()
        found, fresh = compare(awake("mlp"), CPU, "float32")
        assert not fresh
        assert len(calls) == made
    assert "checked before" in use_compiled(awake("mlp"), True, CPU)
    assert json.loads(cache_file().read_text()).popitem()[1] == list(found)
    for change in ("precision", "config", "torch"):
        compiling._checked.clear()
        if change == "torch":
            monkeypatch.setattr(torch, "__version__", "9.9")
        assert compare(
            awake("unet" if change == "config" else "mlp"), CPU, "bf16" if change == "precision" else "float32"
        )[1]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 3}', '{"a": [1, 2]}'])
def test_a_damaged_cache_is_replaced(text, monkeypatch):
    stand_in(monkeypatch, right)
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(text)
    assert compare(awake("mlp"), CPU, "float32")[1]
    assert len(json.loads(cache_file().read_text())) == 1


def test_a_home_that_cannot_be_written_to_is_no_obstacle(tmp_path, monkeypatch):
    stand_in(monkeypatch, right)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compare(awake("mlp"), CPU, "float32")[0].agrees


# -- what runs -------------------------------------------------------------------------------------------------------


def test_forward_mode_runs_as_written(monkeypatch):
    network, at = awake("dit", F64), inputs(dtype=F64)

    def tangent():
        return torch.func.jvp(lambda b: network(*at[:2], b, *at[3:]), (at[2],), (torch.ones_like(at[2]),))[1].detach()

    straight = tangent()
    stand_in(monkeypatch, no_compiler)
    for part in compilable(network):
        part.compiled = True
    assert torch.equal(tangent(), straight)
    with pytest.raises(RuntimeError, match="compiler"):
        network(*at)


def traced(monkeypatch, network):
    """Compiled as far as the traced graph: no code is generated, which takes a minute."""
    monkeypatch.setattr(
        compiling, "compiled_core", compiling.cache(lambda kind: torch.compile(kind.core, backend="eager"))
    )
    torch.compiler.reset()
    counters().clear()
    for part in compilable(network):
        part.compiled = True
    return network


@pytest.mark.parametrize("name", ["unet", *(pytest.param(n, marks=pytest.mark.attack) for n in ("dit", "mlp"))])
def test_nothing_is_compiled_again_in_steady_state(name, monkeypatch):
    """A step's calls: with gradient, without one, and of as many rows as guidance moves, which changes."""
    plain = awake(name)
    network = traced(monkeypatch, copy.deepcopy(plain))

    def step(moved):
        made = [gradients(network, inputs(n)) for n in (6, 4)]
        with torch.no_grad():
            network(*inputs(moved))
        return made

    for moved in (3, 2):
        made = step(moved)
    graphs = counters()["stats"]["unique_graphs"]
    assert graphs <= 4  # with and without gradient, of one size and of any
    for moved in (5, 7, 2):
        step(moved)
    assert counters()["stats"]["unique_graphs"] == graphs
    assert not counters()["graph_break"]
    for one, n in zip(made, (6, 4), strict=True):  # sums of a few hundred products, in another order at most
        for x, y in zip(one, gradients(plain, inputs(n)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


def test_a_pipeline_and_its_commands_run_compiled(tmp_path, monkeypatch, command):
    """Both through the same compiled part, and to the same samples."""
    kinds = stand_in(monkeypatch, right)
    pipe = mfm.Pipeline.from_pretrained("digits", compile=True)
    assert not kinds  # until something is made
    made = pipe(steps=2, seed=0).latents
    checked = len(kinds)
    assert torch.equal(mfm.Pipeline.from_pretrained("digits")(steps=2, seed=0).latents, made)
    assert len(kinds) == checked > 2
    asked = ("sample", "digits", "--num", "2", "--seed", "0")
    for choice in ("true", "auto"):
        code, _, said = command(*asked, "--compile", choice, "--out", tmp_path / choice)
        assert code == 0
        assert ("network: compiled by torch" in said) == (choice == "true")
    assert len(kinds) > checked
    one, other = (load_file(tmp_path / choice / "samples.safetensors") for choice in ("true", "auto"))
    assert torch.equal(one["samples"], other["samples"])


# -- the compiler itself ---------------------------------------------------------------------------------------------

inductor = [
    pytest.mark.attack,  # generating code takes up to a minute a network
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


@pytest.mark.parametrize("name", [pytest.param(name, marks=inductor) for name in CONFIGS])
def test_compiled_networks_agree(name):
    network, at = awake(name), inputs()
    eager, keys = gradients(network, at), list(network.state_dict())
    assert "checked in" in use_compiled(network, True, CPU)
    with torch._dynamo.config.patch(error_on_recompile=True):  # all blocks, and a copy, by one compilation
        compiled = gradients(network, at)
        copied = gradients(copy.deepcopy(network), at)
    assert any(not torch.equal(x, y) for x, y in zip(eager, compiled, strict=True))  # something was compiled
    # float32 sums of up to 128 products in another order, through a few layers
    for others in (compiled, copied):
        for x, y in zip(eager, others, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
    assert list(network.state_dict()) == keys


@pytest.mark.parametrize("copied", [pytest.param(kept, marks=inductor) for kept in (True, False)])
def test_a_wrong_gradient_of_the_compiler_is_found(copied, monkeypatch):
    """Torch 2.13 is wrong where a block's input is not contiguous: copied it is right, and as it is, refused."""
    if not copied:
        if not torch.__version__.startswith("2.13"):
            pytest.skip("of torch 2.13")
        plain = Compilable.run
        monkeypatch.setattr(
            Compilable,
            "run",
            lambda self, *x: compiling.compiled_core(type(self))(self, *x) if self.compiled else plain(self, *x),
        )
    found, _ = compare(awake("dit"), CPU, "float32")
    assert found.agrees == copied, found
