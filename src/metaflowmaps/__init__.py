"""Meta Flow Maps: one-step posterior sampling and reward alignment for flow models."""

from importlib.metadata import version

from metaflowmaps import rewards
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.glass import glass_drift
from metaflowmaps.mixture import GaussianMixture
from metaflowmaps.path import LinearPath, Path, TrigonometricPath
from metaflowmaps.posterior import (
    ExactModel,
    ExactPosterior,
    GlassPosterior,
    MapPosterior,
    Posterior,
    TweediePosterior,
)
from metaflowmaps.steering import SteerResult, steer
from metaflowmaps.value import ValueEstimate, value_gradient

__version__ = version("metaflowmaps")

__all__ = [
    "ExactModel",
    "ExactPosterior",
    "GaussianMixture",
    "GlassPosterior",
    "InputError",
    "LinearPath",
    "MapPosterior",
    "MetaFlowMap",
    "Path",
    "Posterior",
    "SteerResult",
    "TrigonometricPath",
    "TweediePosterior",
    "ValueEstimate",
    "glass_drift",
    "rewards",
    "steer",
    "value_gradient",
]
