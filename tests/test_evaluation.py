"""``mfm eval posterior`` on maps whose error is known."""

import math

import pytest
import torch

from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.evaluate.posterior_error import PosteriorEvalConfig, evaluate_posterior, glass_calls_to_match
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.path import LinearPath

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
