"""The public names of the package: ``metaflowmaps.NAME`` is ``metaflowmaps._public.NAME``."""

from collections.abc import Callable
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor

from metaflowmaps import rewards
from metaflowmaps.context import Context
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.forecast import observation_gradient, roll
from metaflowmaps.interop.clipping import DynamicThreshold
from metaflowmaps.interop.foreign import ForeignModel, wrap
from metaflowmaps.laws.mixture import GaussianMixture
from metaflowmaps.path import LinearPath, Path, TrigonometricPath, glass_drift
from metaflowmaps.posterior import (
    ExactModel,
    ExactPosterior,
    GlassPosterior,
    MapPosterior,
    Posterior,
    TweediePosterior,
)
from metaflowmaps.sample_files import SavedSamples, load_samples
from metaflowmaps.value import Gradient, GradientFree, ValueEstimate, value_gradient
from metaflowmaps.weighted_posterior import WeightedPosterior

if TYPE_CHECKING:
    from metaflowmaps.interop import pretrained
    from metaflowmaps.pipeline import Pipeline
    from metaflowmaps.prompted import from_diffusers
    from metaflowmaps.steering import (
        DPS,
        IMAGES,
        MFMG,
        MFMGF,
        ODE,
        SDE,
        SMC,
        TDS,
        Advice,
        Anneal,
        BestOfN,
        Exact,
        Glass,
        Rejection,
        Resampling,
        Search,
        SteerResult,
        Unsteered,
        advise,
        steer,
    )


