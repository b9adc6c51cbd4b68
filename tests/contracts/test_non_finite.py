"""NaN is never a good score: every metric refuses samples that are not finite, by name, or answers with no number."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import metaflowmaps as mfm
from metaflowmaps import metrics
from metaflowmaps.errors import InputError
from metaflowmaps.lab.evaluate.posterior_error import PosteriorEvalConfig, evaluate_posterior
from metaflowmaps.lab.evaluate.steering_error import SteeringEvalConfig, evaluate_steering
from metaflowmaps.lab.evaluate.tuning_error import Drawn, MixtureJudge, PlainJudge
from metaflowmaps.lab.report.sections import described
from metaflowmaps.metrics import inception
from metaflowmaps.metrics.frechet import Moments, moments, read_statistics
from metaflowmaps.metrics.sliced_w2 import Curves, curves, directions
from metaflowmaps.networks.mlp import MLPConfig
from metaflowmaps.random import stream

N, D = 24, 3
BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def normal(*name):
    return torch.randn(N, D, generator=stream(0, "non-finite", *name))


def spoilt(value, *name):
    """Samples of which one row is not finite."""
    x = normal(*name)
    x[7] = value
    return x


def pairs(metric):
    """A metric of two sample sets, spoilt on either side and on both."""
    return {
        "first": lambda value: metric(spoilt(value, "x"), normal("y")),
        "second": lambda value: metric(normal("x"), spoilt(value, "y")),
        "both": lambda value: metric(spoilt(value, "x"), spoilt(value, "y")),
    }


def draws_and_truth(metric):
    """A metric of draws (N, B, D) and the truth (B, D), spoilt on either side."""
    draws = torch.stack([normal("draws", i) for i in range(4)])
    spoilt_draws = lambda value: torch.stack([*draws[:3], spoilt(value, "draws", 3)])  # noqa: E731
    return {
        "draws": lambda value: metric(spoilt_draws(value), normal("truth")),
        "truth": lambda value: metric(draws, spoilt(value, "truth")),
    }


def running(x, y):
    """SW2² by running means, and the floor of both."""
    a, b, along = Curves(), Curves(), directions(D)
    for collected, points in ((a, x), (a, x.flip(1)), (b, y), (b, y.flip(1))):
        collected.add(curves(points, along))
    return a.squared_distance(b)


def with_shares(metric):
    share = lambda value: torch.tensor([0.5, value, 0.5])  # noqa: E731
    good = torch.tensor([0.25, 0.5, 0.25])
    return {
        "first": lambda value: metric(share(value), good),
        "second": lambda value: metric(good, share(value)),
    }


METRICS = {
    "class_distance": with_shares(metrics.class_distance),
    "energy_distance": pairs(metrics.energy_distance),
    "frechet_distance": pairs(metrics.frechet_distance),
    "mean_pairwise_distance": {"x": lambda value: metrics.mean_pairwise_distance(spoilt(value))},
    "mmd_squared": pairs(metrics.mmd_squared),
    "mmd_squared of a given bandwidth": pairs(lambda x, y: metrics.mmd_squared(x, y, bandwidth=1.0)),
    "psnr": pairs(metrics.psnr),
    "rank_statistics": draws_and_truth(metrics.rank_statistics),
    "rank_test": draws_and_truth(metrics.rank_test),
    "rank_test on a grid": draws_and_truth(lambda draws, truth: metrics.rank_test(draws, truth, resolution=0.1)),
    "sliced_w2": pairs(metrics.sliced_w2),
    "sliced_w2 of unequal sizes": pairs(lambda x, y: metrics.sliced_w2(x.repeat(2, 1)[:-5], y)),
    "sliced_w2 by running means": pairs(running),
    "spread_ratio": draws_and_truth(metrics.spread_ratio),
    "two_sample_test": pairs(metrics.two_sample_test),
    "two_sample_test by mmd": pairs(lambda x, y: metrics.two_sample_test(x, y, "mmd")),
    "vendi_score": {"x": lambda value: metrics.vendi_score(spoilt(value))},
    "vendi_score by rbf": {"x": lambda value: metrics.vendi_score(spoilt(value), "rbf", bandwidth=1.0)},
    "frechet_distance to a mean": {
        "mean": lambda value: metrics.frechet_distance(
            normal("x"), Moments(spoilt(value)[7].double(), torch.eye(D).double())
        )
    },
    "frechet_distance to a factor": {
        "factor": lambda value: metrics.frechet_distance(
            normal("x"), moments(normal("y"))._replace(factor=spoilt(value).double())
        )
    },
}


def numbers(answer):
    """Every number of an answer, which may be a tensor or hold several."""
    if isinstance(answer, torch.Tensor):
        return answer.double().flatten().tolist()
    if isinstance(answer, dict):
        return [number for value in answer.values() for number in numbers(value)]
    if isinstance(answer, tuple | list):
        return [number for value in answer for number in numbers(value)]
    return [float(answer)]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # inf - inf, on purpose
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("name", METRICS)
def test_a_metric_refuses_what_is_not_finite_or_has_no_number_for_it(name, value):
    for part, measured in METRICS[name].items():
        try:
            answer = measured(value)
        except InputError as error:
            assert "NaN or infinite" in str(error), (part, error)  # noqa: PT017 (an answer may be given, too)
        else:
            assert not any(map(math.isfinite, numbers(answer))), (part, answer)


def test_every_public_metric_is_asked():
    asked = {name.split(" ")[0] for name in METRICS}
    assert {name for name in metrics.__all__ if callable(getattr(metrics, name))} - {"RankTest"} == asked


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("what", ["mu", "sigma"])
def test_a_statistics_file_that_is_not_finite_is_refused(tmp_path, what, value):
    held = {"mu": np.zeros(D), "sigma": np.eye(D)}
    held[what][0] = value
    np.savez(tmp_path / "broken.npz", **held)
    with pytest.raises(InputError, match=r"broken\.npz.* NaN or infinite"):
        read_statistics(tmp_path / "broken.npz")


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_inception_refuses_pictures_that_are_not_finite(monkeypatch, value):
    class Extractor(nn.Module):
        def forward(self, x):
            return (x.double().flatten(1),)

    monkeypatch.setattr(inception, "_extractor", lambda weights: Extractor())
    x = torch.zeros(2, 3, 4, 4)
    x[1, 0, 0, 0] = value
    with pytest.raises(InputError, match="NaN or infinite"):
        inception.Inception().features(x)


# -- the laboratory's own figures ------------------------------------------------------------------------------------

LAW = mfm.GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.3)
REWARD = mfm.rewards.LinearGaussian(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]), 1.0)


def test_posterior_draws_that_are_not_finite_have_no_error_of_zero():
    config = PosteriorEvalConfig(
        samples=8, contexts=1, sets=2, times=(0.5,), map_steps=(1,), glass_steps=(1,), other_contexts=1
    )
    network = MLPConfig(width=8, depth=1).network((2,))
    with torch.no_grad():
        network.output.bias.fill_(math.nan)
    (found,) = evaluate_posterior(mfm.MetaFlowMap(network, mfm.LinearPath()), LAW, config).at.values()
    assert math.isfinite(found.floor)
    assert not any(map(math.isfinite, [found.one_step, *found.by_sampler.values()]))


def test_steered_samples_that_are_lost_are_far_away_and_in_no_mode():
    class Losing(mfm.ExactModel):
        """Exact, but for the first sample of a batch."""

        def drift(self, t, x, cond=None):
            bad = torch.zeros(len(x), 1)
            bad[0] = math.nan
            return super().drift(t, x, cond) + bad

    config = SteeringEvalConfig(samples=64, seeds=1, steps=4, methods=("none",), num_draws=(1,))
    figures = {}
    for kind in (mfm.ExactModel, Losing):
        measured, _ = evaluate_steering(kind(mfm.LinearPath(), LAW), LAW, REWARD, config)
        figures[kind] = measured["methods"]["none"]["0"]
    good, bad = figures[mfm.ExactModel], figures[Losing]
    assert (good["nonfinite"], bad["nonfinite"]) == (0, 1)
    assert sum(bad["mode_frequencies"]) == pytest.approx(63 / 64)
    assert bad["sw2"] > 1e4 > good["sw2"]  # one of 64 at 1e6 and more: SW2 is 1e6 / 8 along a direction at most
    assert bad["reward"] < -1e6 < good["reward"]


def test_tuned_samples_that_are_lost_are_far_away_and_spread_nothing():
    judge = MixtureJudge(LAW, REWARD)
    x = LAW.tilt(REWARD).sample(64, stream(0, "tuned")).float()
    lost = x.clone()
    lost[:16] = math.nan
    good, bad = judge([Drawn(x, {})]), judge([Drawn(lost, {})])
    assert bad.sw2 > 1e4 > good.sw2
    assert bad.reward < -1e6 < good.reward
    assert math.isfinite(good.distance)
    assert not math.isfinite(bad.distance)
    assert bad.mode_l1 > good.mode_l1


def test_lost_samples_are_counted_where_no_law_is_known():
    """Two of eight: six are judged, with their own conditions."""
    x, scale = normal("plain")[:8], torch.arange(8.0)
    lost = x.clone()
    lost[[1, 5], 0] = math.inf
    found = PlainJudge(lambda x, cond: cond["scale"])(
        [Drawn(lost[:4], {"scale": scale[:4]}), Drawn(lost[4:], {"scale": scale[4:]})]
    )
    kept = torch.tensor([0, 2, 3, 4, 6, 7])
    assert found.lost == 2
    assert found.reward == pytest.approx(float(scale[kept].mean()))
    assert found.distance == pytest.approx(metrics.mean_pairwise_distance(x[kept]))


# -- what the report says --------------------------------------------------------------------------------------------


def results(command, metrics):
    return {"command": command, "metrics": metrics, "config": {}, "cost": {}, "environment": {}}


@pytest.mark.parametrize("value", [None, math.nan])  # results.json holds null where a figure is not finite
def test_a_summary_is_not_better_than_what_is_missing(value):
    at = {"0.0": 1.0, "0.5": value}
    metrics = {
        "relative_sw2": at, "floor": at, "ratio": at, "spread": at, "by_sampler": {"map-1": at},
        "network_calls_per_draw": {"map-1": 1}, "floor_of_others": at,
        "glass_calls_to_match_one_map_step": dict.fromkeys(at),
    }  # fmt: skip
    assert "at most nan times" in described(results("eval posterior", metrics)).summary
    cell = {"pearson": 0.9, "rmse": 0.1, "bias": 0.0}
    metrics = {
        "by_sampler": {"map-1": {"0.1": cell, "0.5": {**cell, "pearson": value}}}, "num_draws": 8,
        "network_calls_per_draw": {"map-1": 1}, "seconds_by_sampler": {"map-1": 1.0}, "value_std": at,
    }  # fmt: skip
    assert "r ≥ nan" in described(results("eval value", metrics)).summary


@pytest.mark.parametrize("value", [None, math.nan])
@pytest.mark.parametrize("lost", ["dps", "mfm-g"])
def test_the_nearest_method_has_an_error(value, lost):
    cell = {
        "sw2": 0.2, "floor_sw2": 0.1, "mmd": 0.01, "mode_l1": 0.02, "reward": -1.0, "samples": 64, "seeds": 1,
        "cost": {"nfe": 250, "seconds": 9.0, "forwards": 1, "backwards": 0, "reward_calls": 1},
    }  # fmt: skip
    methods = {name: {"1": {**cell, "sw2": value} if name == lost else cell} for name in ("dps", "mfm-g")}
    metrics = {"methods": methods, "floor": {"mode_l1": 0.01}, "exact_reward": -0.5}
    (other,) = set(methods) - {lost}
    assert f"law is {other} with" in described(results("eval steering", metrics)).summary
