"""Deterministic flow maps trained elsewhere, as maps ``X_{s,u}``: :func:`metaflowmaps.wrap` with ``flow_map=``.

One file a convention, each a :class:`FlowMapConvention`. One of your own is a subclass, and is passed as an object.
"""

import inspect
from typing import Any

from torch import nn

from metaflowmaps.errors import InputError
from metaflowmaps.interop.flow_maps.any_flow import AnyFlow
from metaflowmaps.interop.flow_maps.convention import FlowMapConvention
from metaflowmaps.interop.flow_maps.mean_flow import MeanFlow
from metaflowmaps.interop.flow_maps.sana_sprint import SanaSprint
from metaflowmaps.interop.flow_maps.shortcut import Shortcut
from metaflowmaps.interop.flow_maps.stacked_times import StackedTimes
from metaflowmaps.interop.flow_maps.trig_flow import TrigFlow
from metaflowmaps.work.choices import built, choices

__all__ = [
    "AnyFlow",
    "FlowMapConvention",
    "MeanFlow",
    "SanaSprint",
    "Shortcut",
    "StackedTimes",
    "TrigFlow",
    "convention_of",
]


def convention_of(given: Any, network: Any) -> FlowMapConvention:
    """The convention of ``wrap``'s ``flow_map``: an object, a name, or True where the network's arguments tell.

    Args:
        given: what the user gave.
        network: whose arguments are looked at.
    """
    if given is not True:
        return built(FlowMapConvention, given)
    try:
        names = set(inspect.signature(network.forward if isinstance(network, nn.Module) else network).parameters)
    except (TypeError, ValueError):  # some callables do not say
        names = set()
    told = [kind for kind in choices(FlowMapConvention).values() if kind.arguments and kind.arguments <= names]
    if len(told) != 1:
        known = ", ".join(f"{kind.__name__}()" for kind in choices(FlowMapConvention).values())
        raise InputError(
            f"the arguments of this network ({', '.join(sorted(names)) or 'unknown'}) do not tell how it is "
            f"called: give flow_map= an object of metaflowmaps.interop.flow_maps: {known}"
        )
    return told[0]()
