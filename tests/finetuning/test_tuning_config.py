"""What a fine-tuning run is made of: methods and their options, settings of version 0.1, what a checkpoint holds."""

import pytest
import torch

from metaflowmaps.errors import InputError
from metaflowmaps.finetuning import (
    MFMFT,
    Direct,
    DRaFT,
    LearnedBaseline,
    NoBaseline,
    RunningBaseline,
    SelfNormalised,
    TiltMatching,
)
from metaflowmaps.finetuning.reward_probe import LARGEST, _check_strength
from metaflowmaps.finetuning.tuning_config import FinetuneConfig, resolved, tuned_parts
from metaflowmaps.work.config import override, validated

ABOUT = {"checkpoint": "base", "checkpoint_sha256": "", "reward": "r"}


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({"num_draws": 2, "form": "gradient", "sigma_squared": 200.0}, MFMFT(2, "gradient", sigma_squared=200.0)),
        ({"baseline": {"width": 4, "kind": "learned"}}, MFMFT(baseline=LearnedBaseline(width=4))),
        ({"method": "self-normalised", "num_draws": 16}, SelfNormalised(16)),
        ({"map": "direct", "baseline": {"kind": "none"}, "num_draws": 3}, Direct(3, NoBaseline())),
        ({"draft_at_zero": 0.2, "method": "draft"}, DRaFT(0.2)),
        ({"method": MFMFT(8)}, MFMFT(8)),
    ],
)
def test_settings_of_version_0_1_become_options_of_the_method(given, method):
    config = resolved(ABOUT, (2,), given)
    assert config.method == method
    assert validated(FinetuneConfig, config.model_dump()) == config


def test_set_reaches_the_options_of_choices_by_either_name():
    config = resolved(ABOUT, (2,), {})
    assert override(config, ["distil_steps=7"]) == override(config, ["distil.steps=7"])
    assert override(config, ["baseline.kind=none"]).method == MFMFT(baseline=NoBaseline())
    assert override(config, ["method.baseline.rate=0.5"]).method == MFMFT(baseline=RunningBaseline(rate=0.5))
    with pytest.raises(InputError, match="unknown option of mfm-ft 'at_zero'"):
        override(config, ["draft_at_zero=0.5"])


@pytest.mark.parametrize(
    ("event_shape", "method"), [((2,), TiltMatching()), ((1, 8, 8), TiltMatching(pool=4096))], ids=["vectors", "images"]
)
def test_images_have_smaller_pools(event_shape, method):
    assert resolved(ABOUT, event_shape, {"method": "tilt-matching"}).method == method


@pytest.mark.parametrize(("event_shape", "kept"), [((2,), False), ((1, 8, 8), True)], ids=["vectors", "images"])
def test_the_best_checkpoint_is_kept_of_images_alone(event_shape, kept):
    """In the plane the last one is judged: its meters are too coarse to choose by."""
    assert resolved(ABOUT, event_shape, {}).keep_best is kept


def test_the_strength_that_is_named_resolves_rewards_that_are_large_and_alike():
    """λr of the strength that is named is at .9 of the largest, though its weights would be equal at any."""
    config = resolved(ABOUT, (2,), {"strength": 10.0})
    with pytest.raises(InputError, match=r"--strength 0\.9 fits"):
        _check_strength(config, torch.full((8,), 10 * LARGEST, dtype=torch.float64), fitting=10.0, evidence=0.0)


@pytest.mark.parametrize(
    ("given", "drift", "whole"),
    [
        ({}, True, True),
        ({"map": "none"}, True, False),
        ({"map": "direct"}, True, True),
        ({"method": "draft"}, False, True),
    ],
)
def test_a_checkpoint_says_what_of_it_was_tuned(given, drift, whole):
    """By what is stored with it, and for one of version 0.1 by its method and map."""
    expected = {"drift": drift, "map": whole}
    assert tuned_parts(resolved(ABOUT, (2,), given).model_dump(mode="json")) == expected
    assert tuned_parts({"method": "mfm-ft", "map": "none" if "method" in given else "distil", **given}) == expected
