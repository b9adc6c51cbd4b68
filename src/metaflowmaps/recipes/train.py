"""A recipe, trained from Python."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch

from metaflowmaps.data import DataSource
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.recipes import recipe
from metaflowmaps.training.building import fitted
from metaflowmaps.training.train_config import TrainConfig
from metaflowmaps.training.training_run import trained_map
from metaflowmaps.work.config import merged


def train(
    name: str, out: str | PathLike[str], data: Any = None, /, device: torch.device | str = "cpu", **settings: Any
) -> MetaFlowMap:
    """:func:`metaflowmaps.train`."""
    folder, config = Path(out), recipe(name, settings.pop("fast", False))
    if not isinstance(config, TrainConfig):
        raise InputError(f"{name} trains a classifier: mfm train {name}")
    if data is not None:
        source = data if isinstance(data, DataSource) else config.data.given(data, folder)
        config = config.model_copy(update={"data": source})
    return trained_map(fitted(merged(config, settings)), folder, "train", device)