def __getattr__(name: str) -> Any:
    """What takes long to load or brings pydantic, loaded when asked for: the pipeline, published weights, steering."""
    if name == "Pipeline":
        return import_module("metaflowmaps.pipeline").Pipeline
    if name == "from_diffusers":
        return import_module("metaflowmaps.prompted").from_diffusers
    if name == "pretrained":
        return import_module("metaflowmaps.interop.pretrained")
    if name in __all__:
        return getattr(import_module("metaflowmaps.steering"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def finetune(
    model: MetaFlowMap, reward: Callable[..., Tensor], out: str | PathLike[str], device: str = "cpu", **settings: Any
) -> MetaFlowMap:
    """A map of p_1 e^r: the model's copy with the tilt in its weights, trained in the directory ``out``.

    Interrupted, the same call goes on from ``out``; finished, it returns what is there.

    Args:
        model: the base map.
        reward: a function of x (B, *event) -> (B,); the strength λ lives in it.
        out: the directory of the run.
        device: where it trains.
        settings: those of ``mfm finetune --set``, groups as dictionaries: ``steps=3000, num_draws=4,
            map="distil"|"direct"|"none", low_rank=8, states={"base": 1.0}, stop="distance<2"``.

    Returns:
        The tuned map, on ``device``.

    Examples:
        >>> from tempfile import mkdtemp
        >>> from metaflowmaps.networks import MLPConfig
        >>> base = mfm.MetaFlowMap(MLPConfig(width=8, depth=1).network((2,)), mfm.LinearPath(), data_std=0.5)
        >>> reward = lambda x: -(((x[:, 0] - 1) / 0.3) ** 2) / 2
        >>> settings = {"steps": 2, "batch_size": 8, "map": "none", "meters": {"every": 0}}  # far too few steps
        >>> tuned = mfm.finetune(base, reward, mkdtemp(), threads=1, **settings)
        >>> tuned.drift(0.5, torch.zeros(3, 2)).shape
        torch.Size([3, 2])
    """
    from metaflowmaps.finetuning.tune import tune  # what trains is loaded by those who train

    return tune(model, reward, str(out), device=device, **settings)


def distill(model: Any, data: Any, out: str | PathLike[str], /, device: str = "cpu", **settings: Any) -> MetaFlowMap:
    """A meta flow map of a model's drift, trained in the directory ``out``: one-step draws of its posteriors.

    Interrupted, the same call goes on from ``out``; finished, it returns what is there.

    Args:
        model: what has a path and a drift: ``mfm.wrap`` makes it of any network, and a MetaFlowMap (published weights
            among them) is one, whose network the map then takes over.
        data: what the model was trained on, or is like it: a folder of pictures or latents, an .npy, a tensor
            (n, *event), which is kept in ``out``, or a data source.
        out: the directory of the run.
        device: where it trains.
        settings: those of ``mfm distill --set``, groups as dictionaries: ``steps=3000, batch_size=256, low_rank=8,
            optimizer={"lr": 3e-4}, model={"network": {"name": "mlp", "width": 256}}, check=False``.

    Returns:
        The map, on ``device``.

    Examples:
        >>> from tempfile import mkdtemp
        >>> model = mfm.wrap(lambda x, t: 0 * x, "velocity", event_shape=(2,))
        >>> options = {"steps": 2, "batch_size": 8, "threads": 1, "check": False}  # far too few
        >>> settings = {**options, "model": {"network": {"name": "mlp", "width": 8, "depth": 1}}}
        >>> mapped = mfm.distill(model, torch.randn(64, 2), mkdtemp(), **settings)
        >>> mapped.generate(4).shape
        torch.Size([4, 2])
    """
    from metaflowmaps.training import distillation  # what trains is loaded by those who train

    return distillation.distill(model, data, out, device, **settings)


def train(
    recipe: str, out: str | PathLike[str], data: Any = None, /, device: str = "cpu", **settings: Any
) -> MetaFlowMap:
    """A map trained by a recipe in the directory ``out``, as ``mfm train RECIPE --data DATA`` does.

    Interrupted, the same call goes on from ``out``; finished, it returns what is there.

    Args:
        recipe: its name, as ``mfm recipes`` lists them: ``"sequences"``, ``"simulator"``, ``"images"``, ….
        out: the directory of the run.
        data: what it learns from: the path of files, or a data source. Of ``"sequences"`` also an array
            (n, time, *event), or sequences (time, *event) that a generator yields, which are kept in ``out``; of
            ``"simulator"`` a function (n, generator) -> (θ, x).
        device: where it trains.
        settings: those of ``mfm train --set``, groups as dictionaries, ``steps=3000, data={"num": 5000}``, or by name,
            ``**{"data.contexts.most": 8}``; ``fast=True`` is ``--fast``.

    Returns:
        The map, on ``device``.

    Examples:
        >>> from tempfile import mkdtemp
        >>> settings = {"steps": 2, "batch_size": 16, "threads": 1}  # far too few
        >>> model = mfm.train("gmm", mkdtemp(), **settings)
        >>> model.draw(0.5, torch.zeros(1, 2), num_draws=3).shape
        torch.Size([3, 1, 2])
    """
    from metaflowmaps.recipes import train as training  # what trains is loaded by those who train

    return training.train(recipe, out, data, device, **settings)


__all__ = [
    "DPS",
    "IMAGES",
    "MFMG",
    "MFMGF",
    "ODE",
    "SDE",
    "SMC",
    "TDS",
    "Advice",
    "Anneal",
    "BestOfN",
    "Context",
    "DynamicThreshold",
    "Exact",
    "ExactModel",
    "ExactPosterior",
    "ForeignModel",
    "GaussianMixture",
    "Glass",
    "GlassPosterior",
    "Gradient",
    "GradientFree",
    "InputError",
    "LinearPath",
    "MapPosterior",
    "MetaFlowMap",
    "Path",
    "Pipeline",
    "Posterior",
    "Rejection",
    "Resampling",
    "SavedSamples",
    "Search",
    "SteerResult",
    "TrigonometricPath",
    "TweediePosterior",
    "Unsteered",
    "ValueEstimate",
    "WeightedPosterior",
    "advise",
    "distill",
    "finetune",
    "from_diffusers",
    "glass_drift",
    "load_samples",
    "observation_gradient",
    "pretrained",
    "rewards",
    "roll",
    "steer",
    "train",
    "value_gradient",
    "wrap",
]
