"""Who draws from posteriors in a comparison: the map in some steps, GLASS in some calls.

map-K           K steps of the map
glass-K         K steps of GLASS on the map's own drift
drift-glass-K   the same on a drift that was trained alone

A wrapped network is no map: it draws by GLASS alone.
"""

from typing import Any, ClassVar

from pydantic import Field, model_validator
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.interop.foreign import ForeignModel
from metaflowmaps.path import Drift
from metaflowmaps.posterior import GlassPosterior, MapPosterior
from metaflowmaps.work.config import Config

KINDS = {"map": "map", "glass": "GLASS", "drift-glass": "GLASS on the drift alone"}
DrawsPosterior = MapPosterior | GlassPosterior


class DrawsConfig(Config):
    """The times of noisy states, and who draws there."""

    one_step_leads: ClassVar[bool] = False  # is one map step what the others are compared with?

    times: tuple[float, ...] = Field((0.1, 0.2, 0.5, 0.8), min_length=1)
    map_steps: tuple[int, ...] = (1, 2, 4)
    glass_steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)

    @model_validator(mode="after")
    def _can_be_compared(self) -> "DrawsConfig":
        if any(not 0 <= t < 1 for t in self.times):
            raise ValueError("times must lie in [0, 1): at t = 1 the posterior is a point, its value the reward")
        if self.one_step_leads and 1 not in self.map_steps:
            raise ValueError("map_steps must contain 1: its steps are what the others are compared with")
        if not (self.map_steps or self.glass_steps):
            raise ValueError("give map_steps or glass_steps: there is nothing to judge")
        if min(*self.map_steps, *self.glass_steps, 1) < 1:
            raise ValueError("map_steps and glass_steps must be at least 1")
        return self


def posteriors(
    model: Any,
    config: DrawsConfig,
    integrator: str = "euler",
    data_std: float | None = None,
    drift_alone: Drift | None = None,
) -> dict[str, DrawsPosterior]:
    """The posteriors that are compared, by name.

    Args:
        model: the map, or a wrapped network.
        config: in how many steps.
        integrator: of GLASS.
        data_std: for GLASS steps that are equal in the angle; None: equal in s.
        drift_alone: another drift that GLASS runs on too.
    """
    found: dict[str, DrawsPosterior] = {}
    if not isinstance(model, ForeignModel):
        found = {f"map-{k}": MapPosterior(model, k) for k in config.map_steps}
    elif not config.glass_steps:
        raise InputError("a wrapped network draws by GLASS alone: give glass_steps")
    drifts = {"glass": model.drift, **({} if drift_alone is None else {"drift-glass": drift_alone})}
    for name, drift in drifts.items():
        for k in config.glass_steps:
            found[f"{name}-{k}"] = GlassPosterior(model.path, drift, k, integrator, data_std)
    return found


def spread_of(model: Any, spacing: str) -> float | None:
    """What GLASS steps equal in the angle are spaced by; None for steps equal in s."""
    if spacing != "angle":
        return None
    if isinstance(model, ForeignModel):
        raise InputError("a wrapped network does not know the spread of its data: set glass_spacing=uniform")
    spread: float | None = model.data_std
    return spread


def steps_of(name: str) -> int:
    """K of a sampler's name."""
    return int(name.rpartition("-")[2])


def title_of(name: str) -> str:
    """A sampler as tables call it."""
    return f"{KINDS[name.rpartition('-')[0]]}, {steps_of(name)} steps"


def pearson(x: Tensor, y: Tensor) -> float:
    """Correlation of two (n,) samples."""
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x.norm() * y.norm()).clamp_min(1e-300))


def rmse(estimate: Tensor, truth: Tensor) -> float:
    """Root-mean-square error of (n,) estimates."""
    return float((estimate - truth).square().mean().sqrt())
