"""Factors beside frozen weights: nothing at first, alone in being trained, and gone when the checkpoint is loaded."""

import json
import os

import pytest
import torch
from test_tune import base, small, tune
from torch import nn

import metaflowmaps as mfm
from conftest import F64, normal, uniform
from metaflowmaps import losses
from metaflowmaps.checkpoint import resolve_checkpoint
from metaflowmaps.checkpoint.models import export_run
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks import make_network
from metaflowmaps.networks.low_rank import LowRank, add_low_rank, fold, rank_of
from metaflowmaps.random import stream

NETWORKS = {
    "mlp": {"name": "mlp", "dim": 2, "width": 8, "depth": 2, "num_classes": 3},
    "unet": {"name": "unet", "channels": 1, "size": 8, "width": 16, "multipliers": [1, 2], "blocks": 1},
    "dit": {"name": "dit", "channels": 1, "size": 8, "patch": 2, "width": 16, "depth": 2, "heads": 2},
}


def made(name):
    """A network with no weight at 0: at initialisation many are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make_network(NETWORKS[name])
    for i, weight in enumerate(network.parameters()):
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.2, generator=stream(0, "weights", i))
    return network.to(F64)


def answer(network, n=3):
    shape = tuple(network.event_shape)
    a, b, t = (uniform(n, seed=name) for name in "abt")
    z, x = normal(n, *shape, seed="z"), normal(n, *shape)
    with torch.no_grad():
        return network(z, a, b, x, t)


def matrices(network):
    """Every weight that multiplies its input: all of two and more dimensions but tables of labels."""
    tables = [m.weight for m in network.modules() if isinstance(m, nn.Embedding)]
    return {
        name: weight
        for name, weight in network.named_parameters()
        if name.endswith("weight") and weight.ndim > 1 and all(weight is not table for table in tables)
    }


def filled(network, scale=0.3):
    """The same with B at random."""
    for i, module in enumerate(m for m in network.modules() if isinstance(m, LowRank)):
        nn.init.normal_(module.b, std=scale, generator=stream(0, "b", i))
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_with_fresh_factors_is_the_network(name):
    """To rounding (float64, some layers): torch folds a product by whether its weight asks for a gradient."""
    network = made(name)
    before = answer(network)
    add_low_rank(network, 1, stream(0, "factors"))
    torch.testing.assert_close(answer(network), before, rtol=1e-12, atol=1e-12)
    assert float((answer(filled(network)) - before).abs().max()) > 1e-2


@pytest.mark.parametrize("name", NETWORKS)
def test_every_matrix_that_is_larger_than_its_factors_has_them(name):
    """rank · (rows + columns) numbers instead of rows · columns, a convolution's columns being its patches."""
    network = made(name)
    sizes = {key: (len(weight), weight[0].numel()) for key, weight in matrices(network).items()}
    add_low_rank(network, 2)
    trained = {key for key, weight in network.named_parameters() if weight.requires_grad}
    expected = {
        key.removesuffix("weight") + f"parametrizations.weight.0.{factor}"
        for key, (rows, columns) in sizes.items()
        if 2 * (rows + columns) < rows * columns
        for factor in "ab"
    }
    assert trained == expected
    assert rank_of(network) == 2


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_weights_differ_by_the_rank_and_answer_alike(name):
    network = made(name)
    plain = {key: weight.detach().clone() for key, weight in network.state_dict().items()}
    add_low_rank(network, 2, stream(0, "factors"))
    before = answer(filled(network))
    fold(network)
    assert rank_of(network) == 0
    assert torch.equal(answer(network), before)
    folded = network.state_dict()
    assert folded.keys() == plain.keys()
    moved = {
        key: (value - plain[key]).flatten(1) for key, value in folded.items() if not torch.equal(value, plain[key])
    }
    assert moved
    assert moved.keys() <= matrices(network).keys()
    for change in moved.values():
        values = torch.linalg.svdvals(change)
        # the rank is 2; beyond it there is the rounding of W + B A, 1e-16 of W
        assert values[1] > 1e-3
        assert values[2:].max() < 1e-13


LOSSES = {
    "eulerian": lambda flow, a, b, z, v: losses.eulerian(flow, a, b, z, v),
    "lagrangian": lambda flow, a, b, z, v: losses.lagrangian(flow, a, b, z, lambda a, z: v),
    "lagrangian-difference": lambda flow, a, b, z, v: losses.lagrangian_difference(
        flow, a, b, z, lambda a, z: v, 5e-3
    ),
    "semigroup": lambda flow, a, b, z, v: losses.semigroup(flow, a, b, z, torch.full_like(a, 0.4)),
    "diagonal": lambda flow, a, b, z, v: losses.diagonal(flow, a, z, v),
}  # fmt: skip


