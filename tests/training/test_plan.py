"""Plans of runs at scale: counts against the real code, memory against what autograd keeps, and refusals."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from metaflowmaps.errors import InputError
from metaflowmaps.networks.dit import SIZES, DiT
from metaflowmaps.networks.flops import forward_flops
from metaflowmaps.recipes import recipe
from metaflowmaps.training.plan import GPUS, count_calls, kept_bytes, plan, spec_of

TINY = {"channels": 4, "size": 8, "patch": 2, "width": 32, "depth": 4, "heads": 4, "encoder_depth": 2,
        "num_classes": 10, "guidance": [1.0, 2.5], "mlp_ratio": 4.0}  # fmt: skip


def changed(loss=None, **update):
    config = recipe("imagenet-b2")
    if loss:
        update["loss"] = config.loss.model_copy(update=loss)
    return config.model_copy(update=update)


@pytest.mark.parametrize(
    "spec",
    [
        TINY,
        {**TINY, "guidance": True},
        {**TINY, "guidance": False},
        {**TINY, "width": 64, "depth": 2, "size": 16, "mlp_ratio": 2.0, "patch": 4},
    ],
)
def test_flops_are_those_that_torch_counts(spec):
    network = DiT(**spec)
    x, t, y = torch.zeros(3, 4, spec["size"], spec["size"]), torch.full((3,), 0.5), torch.zeros(3, dtype=torch.int64)
    scale = {} if spec["guidance"] is False else {"guidance": torch.ones(3)}
    # the fused attention of a processor is not among what torch counts, the composed one is
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(x, t, t, x, t, label=y, **scale)
    assert forward_flops(spec) == counter.get_total_flops() / 3


def test_known_sizes():
    """119 GFLOP multiply-adds of DiT-XL/2 and 23 of B/2 (Peebles and Xie), twice."""
    for size, macs in (("XL", 118.6), ("B", 23.0)):
        flops = forward_flops({**TINY, **SIZES[size], "size": 32})
        assert flops / 2e9 == pytest.approx(macs, rel=0.01)  # theirs leave out the context


@pytest.mark.parametrize(
    ("loss", "with_gradient", "without", "forward", "teacher"),
    [
        # a quarter of the rows is consistency; a guided row (half of .8) asks the teacher twice
        ({"consistency": "lagrangian-difference"}, 0.75 + 2 * 0.25, 0, 0, 1),
        ({"consistency": "semigroup"}, 1, 2 * 0.25, 0, 0.75),
        ({"consistency": "eulerian", "derivative": "forward"}, 1, 0, 0.25, 1),
        ({"consistency": "eulerian", "derivative": "difference"}, 1, 2 * 0.25, 0, 1),
        ({"consistency": "lagrangian", "derivative": "forward"}, 0.75 + 2 * 0.25, 0, 0.25, 1),
        ({"consistency": "none"}, 1, 0, 0, 1),
    ],
)
def test_calls_of_every_loss(loss, with_gradient, without, forward, teacher):
    config = changed({**loss, "velocity": "teacher"})
    calls = count_calls(config, spec_of(config))
    assert (calls.with_gradient, calls.without, calls.forward_mode) == (with_gradient, without, forward)
    rows = teacher * (1 + 0.4)
    assert calls.teacher == pytest.approx(
        rows, abs=0.15
    )  # 64 rows: the guided ones are drawn, 4 % either way twice over


def test_memory_grows_with_depth_and_precision_and_shrinks_when_recomputed():
    shallow, deep = (kept_bytes({**TINY, "depth": d}, False, False) for d in (4, 8))
    assert deep - shallow == pytest.approx(2 * (shallow - kept_bytes({**TINY, "depth": 2}, False, False)), rel=1e-6)
    assert kept_bytes(TINY, True, False) < 0.8 * kept_bytes(TINY, False, False)
    assert kept_bytes({**TINY, "depth": 28}, False, True) < 0.2 * kept_bytes({**TINY, "depth": 28}, False, False)


def test_kept_bytes_are_what_a_whole_network_keeps():
    spec, kept, alive = {**TINY, "depth": 6}, {}, []
    network = DiT(**spec)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            alive.append(x)
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    rows = 16
    x, t, y = torch.zeros(rows, 4, 8, 8), torch.full((rows,), 0.5), torch.zeros(rows, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        network(x, t, t, x, t, label=y)
    # what has no row (a table's transpose, frequencies) is a few kilobytes, a hundredth of sixteen rows
    assert kept_bytes(spec, False, False) * rows == pytest.approx(sum(kept.values()), rel=0.03)


def test_a_plan_needs_neither_data_nor_parent():
    found = plan(recipe("imagenet-b2"), "h200", 8)
    assert round(found["parameters"] / 1e6) == 135
    assert round(found["parameters_of_parent"] / 1e6) == 130
    one = plan(recipe("imagenet-b2"), "h200", 1)
    assert one["expected_hours"] == pytest.approx(8 * found["expected_hours"])
    assert one["memory_optimizer_gib"] == pytest.approx(8 * found["memory_optimizer_gib"])
    copies = plan(changed(shard=1), "h200", 8)
    assert copies["memory_optimizer_gib"] == pytest.approx(one["memory_optimizer_gib"])
    slow = plan(recipe("imagenet-b2"), "a100", 8)
    assert slow["expected_hours"] / found["expected_hours"] == pytest.approx(GPUS["h200"].tflops / GPUS["a100"].tflops)


def test_what_cannot_fit_is_refused_with_the_fix():
    big = changed(micro_batches=1, batch_size=4096)
    with pytest.raises(InputError, match=r"imagenet-b2 needs \d+ GiB .*and l40s has 44: --set micro_batches=2 or more"):
        plan(big, "l40s")
    plan(big.model_copy(update={"checkpoint_activations": True}), "h200")
    with pytest.raises(InputError, match="did you mean 'h100'"):
        plan(recipe("imagenet-b2"), "h10")
    with pytest.raises(InputError, match=r"set model.event_shape and model.network"):
        plan(recipe("images"))
