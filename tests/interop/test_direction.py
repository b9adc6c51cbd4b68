"""Which way time runs, told from the drift alone."""

import math

import pytest

import metaflowmaps as mfm
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.interop import pretrained
from metaflowmaps.interop.pretrained import direction
from metaflowmaps.interop.pretrained.direction import time_direction

LAW = mfm.GaussianMixture([[-3.0, -3.0], [0.0, 0.0], [3.0, 3.0]], 0.5)


def backwards(drift):
    return lambda t, x: -drift(1 - t, x)


@pytest.mark.parametrize("seed", range(3))
def test_a_trained_map_of_images_is_told_from_its_reverse(seed):
    digits = MetaFlowMap.from_pretrained("digits")
    for drift, verdict in ((digits.drift, "forward"), (backwards(digits.drift), "backward")):
        assert time_direction(drift, digits.event_shape, seed=seed).verdict == verdict


def test_an_exact_mixture_is_told_from_its_reverse():
    def drift(t, x):
        return LAW.drift(mfm.LinearPath(), t, x)

    for f, verdict in ((drift, "forward"), (backwards(drift), "backward")):
        assert time_direction(f, (2,), num=256, steps=16).verdict == verdict


def test_white_noise_as_data_has_no_direction():
    normal = mfm.GaussianMixture([[0.0] * 8], 1.0)
    found = time_direction(lambda t, x: normal.drift(mfm.LinearPath(), t, x), (8,), num=64)
    assert found.verdict == "undecided"
    assert abs(found.given - found.reversed) < 1e-4  # the same law both ways; float32 through twelve steps


@pytest.mark.parametrize(
    ("given", "other", "verdict"),
    [
        (0.85, 1.07, "forward"),  # 1.26 times, and below 0.9
        (0.85, 1.06, "undecided"),  # 1.247 times
        (0.91, 9.0, "undecided"),  # knows too little
        (1.07, 0.85, "backward"),
        (1.06, 0.85, "undecided"),
        (9.0, 0.91, "undecided"),
        (math.inf, math.inf, "undecided"),
    ],
)
def test_a_verdict_needs_knowledge_and_a_margin(monkeypatch, given, other, verdict):
    """R of the way that it runs below 0.9, and that of the other way more than 1.25 times as large."""
    found = iter([given, other])
    monkeypatch.setattr(direction, "_knowledge", lambda *arguments: next(found))
    assert time_direction(lambda t, x: x, (2,)) == (verdict, given, other)


def test_untrained_networks_are_not_decided(interop_files):
    for family in ("mfm", "dmf", "sit"):
        path = interop_files / f"{family}_weights.safetensors"
        *_, found = pretrained.load_with_source(path, config={"heads": 4, "encoder_depth": 3})
        assert found.verdict == "undecided"


def test_weights_whose_time_runs_backwards_are_refused_on_loading(monkeypatch, interop_files):
    """A file whose drift is a trained one, each channel a digit; then the same drift in the opposite convention."""
    digits, trained = MetaFlowMap.from_pretrained("digits"), mfm.MetaFlowMap.drift
    path = interop_files / "sit_weights.safetensors"

    def each_channel(t, x):
        return trained(digits, t, x.flatten(0, 1)[:, None]).reshape(x.shape)

    monkeypatch.setattr(mfm.MetaFlowMap, "drift", lambda self, t, x, cond=None: each_channel(t, x))
    assert pretrained.load_with_source(path, config={"heads": 4})[3].verdict == "forward"
    monkeypatch.setattr(mfm.MetaFlowMap, "drift", lambda self, t, x, cond=None: -each_channel(1 - t, x))
    with pytest.raises(InputError, match=r"carries data to noise.*check=False"):
        pretrained.load(path, config={"heads": 4})
    assert isinstance(pretrained.load(path, config={"heads": 4}, check=False), mfm.MetaFlowMap)
