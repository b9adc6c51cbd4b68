"""``mfm eval posterior`` on maps whose error is known."""

import math

import pytest
import torch

from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.posterior_error import (
    PosteriorEvalConfig,
    _ratio_spread,
    evaluate_posterior,
    glass_calls_to_match,
)
from metaflowmaps.lab.evaluate.steering_error import SteeringEvalConfig
from metaflowmaps.lab.evaluate.variants import variant
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.path import LinearPath
from metaflowmaps.random import stream

LAW = GaussianMixture(torch.tensor([[0.5, -1.0]]), 2.25)
CONFIG = PosteriorEvalConfig(samples=1024, contexts=8, sets=16, times=(0.0, 0.6), map_steps=(1, 2), glass_steps=(1, 4))


def untrained(std: float) -> MetaFlowMap:
    return MetaFlowMap(
        MLPConfig(width=8, depth=1).network((2,)), LinearPath(), "gaussian", torch.tensor([0.5, -1.0]), std
    )


def test_an_exact_map_sits_at_the_floor():
    """An untrained gaussian map is exact on Gaussian data: ratio 1 within 4 of the spread it states."""
    result = evaluate_posterior(untrained(1.5), LAW, CONFIG)
    metrics = result.metrics()
    for t in ("0.0", "0.6"):
        spread = metrics["spread"][t]
        assert 0 < spread < 0.1
        assert abs(metrics["ratio"][t] - 1) < 4 * spread
    # GLASS with one Euler step is the posterior mean: its error is of the size of the posterior's spread
    assert metrics["by_sampler"]["glass-1"]["0.0"] > 0.5
    assert metrics["by_sampler"]["glass-4"]["0.0"] < metrics["by_sampler"]["glass-1"]["0.0"]
    assert metrics["network_calls_per_draw"] == {"map-1": 1, "map-2": 2, "glass-1": 1, "glass-4": 4}
    assert glass_calls_to_match(result.at["0.0"]) is None


def test_a_wrong_spread_shows_as_its_own_w2():
    """At t = 0 a map for std 1.8 draws N(μ, 1.8²) for N(μ, 1.5²): along any direction W2 = 0.3, relative 0.2."""
    metrics = evaluate_posterior(untrained(1.8), LAW, CONFIG).metrics()
    floor = metrics["floor"]["0.0"]
    expected = math.hypot(0.2, floor)  # the squares add, up to the larger spread's larger floor
    assert metrics["relative_sw2"]["0.0"] == pytest.approx(expected, rel=0.1)


def test_draws_do_not_depend_on_the_batch_size():
    few = CONFIG.model_copy(update={"contexts": 2, "sets": 2})
    one = evaluate_posterior(untrained(1.7), LAW, few)
    other = evaluate_posterior(untrained(1.7), LAW, few.model_copy(update={"batch_size": 100}))
    # the noise is drawn set by set: only the rounding of batched products differs
    assert one.at["0.6"].by_sampler == pytest.approx(other.at["0.6"].by_sampler, rel=1e-4)
    assert one.at["0.6"].floor == other.at["0.6"].floor


def test_a_model_of_another_shape_is_refused():
    with pytest.raises(InputError, match="2 dimensions"):
        evaluate_posterior(MetaFlowMap(MLPConfig(width=8, depth=1).network((3,)), LinearPath()), LAW, CONFIG)


def test_the_error_bar_of_the_ratio_by_hand():
    """G groups of relative spread ρ: a mean of them has ρ/√G, a ratio of two √2 of that, its root a half.

    Contexts are averaged first: here each group's mean is as the second line has it. One group tells nothing.
    """
    contexts = [[0.4, 1.2, 1.1, 0.9], [1.2, 1.2, 0.5, 1.5]]
    groups = torch.tensor([0.8, 1.2, 0.8, 1.2])  # of mean 1 and variance 4 · 0.2²/3
    assert _ratio_spread(contexts) == pytest.approx(float(groups.std()) / 2 / math.sqrt(2), rel=1e-6)  # float32
    assert _ratio_spread([[1.0], [2.0]]) is None


def test_the_error_bar_is_the_scatter_of_an_exact_ratio():
    """√(A/B) for means A and B of four groups: over 4,000 pairs its standard deviation, known to 1.1 %; 4 of that."""
    g = stream(0, "error-bar")
    a, b = (1 + 0.02 * torch.randn(4000, 4, generator=g, dtype=torch.float64) for _ in range(2))
    scatter = float((a.mean(1) / b.mean(1)).sqrt().std())
    stated = math.sqrt(sum(_ratio_spread([groups]) ** 2 for groups in a.tolist()) / len(a))
    assert stated == pytest.approx(scatter, rel=4 * 0.011 * math.sqrt(1 + 1 / 3))  # of 12,000 squares, and of 4,000


def test_names_of_methods_say_what_they_change_or_are_refused():
    """Before the hours of an evaluation, whose table would have two rows of one method."""
    assert variant("mfm-g-plain").method.blend is False
    assert variant("mfm-gf-rescale").renormalize == "rescale"
    with pytest.raises(InputError, match="'plain' says nothing to"):
        variant("none-plain")
    with pytest.raises(ValueError, match="unknown word"):
        SteeringEvalConfig(methods=("mfm-gf-rescaled",))
