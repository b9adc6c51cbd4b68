"""The registries: what a checkpoint's ``network.name`` may be, and the image classifiers."""

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.networks.classifiers import Classifier, ConvClassifier, PatchClassifier
from metaflowmaps.networks.dit import DiT
from metaflowmaps.networks.mlp import MLP
from metaflowmaps.networks.unet import UNet

NETWORKS: dict[str, type[nn.Module]] = {"mlp": MLP, "unet": UNet, "dit": DiT}
CLASSIFIERS: dict[str, type[Classifier]] = {"conv-classifier": ConvClassifier, "patch-classifier": PatchClassifier}

Built = TypeVar("Built", bound=nn.Module)


def make_network(config: Mapping[str, Any]) -> nn.Module:
    """The network of ``{"name": …, **network.config}``, freshly initialised."""
    return _make("network", NETWORKS, config)


def make_classifier(config: Mapping[str, Any]) -> Classifier:
    """The classifier of ``{"name": …, **classifier.config}``, freshly initialised."""
    return _make("classifier", CLASSIFIERS, config)


def describe_network(network: nn.Module, registry: Mapping[str, type[nn.Module]] = NETWORKS) -> dict[str, Any]:
    """What ``make_network`` or ``make_classifier`` makes a network of: ``{"name": …, **network.config}``."""
    name, config, kind = getattr(network, "name", None), getattr(network, "config", None), type(network)
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):  # sharded: of a class derived for it
        kind = kind.__mro__[2]
    if registry.get(str(name)) is not kind or not isinstance(config, dict):
        where = "NETWORKS" if registry is NETWORKS else "CLASSIFIERS"
        raise InputError(
            f"a network of type {type(network).__name__} cannot be saved: "
            f"give it a name and a config and add it to metaflowmaps.networks.{where}"
        )
    return {"name": name, **config}


def _make(kind: str, registry: Mapping[str, type[Built]], config: Mapping[str, Any]) -> Built:
    options = dict(config)
    name = str(options.pop("name", None))
    if name not in registry:
        raise unknown(kind, name, registry)
    try:
        inspect.signature(registry[name]).bind(**options)
    except TypeError as error:
        raise InputError(f"{kind} {name!r}: {error}") from error
    return registry[name](**options)
