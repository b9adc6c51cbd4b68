r"""How good is V̂ from posterior draws? Against the exact value over states of the path, by network calls and seconds.

At each t, ``states`` states x_t are drawn from the law (x_1 ~ p_1, then x_t) by a fixed seed; every sampler makes
``num_draws`` draws at each, and V̂ = log mean e^r is compared with the exact V_t(x): Pearson r and RMSE. Exact draws
show what the number of draws alone allows.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from metaflowmaps.cost import Meter
from metaflowmaps.lab.evaluate.draws import DrawsConfig, pearson, posteriors, rmse, spread_of
from metaflowmaps.lab.evaluate.rows import Json
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.posterior import ExactPosterior, Posterior
from metaflowmaps.random import randn, stream
from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.value import GradientFree, value_gradient
from metaflowmaps.work.progress import counted


class ValueEvalConfig(DrawsConfig):
    """What to estimate, where, and with what."""

    states: int = Field(256, ge=3)
    times: tuple[float, ...] = Field((0.1, 0.2, 0.3, 0.5), min_length=1)
    num_draws: int = Field(256, ge=1)
    glass_method: str = "euler"
    glass_spacing: str = Field("uniform", pattern="^(uniform|angle)$")
    reward: str = ""
    seed: int = Field(0, ge=0)


def evaluate_value(
    model: Any,
    law: GaussianMixture,
    reward: LinearGaussian,
    config: ValueEvalConfig,
    report: Callable[[str], None] = lambda line: None,
) -> Json:
    """metrics.by_sampler[name][t] = {pearson, rmse, bias}, with calls a draw and seconds by sampler."""
    data_std = spread_of(model, config.glass_spacing)
    samplers: dict[str, Posterior] = {**posteriors(model, config, config.glass_method, data_std)}
    samplers["exact"] = ExactPosterior(model.path, law)
    errors: dict[str, dict[str, dict[str, float]]] = {name: {} for name in samplers}
    meters, spreads = {name: Meter(model.network) for name in samplers}, {}
    for t in counted(config.times, report, "times"):
        report(f"t = {t:g}")
        x_t = _states(model, law, config, t)
        exact = law.value(model.path, t, x_t, reward)
        spreads[str(t)] = float(exact.std())
        for name, posterior in samplers.items():
            state = x_t if name == "exact" else x_t.to(model.device, model.dtype)
            how, g = GradientFree(chunk=64), stream(config.seed, "draws", str(t))
            with meters[name]:
                estimate = value_gradient(posterior, reward, t, state, config.num_draws, how, g).value
            found = estimate.double().cpu()
            bias = float((found - exact).mean())
            errors[name][str(t)] = {"pearson": pearson(found, exact), "rmse": rmse(found, exact), "bias": bias}
    drawn = config.states * config.num_draws * len(config.times)
    return {
        "by_sampler": errors,
        "network_calls_per_draw": {name: meter.forwards / drawn for name, meter in meters.items()},
        "seconds_by_sampler": {name: meter.seconds for name, meter in meters.items()},
        "num_draws": config.num_draws,
        "value_std": spreads,  # of the exact value over the states: what an RMSE is to be compared with
    }


def _states(model: Any, law: GaussianMixture, config: ValueEvalConfig, t: float) -> Tensor:
    g = stream(config.seed, "states", str(t))
    x_1 = law.sample(config.states, g).double()
    x_t: Tensor = model.path.interpolate(randn(tuple(x_1.shape), g, torch.float64), x_1, t)
    return x_t
