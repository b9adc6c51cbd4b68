"""The registry of networks: what a checkpoint's ``network.name`` may be."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.networks.mlp import MLP

NETWORKS: dict[str, type[nn.Module]] = {"mlp": MLP}


def make_network(config: Mapping[str, Any]) -> nn.Module:
    """The network of ``{"name": …, **network.config}``, freshly initialised."""
    options = dict(config)
    name = str(options.pop("name", None))
    if name not in NETWORKS:
        raise unknown("network", name, NETWORKS)
    try:
        inspect.signature(NETWORKS[name]).bind(**options)
    except TypeError as error:
        raise InputError(f"network {name!r}: {error}") from error
    return NETWORKS[name](**options)
