"""The U-net: magnitudes, sizes that are no powers of two, dropout, presets."""

import pytest
import torch
from torch.nn import functional

from conftest import F64, normal
from metaflowmaps.errors import InputError
from metaflowmaps.networks.unet import SIZES, Conv, ResidualBlock, UNetConfig, pixel_norm


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("size", [7, 8, 28, 12])
def test_any_size_that_halves(size):
    multipliers = {7: [1], 8: [1, 1, 1], 28: [1, 2, 2], 12: [1, 2]}[size]
    network = seeded(lambda: UNetConfig(width=8, multipliers=multipliers, blocks=1).network((1, size, size)))
    assert network.config.attention == ({7: 7, 8: 2, 28: 7, 12: 6}[size],)  # the smallest, if not said
    x, t = torch.zeros(2, 1, size, size), torch.zeros(2)
    assert network(x, t, t, x, t).shape == x.shape


def test_attention_is_where_it_is_asked_for():
    network = UNetConfig(width=8, multipliers=[1, 1, 1], blocks=1, attention=[8, 2]).network((1, 8, 8))
    for levels in (network.down, network.up):
        assert [level[0].attention is not None for level in levels] == [True, False, True]


def test_patches_are_the_channels_of_a_smaller_image():
    """A network of 2 × 2 patches is the one of pixels on images of half the side and four times the channels."""
    options = {"width": 8, "multipliers": [1, 2], "blocks": 1}
    patched = seeded(lambda: UNetConfig(patch=2, **options).network((3, 8, 8))).double()
    plain = UNetConfig(**options).network((12, 4, 4)).double()
    with torch.no_grad():
        patched.leave.weight += 0.1  # it is silent at initialisation
    plain.load_state_dict(patched.state_dict())
    z, context, t = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed="context"), torch.full((2,), 0.3, dtype=F64)
    small = [functional.pixel_unshuffle(x, 2) for x in (z, context)]
    expected = functional.pixel_shuffle(plain(small[0], t, t, small[1], t), 2)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(patched(z, t, t, context, t), expected, rtol=0, atol=0)
    with pytest.raises(InputError, match="patch must divide size, got 3 and 8"):
        UNetConfig(patch=3, **options).network((3, 8, 8))


def test_a_convolution_keeps_the_magnitude():
    """Independent unit inputs: the variance of each output is its filter's squared norm, 1, whatever the weight."""
    conv = seeded(lambda: Conv(16, 64, 1).double())
    with torch.no_grad():
        conv.weight *= torch.linspace(0.1, 10, 64, dtype=F64)[:, None, None, None]
        out = conv(normal(64, 16, 16, 16))
    # 16,384 draws an output: standard deviation of a variance √(2/16,384) = .011, 4.5 of them over 64 outputs
    assert ((out.square().mean((0, 2, 3)) - 1).abs() < 0.05).all()


def test_a_block_keeps_the_magnitude():
    block = seeded(lambda: ResidualBlock(32, 32, 8, False, 0.0).double())
    x = normal(64, 32, 8, 8)
    with torch.no_grad():
        out = block(x, normal(64, 8, seed="e"))
    added = out - pixel_norm(x)
    # act has second moment 1 on N(0, 1) at each layer; zero padding takes some 15 % at this size, twice
    assert 0.6 < (added.square().mean() / (3 / 7) ** 2).item() < 1.1


def test_magnitudes_do_not_grow_with_depth():
    network = seeded(lambda: UNetConfig(width=32, multipliers=[1, 2], blocks=8, attention=[]).network((1, 8, 8)))
    seen = []
    hook = network.leave.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    x, t = normal(16, 1, 8, 8, dtype=torch.float32), torch.rand(16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network(x, t, t, x.flip(0), t)
    hook.remove()
    assert 0.2 < seen[0].square().mean().sqrt().item() < 1.0  # silu of unit numbers: .6


def test_dropout_is_for_training_only():
    options = {"width": 8, "multipliers": [1, 2], "blocks": 1}
    network = seeded(lambda: UNetConfig(dropout=0.5, **options).network((1, 8, 8)))
    plain = seeded(lambda: UNetConfig(**options).network((1, 8, 8)))
    for net in (network, plain):
        torch.nn.init.ones_(net.leave.weight)
    x, t = normal(3, 1, 8, 8, dtype=torch.float32), torch.full((3,), 0.5)
    at = (x, t, t, x, t)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(network(*at), network(*at))
    assert torch.equal(network.eval()(*at), plain(*at))


def test_presets():
    """About 9 M parameters for MNIST, 0.3 to 0.5 M for 8×8."""
    with torch.device("meta"):
        assert 8.5e6 < count(UNetConfig(num_classes=10, guidance=True, **SIZES["mnist"]).network((1, 28, 28))) < 10e6
        assert 0.3e6 < count(UNetConfig(num_classes=10, guidance=True, **SIZES["digits"]).network((1, 8, 8))) < 0.5e6
