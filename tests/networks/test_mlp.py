"""The perceptron: zero at first, conditions and modulation by hand, derivatives, shapes, keeping, refusals."""

import json

import pytest
import torch

import metaflowmaps as mfm
from conftest import F64, normal, uniform
from metaflowmaps.errors import InputError
from metaflowmaps.networks import describe_network, make_network
from metaflowmaps.networks.mlp import MLP, MLPConfig
from metaflowmaps.random import stream

OPTIONS = {
    "plain": {},
    "modulated": {"modulation": True},
    "classes": {"num_classes": 3, "guidance": True},
    "everything": {"num_classes": 3, "guidance": True, "modulation": True, "activation": "tanh"},
    "one layer": {"depth": 1, "modulation": True, "num_classes": 3, "guidance": True},
}


def build(awake=True, dtype=F64, shape=(3,), **options):
    """A small network; awake: every weight moved off its initial value, so that nothing is 0 by construction."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MLPConfig(**{"width": 8, "depth": 3, **options}).network(shape).to(dtype)
    if awake:
        generator = stream(0, "awake")
        with torch.no_grad():
            for p in network.parameters():
                p += 0.3 * torch.randn(p.shape, generator=generator, dtype=F64).to(dtype)
    return network


def inputs(n=4, dtype=F64, event=(3,)):
    z, context = (normal(n, *event, seed=name, dtype=dtype) for name in ("z", "context"))
    a, b, t = (uniform(n, seed=name, low=0.1, high=0.9).to(dtype) for name in "abt")
    return z, a, b, context, t


LABEL, SCALE = torch.tensor([0, 3, 1, 2]), torch.tensor([1.0, 2.5, 0.0, 4.0], dtype=F64)


def conditions(options):
    return {"label": LABEL, "guidance": SCALE} if "guidance" in options else {}


@pytest.fixture(params=OPTIONS)
def options(request):
    return OPTIONS[request.param]


def by_hand(network, z, a, b, context, t, label=None, w=None):
    """The docstring's words as arithmetic on the weights."""
    p, act = dict(network.named_parameters()), {"silu": torch.nn.functional.silu, "tanh": torch.tanh}
    act = act[network.config.activation]
    times = torch.stack([a, b, t], 1)
    phases = [times * f * torch.pi / 2 for f in (1, 2, 4)]
    times = torch.cat([times, *(x.sin() for x in phases), *(x.cos() for x in phases)], 1)
    h = torch.cat([z, context, times], 1) @ p["input.weight"].T + p["input.bias"]
    if label is not None:
        h = h + p["labels.weight"][label] + ((w - 1) / (w + 1))[:, None] * p["guidance"]
    h = act(h)
    for i in range(network.config.depth - 1):
        g = h @ p[f"hidden.{2 * i + 1}.weight"].T + p[f"hidden.{2 * i + 1}.bias"]
        if network.modulation is None:
            h = act(g)
        else:
            both = times @ p[f"modulation.{i}.weight"].T + p[f"modulation.{i}.bias"]
            h = h + act(g * (1 + both[:, :8]) + both[:, 8:])
    return h @ p["output.weight"].T + p["output.bias"]


def test_by_hand(options):
    network, at = build(**options), inputs()
    cond = conditions(options)
    expected = by_hand(network, *at, *cond.values())
    # float64: sums of at most 45 terms
    torch.testing.assert_close(network(*at, **cond), expected, rtol=1e-12, atol=1e-12)


def test_zero_at_initialisation(options):
    cond = conditions(options)
    assert build(awake=False, **options)(*inputs(), **cond).count_nonzero() == 0
    assert build(**options)(*inputs(), **cond).count_nonzero() == 12  # so the assertion above says something


def test_modulation_changes_nothing_at_initialisation():
    """Scale and shift begin at 0: the layers are residual and the times enter by the input alone."""
    network, at = build(awake=False, modulation=True), inputs()
    torch.nn.init.ones_(network.output.weight)
    out = network(*at)
    with torch.no_grad():
        for layer in network.modulation:
            layer.bias += 0.1
    assert (network(*at) - out).abs().min() > 1e-4
    for layer in build(awake=False, modulation=True).modulation:
        assert not layer.weight.any()
        assert not layer.bias.any()


def test_guidance_of_one_adds_nothing():
    network, at = build(**OPTIONS["everything"]), inputs()
    one = network(*at, label=LABEL, guidance=torch.ones(4, dtype=F64))
    assert torch.equal(one, network(*at, label=LABEL))
    for w in (0.0, 2.5, 1e6):
        out = network(*at, label=LABEL, guidance=torch.full((4,), w, dtype=F64))
        assert out.isfinite().all()
        assert (out - one).abs().amax(1).min() > 1e-3
    for w in (-0.5, float("nan")):
        with pytest.raises(InputError, match="guidance scales must be numbers >= 0; got") as error:
            network(*at, guidance=torch.tensor([1.0, 1.0, w, 1.0]))
        assert "\n" not in str(error.value)


