"""The same numbers on an accelerator, where there is one."""

import pytest
import torch

import metaflowmaps as mfm
from metaflowmaps.networks import make_classifier, make_network
from metaflowmaps.random import randn, stream

NETWORKS = {
    "mlp": {"name": "mlp", "dim": 64, "width": 64, "depth": 3, "modulation": True, "shape": [1, 8, 8]},
    "unet": {"name": "unet", "channels": 1, "size": 8, "width": 16, "multipliers": [1, 2], "blocks": 1},
    "dit": {"name": "dit", "channels": 1, "size": 8, "patch": 2, "width": 32, "depth": 3, "heads": 2},
}
CLASSIFIERS = {
    name: {"name": name, "channels": 1, "size": 8, "num_classes": 10}
    for name in ("conv-classifier", "patch-classifier")
}
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch):
    """cuDNN convolves in TF32 unless told not to: with its ten bits 5 % of the U-Net's numbers leave the tolerance."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def seeded(make, config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make(config).eval()
        for parameter in module.parameters():  # zero-initialised layers would compare nothing
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("name", NETWORKS)
def test_a_draw_is_the_same_on_the_accelerator(name):
    model = mfm.MetaFlowMap(seeded(make_network, NETWORKS[name]), mfm.LinearPath()).eval()
    x_t, seed = randn((4, 1, 8, 8), stream(0, "x")), stream(0, "draw")
    with torch.no_grad():
        here = model.draw(0.3, x_t, 3, generator=seed)
        there = model.to("cuda").draw(0.3, x_t.to("cuda"), 3, generator=stream(0, "draw")).cpu()
    # float32 products of a few hundred terms, summed in another order, through a handful of layers; no TF32
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_is_the_same_on_the_accelerator(name):
    classifier, x = seeded(make_classifier, CLASSIFIERS[name]), randn((4, 1, 8, 8), stream(0, "x"))
    with torch.no_grad():
        here, there = classifier(x), classifier.to("cuda")(x.to("cuda")).cpu()
    torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4)
