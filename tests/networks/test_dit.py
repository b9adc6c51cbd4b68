"""The transformer: which part reads which time at first, the sizes of the family, and its released layout."""

import pytest
import torch
from safetensors.torch import load_file

from conftest import F64, normal, uniform
from metaflowmaps.networks.dit import SIZES, DiTConfig
from metaflowmaps.networks.embed import positions, sinusoid
from metaflowmaps.random import stream


def fresh(**options):
    """A network as initialised but for modulations, gates and the final layer: only the embeddings are silent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DiTConfig(width=16, depth=3, heads=2, encoder_depth=2, **options).network((2, 6, 6)).double()
    generator = stream(0, "modulation")
    with torch.no_grad():
        for key, p in network.named_parameters():
            if "modulation" in key or key.startswith("final."):
                p += 0.5 * torch.randn(p.shape, generator=generator, dtype=F64)
    return network


def states(network, *at, **cond):
    """The tokens after each block, and the output."""
    seen = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: seen.append(out)) for block in network.blocks]
    with torch.no_grad():
        seen.append(network(*at, **cond))
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture
def at():
    a, b, t = (uniform(3, seed=name) for name in "abt")
    return [normal(3, 2, 6, 6, seed="z"), a, b, normal(3, 2, 6, 6, seed="context"), t]


def changed(network, at, i, **cond):
    """Which of the three blocks' states and the output change when input i does."""
    moved = [x.flip(0) if j == i else x for j, x in enumerate(at)]
    before, after = states(network, *at, **cond), states(network, *moved, **cond)
    return [not torch.equal(x, y) for x, y in zip(before, after, strict=True)]


def test_at_initialisation_the_first_part_sees_a_and_the_second_b(at):
    network = fresh(num_classes=3, guidance=True)
    assert changed(network, at, 1) == [True, True, True, True]
    assert changed(network, at, 2) == [False, False, True, True]
    # with the first part's output held, the second part does not see a either
    late = fresh(num_classes=3)
    late.blocks[1].register_forward_hook(lambda _m, _i, out: torch.ones_like(out))
    assert changed(late, at, 1)[2:] == [False, False]
    assert changed(late, at, 2)[2:] == [True, True]


def test_at_initialisation_the_context_counts_for_nothing(at):
    network = fresh(num_classes=3, guidance=True)
    assert changed(network, at, 3) == [False] * 4
    assert changed(network, at, 4) == [False] * 4


def test_guidance_is_for_the_first_part_and_labels_for_both(at):
    network = fresh(num_classes=3, guidance=True)
    with torch.no_grad():
        network.guidance.mlp[3].weight += 1.0
    network.blocks[1].register_forward_hook(lambda _m, _i, out: torch.ones_like(out))

    def differ(one, other):
        pairs = zip(states(network, *at, **one), states(network, *at, **other), strict=True)
        return [not torch.equal(x, y) for x, y in pairs]

    assert differ({"guidance": torch.full((3,), 2.5)}, {}) == [True, False, False, False]
    assert differ({"label": torch.tensor([0, 1, 2])}, {}) == [True, False, True, True]


def test_every_parameter_is_reached_by_the_gradient_after_some_steps(at):
    network = fresh(num_classes=3, guidance=True)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    label, scale = torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 3.0])
    for _ in range(3):
        optimizer.zero_grad()
        network(*at, label=label, guidance=scale).square().sum().backward()
        optimizer.step()
    still = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.count_nonzero()]
    assert still == []


@pytest.mark.parametrize(("size", "millions"), [("XL", 684), ("B", 135)])
@pytest.mark.parametrize("guidance", [False, [1.0, 2.5]])
def test_parameters_of_the_released_sizes(size, millions, guidance):
    with torch.device("meta"):
        network = DiTConfig(patch=2, num_classes=1000, guidance=guidance, **SIZES[size]).network((4, 32, 32))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions
    assert network.config.encoder_depth == {"XL": 20, "B": 8}[size]


def test_sizes_grow():
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in DiTConfig(patch=2, **size).network((4, 32, 32)).parameters())
            for size in SIZES.values()
        ]
    assert counts == sorted(counts)
    with torch.device("meta"):
        small = DiTConfig(patch=2, num_classes=10, **SIZES["nano"]).network((1, 8, 8))
    assert 0.25e6 < sum(p.numel() for p in small.parameters()) < 0.45e6


def test_sinusoid():
    """cos first, then sin; frequencies fall from 1 by equal factors towards 1/10,000."""
    t = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    out = sinusoid(t, 8)
    omega = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=F64)
    expected = torch.cat([torch.cos(t[:, None] * omega), torch.sin(t[:, None] * omega)], 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-15)


def test_positions_tell_rows_from_columns():
    grid = positions(16, 3).unflatten(0, (3, 3))
    assert torch.equal(grid[0, :, :8], grid[2, :, :8])  # columns in the first half
    assert torch.equal(grid[:, 0, 8:], grid[:, 2, 8:])  # rows in the second
    assert len(grid.flatten(0, 1).unique(dim=0)) == 9
    torch.testing.assert_close(grid[1, 2, 0], torch.tensor(2.0).sin())
    torch.testing.assert_close(grid[1, 2, 12], torch.tensor(1.0).cos())


RENAMED = [
    ("dit.", ""),
    ("x_embedder.proj", "state_patches"),
    ("x_cond_embedder.proj", "context_patches"),
    ("x_cond_adaLN", "context_gate"),
    ("pos_embed", "positions"),
    ("t_cond_embedder", "context_time"),
    ("s_embedder_second", "late_a"),
    ("t_embedder_second", "late_b"),
    ("s_embedder", "early_a"),
    ("t_embedder", "early_b"),
    ("y_embedder.embedding_table.weight", "labels.table"),
    ("guidance_embedder.embedding_table.weight", "guidance.table"),
    ("final_layer", "final"),
    ("adaLN_modulation", "modulation"),
    ("attn.proj", "attention.out"),
    ("attn", "attention"),
    ("fc1", "0"),
    ("fc2", "2"),
]


def test_the_released_layout_loads_by_renaming(interop_files):
    """The tiny public checkpoint, its time reversed and its sign turned as it was trained, gives its stored outputs."""
    stored, io = (load_file(interop_files / f"mfm_{part}.safetensors") for part in ("weights", "io"))
    network = DiTConfig(
        patch=2, width=48, depth=4, heads=4, encoder_depth=3, num_classes=10, guidance=[1.0, 2.5]
    ).network((4, 8, 8))
    weights = {}
    for key, value in stored.items():
        for old, new in RENAMED:
            key = key.replace(old, new)
        weights[key] = value
    assert torch.equal(network.positions, weights["positions"])
    network.load_state_dict(weights)

    def velocity(x, s, u):
        return -network(x, 1 - s, 1 - u, io["x_t"], io["t"], label=io["y"], guidance=io["guidance"])

    with torch.no_grad():
        out = velocity(io["x"], io["s"], io["u"])
        at, along = (io["x"], io["s"], io["u"]), (io["tangent"], torch.ones_like(io["s"]), torch.zeros_like(io["u"]))
        tangent = torch.func.jvp(velocity, at, along)[1]
    # float32 on outputs up to 6, through four blocks
    torch.testing.assert_close(out, io["velocity"], rtol=1e-4, atol=3e-5)
    torch.testing.assert_close(tangent, io["jvp"], rtol=1e-3, atol=3e-4)