def test_guidance_takes_the_dtype_of_the_network():
    network = build(dtype=torch.float32, **OPTIONS["everything"])
    assert network(*inputs(dtype=torch.float32), label=LABEL, guidance=SCALE).dtype == torch.float32


def test_a_scale_that_nothing_reads_is_refused():
    with pytest.raises(InputError, match="takes no guidance scale"):
        build(num_classes=3)(*inputs(), label=LABEL, guidance=SCALE)


def test_no_label_is_the_null_label():
    network, at = build(num_classes=3), inputs()
    none = network(*at)
    assert torch.equal(network(*at, label=torch.full((4,), 3)), none)
    for y in range(3):
        assert (network(*at, label=torch.full((4,), y)) - none).abs().amax(1).min() > 1e-3
    # at first, classes are one
    fresh = build(awake=False, num_classes=3)
    torch.nn.init.ones_(fresh.output.weight)
    assert torch.equal(fresh(*at, label=LABEL), fresh(*at))


def test_every_input_matters(options):
    network, at = build(**options), inputs()
    out = network(*at)
    for i in range(5):
        moved = [x.flip(0) if j == i else x for j, x in enumerate(at)]
        assert (network(*moved) - out).abs().amax(1).min() > 1e-4


def test_rows_do_not_see_each_other(options):
    network, at, cond = build(**options), inputs(), conditions(options)
    together = network(*at, **cond)
    for i in range(4):
        row = slice(i, i + 1)
        alone = network(*(x[row] for x in at), **{k: v[row] for k, v in cond.items()})
        # float64: a matrix product may sum in another order for another batch
        torch.testing.assert_close(alone, together[row], rtol=0, atol=1e-12)


def test_jvp_is_the_derivative(options):
    network, at = build(**options), inputs()
    along = [normal(*x.shape, seed=f"along{i}") for i, x in enumerate(at)]
    cond, h = conditions(options), 1e-5

    def f(*x):
        return network(*x, **cond)

    ahead, behind = (f(*(x + sign * h * v for x, v in zip(at, along, strict=True))) for sign in (1, -1))
    value, tangent = torch.func.jvp(f, tuple(at), tuple(along))
    # truncation h² f'''/6 and rounding 1e-15/h: below 1e-8 where f and its derivatives are of order 1 to 100
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(value, f(*at), rtol=1e-12, atol=1e-12)


def test_shape_lays_images_flat():
    flat, image = build(shape=(12,)), build(shape=(3, 2, 2))
    assert flat.event_shape == (12,)
    assert image.event_shape == (3, 2, 2)
    at = inputs(event=(3, 2, 2))
    out = image(*at)
    assert out.shape == (4, 3, 2, 2)
    z, a, b, context, t = at
    assert torch.equal(out.flatten(1), flat(z.flatten(1), a, b, context.flatten(1), t))


@pytest.mark.parametrize("extra", [{}, {"shape": (1, 2, 2)}])
def test_saved_and_loaded(options, extra, tmp_path):
    network = build(dtype=torch.float32, **options, **extra)
    again = make_network(json.loads(json.dumps(describe_network(network))))
    assert again.config == network.config
    model = mfm.MetaFlowMap(network, mfm.LinearPath(), data_mean=0.3, data_std=0.5).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = mfm.MetaFlowMap.from_pretrained(tmp_path / "model")
    assert type(loaded.network) is MLP
    z, a, b, context, t = inputs(dtype=torch.float32, event=network.event_shape)
    a, b = torch.minimum(a, b), torch.maximum(a, b)
    cond = {key: v.float() if v.is_floating_point() else v for key, v in conditions(options).items()} or None
    assert torch.equal(loaded(a, b, z, t, context, cond), model(a, b, z, t, context, cond))


def test_what_version_0_1_wrote_describes_the_same_network():
    """It kept the shape among the options, and left guidance and modulation out where they were off."""
    old = {"name": "mlp", "dim": 3, "width": 32, "depth": 2, "activation": "silu", "num_classes": 0}
    assert describe_network(make_network(old)) == {
        **{key: value for key, value in old.items() if key != "dim"},
        "event_shape": [3], "guidance": False, "modulation": False,
    }  # fmt: skip
    flat = make_network({**old, "dim": 12, "shape": [3, 2, 2]})
    assert flat.event_shape == (3, 2, 2)
    assert describe_network(build(guidance=True, num_classes=1))["event_shape"] == [3]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 0}, "event_shape must list whole numbers >= 1"),
        ({"width": 0}, "bad value for width"),
        ({"depth": 1.5}, "bad value for depth"),
        ({"num_classes": -1}, "bad value for num_classes"),
        ({"activation": "sliu"}, "bad value for activation: Input should be 'silu'"),
        ({"dim": 6, "shape": [-3, -2]}, "event_shape must list whole numbers >= 1"),
        ({"widht": 8}, "unknown option of mlp 'widht': did you mean 'width'"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(InputError, match=match) as error:
        make_network({"name": "mlp", "dim": 3, **options})
    assert "\n" not in str(error.value)