@pytest.mark.parametrize("name", ["mlp", "unet"])
@pytest.mark.parametrize("kind", LOSSES)
def test_losses_see_the_factors_by_the_chain_rule(kind, name):
    """∂L/∂B = (∂L/∂W) Aᵀ and ∂L/∂A = Bᵀ (∂L/∂W) at the folded W: through derivatives and differences in time too."""
    network = made(name)
    add_low_rank(network, 1, stream(0, "factors"))
    filled(network)
    plain = made(name)
    with torch.no_grad():
        for key, module in network.named_modules():
            if hasattr(module, "parametrizations"):
                plain.get_submodule(key).weight.copy_(module.weight)
    values = []
    for each in (network, plain):
        model, n = mfm.MetaFlowMap(each, mfm.LinearPath()), 3
        a, b = torch.stack([uniform(n, seed="a"), uniform(n, seed="b")]).sort(0).values
        z, x, v = (normal(n, *each.event_shape, seed=which) for which in ("z", "x", "v"))
        loss = LOSSES[kind](model.anchor(uniform(n, high=0.9), x), a, b, z, v)
        loss.sum().backward()
        values.append(loss.detach())
    # float64: the folded weights are the same numbers, sums run in another order
    torch.testing.assert_close(values[0], values[1], rtol=1e-11, atol=1e-12)
    seen = 0
    for key, module in network.named_modules():
        if hasattr(module, "parametrizations"):
            factors, whole = module.parametrizations.weight[0], plain.get_submodule(key).weight.grad.flatten(1)
            torch.testing.assert_close(factors.b.grad, whole @ factors.a.T, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(factors.a.grad, factors.b.T @ whole, rtol=1e-9, atol=1e-10)
            seen += bool(factors.b.grad.any())
    assert seen > 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run at rank 1."""
    out, fsync = tmp_path_factory.mktemp("low-rank"), os.fsync
    os.fsync = lambda descriptor: None  # most of its time
    try:
        tune(small(low_rank=1, guidance=2.5), out)
    finally:
        os.fsync = fsync
    return out


@pytest.mark.parametrize("stage", ["drift", "."])
def test_training_moves_the_factors_alone(run, stage):
    before = base(3).state_dict()
    after = resolve_checkpoint(run / stage).tensors("model.safetensors")
    frozen = {key.replace("parametrizations.weight.original", "weight"): v for key, v in after.items()}
    assert {key for key in frozen if "parametrizations" not in key} == before.keys()
    assert all(torch.equal(frozen[key], value) for key, value in before.items())
    factors = {key: value for key, value in after.items() if key.endswith((".0.a", ".0.b"))}
    assert len(factors) >= 4
    assert all(bool(value.any()) for value in factors.values())  # each B has left 0
    assert all(value.shape[1 if key.endswith("b") else 0] == 1 for key, value in factors.items())


def test_its_checkpoint_loads_as_an_ordinary_map_of_the_same_answers(run):
    """The averaged weights, folded: what the factored network with them answers, to the bit."""
    checkpoint = resolve_checkpoint(run)
    assert checkpoint.config["low_rank"] == 1
    factored = base(3)
    add_low_rank(factored.network, 1)
    factored.load_state_dict(checkpoint.tensors("ema.safetensors"))
    state = torch.random.get_rng_state()
    loaded = MetaFlowMap.from_pretrained(run)
    assert torch.equal(torch.random.get_rng_state(), state)  # loading draws nothing from the caller's numbers
    assert loaded.state_dict().keys() == base(3).state_dict().keys()
    assert type(loaded.network.input) is nn.Linear
    x = normal(5, 2, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded.drift(0.4, x), factored.drift(0.4, x))
        assert torch.equal(loaded.push(x, 0.4, x), factored.push(x, 0.4, x))
        assert not torch.equal(loaded.drift(0.4, x), base(3).drift(0.4, x))


def test_what_was_loaded_can_be_saved_and_trained_like_any_map(run, tmp_path):
    loaded = MetaFlowMap.from_pretrained(run)
    assert all(p.requires_grad for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "low_rank" not in config
    again = MetaFlowMap.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_exported_in_half_precision_the_sum_is_not_rounded_once_more(run, tmp_path):
    """W, B and A are stored in 16 bits; W + B A, made when it is loaded, has 32."""
    export_run(run, tmp_path / "exported", {})
    stored = resolve_checkpoint(tmp_path / "exported").tensors("model.safetensors")
    key = "network.input.parametrizations.weight"
    assert stored[f"{key}.original"].dtype == torch.float16
    original, a, b = (stored[f"{key}.{part}"].float() for part in ("original", "0.a", "0.b"))
    weight = MetaFlowMap.from_pretrained(tmp_path / "exported").network.input.weight
    # float32; in float16 the sum would be off by 2^-11 of a weight
    torch.testing.assert_close(weight.detach(), original + b @ a, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank", [0, -1, 8, 1000])
def test_ranks_that_save_nothing_are_refused(rank):
    network = base().network
    before = [p.requires_grad for p in network.parameters()]
    with pytest.raises(InputError, match="at least 1" if rank < 1 else "lower it") as error:
        add_low_rank(network, rank)
    assert "\n" not in str(error.value)
    if rank < 1:
        assert [p.requires_grad for p in network.parameters()] == before


def test_tuning_can_go_on_from_what_was_tuned_at_low_rank(run, tmp_path):
    """Another factor on top: again only factors move, now beside the folded weights."""
    from metaflowmaps.finetuning.tune import run_finetuning

    model = MetaFlowMap.from_pretrained(run)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    run_finetuning(small(low_rank=1, guidance=2.5, map="none"), model, lambda x: x[:, 0], tmp_path)
    after = resolve_checkpoint(tmp_path).tensors("model.safetensors")
    key = "network.input.parametrizations.weight.original"
    assert torch.equal(after[key], before["network.input.weight"])
    assert not torch.equal(before["network.input.weight"], base(3).state_dict()["network.input.weight"])
