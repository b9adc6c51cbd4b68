"""What every image network owes: limits at initialisation, derivatives, independent rows, conditions, keeping."""

import json

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, normal, uniform
from metaflowmaps.errors import InputError
from metaflowmaps.networks import NetworkConfig, describe_network, make_network
from metaflowmaps.random import stream
from metaflowmaps.work.choices import choices

# as they come out of JSON
SMALL = {
    "unet": {"channels": 2, "size": 6, "width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [3]},
    "dit": {"channels": 2, "size": 6, "width": 16, "depth": 3, "heads": 2, "encoder_depth": 2},
}


def build(name, awake=True, dtype=F64, **options):
    """A small network; awake: every weight moved off its initial value, so that nothing is 0 by construction."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make_network({"name": name, **SMALL[name], **options}).to(dtype)
    if awake:
        generator = stream(0, "awake")
        with torch.no_grad():
            for p in network.parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator, dtype=F64).to(dtype)
    return network


def inputs(n=4, dtype=F64):
    z, context = (normal(n, 2, 6, 6, seed=name, dtype=dtype) for name in ("z", "context"))
    a, b, t = (uniform(n, seed=name, low=0.1, high=0.9).to(dtype) for name in "abt")
    return z, a, b, context, t


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


def test_registered_and_described(name):
    network = build(name, num_classes=3)
    assert choices(NetworkConfig)[name] is type(network.config)
    assert network.event_shape == (2, 6, 6)
    assert network.num_classes == 3
    again = make_network(json.loads(json.dumps(describe_network(network))))
    assert again.config == network.config
    assert [p.shape for p in again.parameters()] == [p.shape for p in network.parameters()]


def test_zero_at_initialisation(name):
    network = build(name, awake=False, num_classes=3, guidance=True)
    assert network(*inputs()).count_nonzero() == 0
    assert build(name)(*inputs()).count_nonzero() == 4 * 72  # so the assertion above says something


def test_every_input_matters(name):
    network, at = build(name), inputs()
    out = network(*at)
    assert out.shape == (4, 2, 6, 6)
    for i in range(5):
        moved = [x.flip(0) if j == i else x for j, x in enumerate(at)]
        assert (network(*moved) - out).abs().amax((1, 2, 3)).min() > 1e-3


def test_jvp_is_the_derivative(name):
    network, at = build(name), inputs()
    along = [normal(*x.shape, seed=f"along{i}") for i, x in enumerate(at)]
    h = 1e-5
    ahead, behind = (network(*(x + sign * h * v for x, v in zip(at, along, strict=True))) for sign in (1, -1))
    value, tangent = torch.func.jvp(network, tuple(at), tuple(along))
    # truncation h² f'''/6 and rounding 1e-15/h: both below 1e-9 where f and its derivatives are of order 1 to 10
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(value, network(*at), rtol=1e-11, atol=1e-12)  # float64; the attention differs


def test_a_gradient_through_the_jvp(name):
    network, at = build(name), inputs()
    ones = tuple(torch.ones_like(x) for x in at)

    def size(scale):
        weights = {key: p * (1 + scale) for key, p in network.named_parameters()}
        tangent = torch.func.jvp(lambda *x: torch.func.functional_call(network, weights, x), tuple(at), ones)[1]
        return tangent.square().sum()

    def backward():
        torch.func.jvp(network, tuple(at), ones)[1].square().sum().backward()
        return sum((p.grad * p.detach()).sum() for p in network.parameters() if p.grad is not None)

    h = 1e-5
    slope = (size(h) - size(-h)) / (2 * h)
    torch.testing.assert_close(backward(), slope.detach(), rtol=1e-6, atol=1e-6)  # as above, a larger function


# float64: rounding alone, the kernels may sum in another order; float32: 1e-7 a sum, some dozens deep, outputs near 1
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (torch.float32, 1e-4)])
def test_rows_do_not_see_each_other(name, dtype, tolerance):
    network, at = build(name, dtype=dtype, num_classes=3, guidance=True), inputs(5, dtype)
    label, scale = torch.tensor([0, 3, 1, 2, 1]), uniform(5, high=4.0).to(dtype)
    together = network(*at, label=label, guidance=scale)
    for i in range(5):
        row = slice(i, i + 1)
        alone = network(*(x[row] for x in at), label=label[row], guidance=scale[row])
        torch.testing.assert_close(alone, together[row], rtol=0, atol=tolerance)
    # and a value that is no number stays in its row
    spoiled = [at[0].clone().index_fill_(0, torch.tensor([2]), torch.nan), *at[1:]]
    bad = network(*spoiled, label=label, guidance=scale).isnan().flatten(1).any(1)
    assert bad.tolist() == [False, False, True, False, False]


# the fused kernel has no rule for vmap on CPU and is called row by row
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(name):
    network, at = build(name, guidance=True, num_classes=3), inputs()
    scale, label = uniform(4), torch.tensor([0, 1, 2, 3])

    def alone(*x):
        *x, label, scale = (v[None] for v in x)
        return network(*x, label=label, guidance=scale)[0]

    mapped = torch.func.vmap(alone)(*at, label, scale)
    torch.testing.assert_close(mapped, network(*at, label=label, guidance=scale), rtol=0, atol=1e-10)


def test_labels(name):
    network, at = build(name, num_classes=3), inputs()
    none = network(*at)
    torch.testing.assert_close(network(*at, label=torch.full((4,), 3)), none, rtol=0, atol=1e-12)
    assert (network(*at, label=torch.tensor([0, 1, 2, 0])) - none).abs().amax((1, 2, 3)).min() > 1e-4


def test_a_network_without_classes_takes_the_null_label_only(name):
    network, at = build(name), inputs()
    null = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(network(*at, label=null), network(*at))
    model = mfm.MetaFlowMap(network, mfm.LinearPath())
    with pytest.raises(InputError, match=r"knows no classes"):
        model.drift(0.5, at[0], {"label": null + 1})


def test_guidance(name):
    network, at = build(name, guidance=True), inputs()
    default = network(*at)
    torch.testing.assert_close(network(*at, guidance=torch.ones(4)), default, rtol=0, atol=1e-12)
    for w in (0.0, 2.5, 1e6):
        out = network(*at, guidance=torch.full((4,), w))
        assert out.isfinite().all()
        assert (out - default).abs().amax((1, 2, 3)).min() > 1e-4
    for w in (-0.5, float("nan")):
        with pytest.raises(InputError, match="guidance scales must be numbers >= 0; got"):
            network(*at, guidance=torch.tensor([1.0, 1.0, w, 1.0]))


def test_guidance_contributes_nothing_at_initialisation(name):
    network = build(name, awake=False, guidance=True)
    for p in (network.guidance(torch.tensor([0.0, 1.0, 7.0])), network.guidance(None)):
        assert p.count_nonzero() == 0


def test_guidance_by_table(name):
    network, at = build(name, guidance=[1.0, 2.5]), inputs()
    default = network(*at)
    torch.testing.assert_close(network(*at, guidance=torch.ones(4)), default, rtol=0, atol=1e-12)
    mixed = network(*at, guidance=torch.tensor([1.0, 2.5, 1.0, 2.5]))
    moved = (mixed - default).abs().amax((1, 2, 3)) > 1e-4
    assert moved.tolist() == [False, True, False, True]
    with pytest.raises(InputError, match=r"must be among those this network has: 1, 2\.5; got 2"):
        network(*at, guidance=torch.tensor([1.0, 2.0, 1.0, 1.0]))


def test_a_scale_that_nothing_reads_is_refused(name):
    with pytest.raises(InputError, match="takes no guidance scale"):
        build(name)(*inputs(), guidance=torch.ones(4))


@pytest.mark.parametrize("options", [{}, {"num_classes": 3, "guidance": [1.0, 2.5]}])
def test_saved_and_loaded(name, options, tmp_path):
    network = build(name, dtype=torch.float32, **options)
    model = mfm.MetaFlowMap(network, mfm.LinearPath(), data_mean=0.3, data_std=0.5).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = mfm.MetaFlowMap.from_pretrained(tmp_path / "model")
    assert type(loaded.network) is type(network)
    z, a, b, context, t = inputs(dtype=torch.float32)
    a, b = torch.minimum(a, b), torch.maximum(a, b)
    cond = {"label": torch.tensor([0, 1, 2, 3]), "guidance": torch.tensor([1.0, 2.5, 2.5, 1.0])} if options else None
    assert torch.equal(loaded(a, b, z, t, context, cond), model(a, b, z, t, context, cond))


def test_training_learns_what_every_input_is_for(name):
    """From zero output: a target that needs the state, the context and the three times."""
    network = build(name, awake=False, dtype=torch.float32)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    generator, losses = stream(0, "training"), []
    for _ in range(60):
        z, context = torch.randn(2, 64, 2, 6, 6, generator=generator)
        a, b, t = torch.rand(3, 64, generator=generator)
        target = (1 + a)[:, None, None, None] * z + (b + t)[:, None, None, None] * context
        loss = (network(z, a, b, context, t) - target).square().mean() / target.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - 1) < 1e-6  # zero output
    assert sum(losses[-10:]) / 10 < 0.25  # the state alone would leave a third


BAD = {
    "unet": [
        ({"size": 6, "multipliers": [1, 2, 2]}, r"size 6 can be halved 1 times: give at most 2 multipliers, got 3"),
        ({"multipliers": []}, "bad value for multipliers"),
        ({"multipliers": 2}, "bad value for multipliers"),
        ({"multipliers": [1, 0]}, "bad value for multipliers.1"),
        ({"attention": [4]}, r"attention must list sizes of levels, which are \[6, 3\]; got \[4\]"),
        ({"attention": 3}, "bad value for attention"),
        ({"width": 0}, "bad value for width: Input should be greater than or equal to 1"),
        ({"blocks": 1.5}, "bad value for blocks"),
        ({"dropout": 1.0}, "bad value for dropout"),
    ],
    "dit": [
        ({"patch": 4}, "patch must divide size, got 4 and 6"),
        ({"heads": 3}, "heads must divide width, got 3 and 16"),
        ({"width": 6, "heads": 2}, "width must be a multiple of 4"),
        ({"encoder_depth": 4}, "encoder_depth must be at most the depth, 3, got 4"),
        ({"encoder_depth": 0}, "bad value for encoder_depth"),
        ({"depth": "three", "encoder_depth": None}, "bad value for depth"),
        ({"mlp_ratio": 0.0}, "bad value for mlp_ratio"),
    ],
}
BOTH = [
    ({"channels": 0}, "channels|event_shape must list whole numbers"),
    ({"num_classes": -1}, "bad value for num_classes"),
    ({"guidance": [2.5]}, r"with 1\.0 among them"),
    ({"guidance": [1.0, -1.0]}, "a guidance scale must be a finite number >= 0"),
    ({"guidance": 2}, "bad value for guidance"),
    ({"widht": 8}, "unknown option of .* 'widht': did you mean 'width'"),
]


@pytest.mark.parametrize(("name", "options", "match"), [(n, *bad) for n in BAD for bad in BAD[n] + BOTH])
def test_bad_arguments(name, options, match):
    with pytest.raises(InputError, match=match) as error:
        build(name, **options)
    assert "\n" not in str(error.value)
