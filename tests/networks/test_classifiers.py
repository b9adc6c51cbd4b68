"""The two classifiers: shapes, sizes, independence of rows, dropout, learning."""

import json

import pytest
import torch
from torch import nn

from conftest import F64, normal
from metaflowmaps.errors import InputError
from metaflowmaps.networks import ClassifierNetworkConfig, describe_network, make_classifier
from metaflowmaps.random import stream
from metaflowmaps.work.choices import choices

CLASSIFIERS = choices(ClassifierNetworkConfig)


def build(name, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_classifier({"name": name, "channels": 1, "size": 8, "num_classes": 10, **options})


@pytest.fixture(params=CLASSIFIERS)
def name(request):
    return request.param


def test_described(name):
    network = build(name)
    assert CLASSIFIERS[name] is type(network.config)
    assert network.event_shape == (1, 8, 8)
    assert network.num_classes == 10
    again = make_classifier(json.loads(json.dumps(describe_network(network))))
    assert again.config == network.config


@pytest.mark.parametrize(("size", "low", "high"), [(8, 0, 150e3), (28, 200e3, 400e3)])
def test_shapes_and_sizes(name, size, low, high):
    network = build(name, size=size)
    x = normal(3, 1, size, size, dtype=torch.float32)
    features, logits = network.features(x), network(x)
    assert features.ndim == 2
    assert features.shape[0] == 3
    assert 64 <= features.shape[1] <= 128
    assert logits.shape == (3, 10)
    assert torch.equal(network.head(features), logits)
    assert low < sum(p.numel() for p in network.parameters()) < high


def test_rows_do_not_see_each_other(name):
    network = build(name).double()  # in training mode: there is no batch norm
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    x = normal(5, 1, 8, 8)
    alone = torch.cat([network(row[None]) for row in x])
    torch.testing.assert_close(alone, network(x), rtol=0, atol=1e-12)  # float64, rounding alone
    assert network(x).std(0).min() > 1e-4


def test_dropout_is_for_training_only(name):
    network, plain, x = build(name, dropout=0.5), build(name), normal(4, 1, 8, 8, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(network(x), network(x))
    assert torch.equal(network.eval()(x), plain(x))


def test_differentiable_in_the_image(name):
    network, x, v = build(name).double(), normal(2, 1, 8, 8), normal(2, 1, 8, 8, seed="v")
    leaf, h = x.clone().requires_grad_(), 1e-5
    (gradient,) = torch.autograd.grad(network(leaf)[:, 3].sum(), leaf)
    difference = (network(x + h * v) - network(x - h * v))[:, 3] / (2 * h)
    # truncation h² f'''/6 and rounding 1e-16/h, both about 1e-10
    torch.testing.assert_close((gradient * v).sum((1, 2, 3)), difference.detach(), rtol=1e-6, atol=1e-8)
    assert gradient.dtype == F64


def test_the_two_are_different_functions():
    x = normal(4, 1, 8, 8, dtype=torch.float32)
    one, two = (build(name) for name in CLASSIFIERS)
    assert type(one).features is not type(two).features
    assert {type(m) for m in one.modules()} ^ {type(m) for m in two.modules()} >= {nn.GroupNorm, nn.LayerNorm}
    assert one.features(x).shape != two.features(x).shape


def test_learns_where_a_bar_is(name):
    """Four classes: which quarter of the image is bright, under noise."""
    network = build(name, num_classes=4).train()
    optimizer, generator, right = torch.optim.Adam(network.parameters(), 3e-3), stream(0, "bars"), []
    for _ in range(30):
        label = torch.randint(4, (64,), generator=generator)
        x = torch.randn(64, 1, 8, 8, generator=generator)
        quarters = x.unflatten(3, (2, 4)).unflatten(2, (2, 4))
        quarters[torch.arange(64), :, label // 2, :, label % 2] += 1.0
        logits = network(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, label).backward()
        optimizer.step()
        right.append((logits.argmax(1) == label).float().mean().item())
    assert sum(right[-10:]) / 10 > 0.7  # chance .25; the quarter of the largest mean is right in .99


BAD = {
    "conv-classifier": [
        ({"width": 12}, "width must be a multiple of 8"),
        ({"features": 0}, "bad value for features"),
    ],
    "patch-classifier": [
        ({"patch": 3}, "patch must divide size, got 3 and 8"),
        ({"depth": 0}, "bad value for depth"),
        ({"size": "8"}, "event_shape must list whole numbers"),
    ],
}
BOTH = [
    ({"num_classes": 1}, "at least 2 classes"),
    ({"channels": 0}, "event_shape must list whole numbers"),
    ({"dropout": -0.1}, "bad value for dropout"),
    ({"widht": 8}, "unknown option of .* 'widht': did you mean 'width'"),
    ({"name": "conv-clasifier"}, "unknown classifier 'conv-clasifier': did you mean 'conv-classifier'"),
]


@pytest.mark.parametrize(("name", "options", "match"), [(n, *bad) for n in BAD for bad in BAD[n] + BOTH])
def test_bad_arguments(name, options, match):
    with pytest.raises(InputError, match=match) as error:
        build(**{"name": name, **options})
    assert "\n" not in str(error.value)


def test_bad_images(name):
    with pytest.raises(InputError, match=r"x must have event shape \(1, 8, 8\), got \(8, 8\)"):
        build(name)(torch.zeros(3, 8, 8))
    with pytest.raises(InputError, match="floating-point"):
        build(name).features(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
