r"""How good is V̂ from posterior draws? Against the exact value over states of the path, by network calls and seconds.

At each t, ``states`` states x_t are drawn from the law (x_1 ~ p_1, then x_t) by a fixed seed; every sampler makes
``num_draws`` draws at each, and V̂ = log mean e^r is compared with the exact V_t(x): Pearson r and RMSE. Exact draws
show what the number of draws alone allows.
"""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps.cost import Meter
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.posterior import ExactPosterior, GlassPosterior, MapPosterior
from metaflowmaps.random import randn, stream
from metaflowmaps.rewards.analytic import LinearGaussian
from metaflowmaps.value import GradientFree, value_gradient
from metaflowmaps.work.config import Config


class ValueEvalConfig(Config):
    """What to estimate, where, and with what."""

    states: int = Field(256, ge=3)
    times: tuple[float, ...] = Field((0.1, 0.2, 0.3, 0.5), min_length=1)
    num_draws: int = Field(256, ge=1)
    map_steps: tuple[int, ...] = (1, 2, 4)
    glass_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    glass_method: str = "euler"
    glass_spacing: str = Field("uniform", pattern="^(uniform|angle)$")
    reward: str = ""
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _possible(self) -> "ValueEvalConfig":
        if any(not 0 <= t < 1 for t in self.times):
            raise ValueError("times must lie in [0, 1): at t = 1 the value is the reward")
        if not (self.map_steps or self.glass_steps):
            raise ValueError("give map_steps or glass_steps: there is nothing to judge")
        if min((*self.map_steps, *self.glass_steps), default=1) < 1:
            raise ValueError("steps must be at least 1")
        return self


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of two (n,) samples."""
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.norm() * y.norm()).clamp_min(1e-300))


def evaluate_value(
    model: MetaFlowMap,
    law: GaussianMixture,
    reward: LinearGaussian,
    config: ValueEvalConfig,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """metrics.by_sampler[name][t] = {pearson, rmse, bias}, with calls a draw and seconds by sampler."""
    spread = model.data_std if config.glass_spacing == "angle" else None
    samplers: dict[str, Any] = {f"map-{k}": MapPosterior(model, k) for k in config.map_steps}
    for k in config.glass_steps:
        samplers[f"glass-{k}"] = GlassPosterior(model.path, model.drift, k, config.glass_method, spread)
    samplers["exact"] = ExactPosterior(model.path, law)
    by_sampler: dict[str, dict[str, Any]] = {name: {} for name in samplers}
    spreads: dict[str, float] = {}
    calls, seconds = dict.fromkeys(samplers, 0.0), dict.fromkeys(samplers, 0.0)
    for t in config.times:
        report(f"t = {t:g}")
        x_t = _states(model, law, config, t)
        exact = law.value(model.path, t, x_t, reward)
        spreads[str(t)] = float(exact.std())
        for name, posterior in samplers.items():
            state = x_t if name == "exact" else x_t.to(model.device, model.dtype)
            g = stream(config.seed, "draws", str(t))
            with Meter(model.network) as meter:
                how = GradientFree(chunk=64)
                estimate = value_gradient(posterior, reward, t, state, config.num_draws, how, g).value
            error = estimate.double().cpu() - exact
            by_sampler[name][str(t)] = {
                "pearson": pearson(estimate.double().cpu(), exact),
                "rmse": float(error.square().mean().sqrt()),
                "bias": float(error.mean()),
            }
            calls[name] += meter.forwards / (config.states * config.num_draws * len(config.times))
            seconds[name] += meter.seconds
    return {
        "by_sampler": by_sampler,
        "network_calls_per_draw": calls,
        "seconds_by_sampler": seconds,
        "num_draws": config.num_draws,
        "value_std": spreads,  # of the exact value over the states: what an RMSE is to be compared with
    }


def _states(model: MetaFlowMap, law: GaussianMixture, config: ValueEvalConfig, t: float) -> Tensor:
    g = stream(config.seed, "states", str(t))
    x_1 = law.sample(config.states, g).double()
    return model.path.interpolate(randn(tuple(x_1.shape), g, torch.float64), x_1, t)
