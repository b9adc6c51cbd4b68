"""The families of networks and of image classifiers: frozen configurations that build modules.

A network of your own is a subclass of :class:`NetworkConfig` in a file of yours: its fields are its options, ``build``
returns the module. Checkpoints keep the configuration and the shape of a sample, so it is saved, loaded and steered
like any other.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import Field
from torch import nn

from metaflowmaps.errors import InputError
from metaflowmaps.work.choices import Choice, build, dumped, kind_of, spelled
from metaflowmaps.work.config import Config
from metaflowmaps.work.own_code import named_by_a_file

Family = TypeVar("Family", bound="NetworkConfig | ClassifierNetworkConfig")
Described = dict[str, Any]  # a network, a map or a classifier, as JSON
MAX_COORDINATES = 2**28  # of a sample: a gigabyte
MAX_WIDTH, MAX_DEPTH = 2**16, 1000  # of any network: what a file asks for beyond is a mistake or worse
SHAPE = "event_shape"  # where a checkpoint says the shape of a sample


class NetworkConfig(Config, Choice):
    """What a map's network is made of, but for the shape of its samples, which the data decide."""

    kind: ClassVar[str] = "network"

    num_classes: int = Field(0, ge=0, le=1_000_000)  # 0: no classes; else label num_classes is the null class
    guidance: bool | list[float] = False  # takes guidance scales: any w >= 0, or those listed

    def build(self, event_shape: tuple[int, ...]) -> nn.Module:
        """The module, freshly initialised.

        Args:
            event_shape: of one sample.

        Returns:
            A module ``forward(z, a, b, context, context_time, **cond) -> (B, *event)`` with z and context
            (B, *event), times (B,) in [0, 1], and cond ``label`` (B,) where there are classes and ``guidance`` (B,)
            where it takes scales. Let its output be 0 at initialisation: a gaussian map is then exact on Gaussian data.
        """
        raise NotImplementedError

    def shallow(self) -> "NetworkConfig":
        """The smallest network of which the compiler sees all that it sees of this one."""
        return self

    def reader(self, event_shape: tuple[int, ...], summary: int, frames: int) -> nn.Module:
        """The module as the body of an ``observed`` network, which reads what was observed too.

        Args:
            event_shape: of one sample.
            summary: width of the vector ``summary`` (B, width), a condition of its forward.
            frames: channels of the condition ``frames`` (B, channels, H, W), 0 where there are none.
        """
        raise InputError(f"{spelled(type(self))} reads no observations: set model.network.body=mlp, unet or dit")

    def network(self, event_shape: tuple[int, ...]) -> nn.Module:
        """:meth:`build`, and what maps and checkpoints ask of a network."""
        made = self.build(tuple(event_shape))
        return _equipped(made, self, event_shape=tuple(event_shape), num_classes=self.num_classes)


class ClassifierNetworkConfig(Config, Choice):
    """What a classifier of images is made of, but for their shape and the number of their classes."""

    kind: ClassVar[str] = "classifier"

    def build(self, event_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The module, freshly initialised: ``forward(x) -> (B, num_classes)``, ``features(x) -> (B, d)``."""
        raise NotImplementedError

    def network(self, event_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """:meth:`build`, and what checkpoints ask of a classifier."""
        made = self.build(tuple(event_shape), num_classes)
        return _equipped(made, self, event_shape=tuple(event_shape), num_classes=num_classes)


def _equipped(network: nn.Module, config: Config, **known: Any) -> nn.Module:
    """The module with its configuration, unless its own says more, and with what it does not say of itself."""
    if type(getattr(network, "config", None)) is not type(config):
        network.config = config  # type: ignore[assignment]
    for name, value in known.items():
        if not hasattr(network, name):
            setattr(network, name, value)
    return network


def describe_network(network: nn.Module) -> Described:
    """A network or a classifier as a checkpoint keeps it: its name, options and the shape of its samples."""
    config: Any = getattr(network, "config", None)
    kind = type(network)
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):  # sharded: of a class derived for it
        kind = kind.__mro__[2]
    known = isinstance(config, NetworkConfig | ClassifierNetworkConfig)
    # a subclass of a network of ours inherits a configuration that does not build it
    if not known or (":" not in spelled(type(config)) and kind.__module__ != type(config).__module__):
        raise InputError(
            f"a network of type {type(network).__name__} cannot be saved: make it by a NetworkConfig of your own, "
            "MyConfig(…).network(event_shape) (docs/extending.md)"
        )
    described = {**dumped(config), SHAPE: list(network.event_shape)}  # type: ignore[arg-type]
    return {**described, "num_classes": network.num_classes}


def make_network(described: Mapping[str, Any]) -> nn.Module:
    """The network that :func:`describe_network` described, freshly initialised."""
    config, shape = read_network(described)
    return config.network(shape)


def read_network(described: Mapping[str, Any]) -> tuple[NetworkConfig, tuple[int, ...]]:
    """The configuration and the shape of a sample that :func:`describe_network` described."""
    return _separated(NetworkConfig, described)


def make_classifier(described: Mapping[str, Any]) -> nn.Module:
    """The classifier that :func:`describe_network` described, freshly initialised."""
    described = dict(described)
    classes = described.pop("num_classes", None)
    config, shape = _separated(ClassifierNetworkConfig, described)
    if classes is None:
        raise InputError("does not say 'num_classes', without which there is no classifier")
    return config.network(shape, classes)


@named_by_a_file()
def _separated(family: type[Family], described: Mapping[str, Any]) -> tuple[Family, tuple[int, ...]]:
    """The configuration and the shape of a sample; version 0.1 kept the shape among the options."""
    options = dict(described)
    name, shape = str(options.pop("name", None)), options.pop(SHAPE, None)
    if shape is None:
        dim, flat, channels, size = (options.pop(key, None) for key in ("dim", "shape", "channels", "size"))
        shape = flat or ([dim] if dim is not None else [channels, size, size])
    config = build(family, name, options)
    whole = all(isinstance(n, int) and n >= 1 for n in shape)
    if not whole or math.prod(shape) > MAX_COORDINATES:
        raise InputError(
            f"{kind_of(family)} {name}: {SHAPE} must list whole numbers >= 1 of a product up to {MAX_COORDINATES:,}, "
            f"got {shape}"
        )
    return config, tuple(shape)
