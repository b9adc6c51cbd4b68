"""From a configuration to an untrained network: what it leaves open is measured on its data, then it is built."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from metaflowmaps.checkpoint import resolve_checkpoint
from metaflowmaps.data import ContextSource, Examples
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks import (
    DiTConfig,
    MLPConfig,
    NetworkConfig,
    Observed,
    ObservedConfig,
    UNetConfig,
    read_network,
)
from metaflowmaps.path import make_path
from metaflowmaps.training.train_config import (
    ClassifierConfig,
    TrainConfig,
)
from metaflowmaps.work.config import validated

AnyTrainConfig = TypeVar("AnyTrainConfig", bound=TrainConfig)


def build_map(config: TrainConfig) -> MetaFlowMap:
    """The untrained map, a function of the configuration and its seed."""
    assert config.model.data_std is not None, "fitted() measures it"
    mean: Tensor | float
    mean = mean_image(config.data.load()[0]) if config.model.data_mean == "image" else config.model.data_mean
    with _seeded(config.seed):
        model = MetaFlowMap(
            network_of(config),
            make_path(config.model.path),
            config.model.parameterization,
            mean,
            config.model.data_std,
        )
    if isinstance(config.data, ContextSource):
        if not isinstance(model.network, Observed):
            raise InputError("general contexts need a network that reads them: set model.network=observed")
        model.network.fit(*config.data.fit(model.network.config.nodes))
    return model


def fitted(config: AnyTrainConfig) -> AnyTrainConfig:
    """The configuration with what it leaves open measured on its images: shape, spread, network, classes."""
    if config.parent is not None and config.model.network is None:
        config = like_parent(config)
    if isinstance(config.data, ContextSource):
        return _reading(config, config.data)
    counted = bool(config.num_classes) or config.data.classes is not None
    if not config.data.open and None not in (config.model.data_std, config.model.network) and counted:
        return config  # a full recipe
    images = config.data.load()[0]
    data = config.data.settled(images)
    model = config.model
    if model.data_std is None:
        if model.data_mean == "image":
            squared = images.std**2 - float((mean_image(images).double() - images.mean).square().mean())
        else:
            squared = images.std**2 + (images.mean - model.data_mean) ** 2
        model = model.model_copy(update={"data_std": round(math.sqrt(max(squared, 1e-6)), 4)})
    network = model.network
    if network is None:
        network = sized(images.event_shape).model_copy(update={"guidance": config.condition.guided})
    if data.classes is None and not network.num_classes:
        network = network.model_copy(update={"num_classes": images.num_classes})
    model = model.model_copy(update={"network": network})
    return validated(type(config), {**config.model_dump(), "data": data, "model": model.model_dump()})


def _reading(config: AnyTrainConfig, data: ContextSource) -> AnyTrainConfig:
    """The configuration with what the data decide of a network that reads observations."""
    network = config.model.network
    if not isinstance(network, ObservedConfig):
        raise InputError("general contexts need a network that reads them: set model.network=observed")
    network = network.model_copy(update=data.network_options())
    return config.model_copy(update={"model": config.model.model_copy(update={"network": network})})


def like_parent(config: AnyTrainConfig, described: Mapping[str, Any] | None = None) -> AnyTrainConfig:
    """The configuration with the parent's path, parameterisation and network, and guidance where it is asked for.

    Args:
        config: of the run.
        described: the parent as ``MetaFlowMap.describe`` has it; None: as its checkpoint has it.
    """
    found = resolve_checkpoint(str(config.parent)).config if described is None else described
    network = read_network(found["network"])[0]
    network = network.model_copy(update={"guidance": network.guidance or config.condition.guided})
    model = {
        **config.model.model_dump(),
        "path": found["path"],
        "parameterization": found["parameterization"],
        "data_std": found["data_std"],
        "network": network,
    }
    return validated(type(config), {**config.model_dump(), "model": model})


def sized(event_shape: tuple[int, ...]) -> NetworkConfig:
    """A network for samples of this shape: a perceptron to 12 pixels a side, a U-Net to 64, a transformer above."""
    if len(event_shape) != 3:
        return MLPConfig(width=256, depth=4)
    channels, size, _ = event_shape
    if size <= 12:
        return MLPConfig(width=256 if channels == 1 else 512, depth=6, modulation=True)
    if channels > 1 and size % 8 == 0 and size <= 64:  # in patches five times the weights cost no more than in pixels
        return UNetConfig(patch=2, width=64, multipliers=(1, 2, 3), blocks=1, attention=())
    if size <= 64:
        levels, side = 1, size
        while side % 2 == 0 and side // 2 >= 6 and levels < 4:
            side, levels = side // 2, levels + 1
        attention = (side,) if side <= 16 else ()
        width = 32 if channels == 1 else 64
        return UNetConfig(width=width, multipliers=(1, 2, 2, 2)[:levels], blocks=1, attention=attention)
    patch = next(p for p in range(max(2, size // 32), size + 1) if size % p == 0)
    return DiTConfig(patch=patch, width=192, depth=6, heads=3, encoder_depth=4)


def mean_image(images: Examples) -> Tensor:
    """The mean of a set's images, (C, H, W); sets that do not fit in memory know it."""
    known: Tensor | None = getattr(images, "mean_image", None)
    if known is not None:
        return known.float()
    total = torch.zeros(images.event_shape, dtype=torch.float64)
    for part in torch.arange(len(images)).split(1024):
        total += images.tensor(part).double().sum(0)
    return (total / len(images)).float()


def event_shape(config: TrainConfig) -> tuple[int, ...]:
    """The shape of a sample, as the law or the examples have it."""
    shape = config.data.event_shape()
    if config.model.event_shape not in (None, shape):
        raise InputError(
            f"{config.recipe} is for samples of shape {config.model.event_shape}, the data have {shape}: "
            f"--set model.event_shape={list(shape)}"
        )
    return shape


def network_of(config: TrainConfig) -> nn.Module:
    """The untrained network, for samples of the law or the data."""
    assert config.model.network is not None, "fitted() sizes it"
    return config.model.network.network(event_shape(config))


def build_classifier(config: ClassifierConfig) -> nn.Module:
    """The untrained classifier."""
    train_set, _ = config.data.load()
    if train_set.labels is None:
        raise InputError(f"{train_set.name} has no labels to train a classifier with: --set data.labels=true")
    with _seeded(config.seed):
        return config.network.network(train_set.event_shape, train_set.num_classes)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # module initialisers know only the global generator: fork it, so that nobody else's stream moves
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
