"""A meta flow map of somebody else's drift: training whose teacher that drift is.

The parent is a checkpoint of ours (published weights after ``mfm convert`` among them), whose network the map takes
over with its weights, so that it begins as the parent's drift and posterior means; or any model with a path and a
drift, such as ``mfm.wrap`` makes of a network of another kind: its map is a network of ours, sized to the data. GLASS
on the drift teaches both.
"""

import hashlib
import io
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metaflowmaps.data import Arrays, DataSource, Images, Latents
from metaflowmaps.data.data_source import keep
from metaflowmaps.data.latents import INDEX
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.training.building import fitted, like_parent, sized
from metaflowmaps.training.train_config import DistillConfig, LossConfig, ModelConfig, OptimizerConfig, TimesConfig
from metaflowmaps.training.training_run import trained_map
from metaflowmaps.work.choices import build, choices
from metaflowmaps.work.config import merged

CHECKED = 64  # examples that a parent's predictions are held to
KEPT = "data.npy"  # examples that were given as a tensor, beside the run


def distilling(name: str, parent: Any, data: DataSource, fast: bool = False) -> DistillConfig:
    """The configuration of a distillation, before settings.

    Args:
        name: of the parent: a checkpoint, ``file.py:make``, or a model in memory.
        parent: the model itself.
        data: what it was trained on, or is like it: contexts are made from it.
        fast: a fraction of the steps.
    """
    shape = data.event_shape()
    known: Any = getattr(parent, "_event_shape", shape) or shape  # a wrapped network may not say its own
    theirs = tuple(known if hasattr(parent, "_event_shape") else getattr(parent, "event_shape", shape))
    if theirs != shape:
        raise InputError(f"{name} is for samples of shape {theirs}, the data have {shape}: give data of its own")
    ours = isinstance(parent, MetaFlowMap)
    config = DistillConfig(
        recipe="distill",
        data=data,
        model=ModelConfig(
            path=parent.path.name,
            data_mean=0.0 if data.law() else "image",
            data_std=_spread(data),
            network=sized(shape),
        ),
        parent=name,
        start_from_drift=ours,
        loss=LossConfig(diagonal_share=0.25),
        times=TimesConfig(from_noise=0.8),
        optimizer=OptimizerConfig(name="adam", lr=1e-4 if ours else 1e-3, betas=(0.9, 0.99)),
        steps=1_500 if fast else 6_000,
        batch_size=128,
        drift_batch_size=128,
        log_every=50,
    )
    return like_parent(config, parent.describe()) if ours else config


def data_named(text: str) -> DataSource:
    """The data that ``--data`` names.

    Args:
        text: a folder of latents (with its latents.json) or of pictures; an .npy of floats, taken as they are; other
            arrays of pictures; the name of a data source, such as ``digits``; or ``file.py:Name``.
    """
    path = Path(text).expanduser()
    if not path.exists() and (":" in text or text in choices(DataSource)):
        return build(DataSource, text, {})
    if (path / INDEX).is_file():
        return Latents(path=str(path))
    if path.suffix == ".npy" and path.is_file() and np.load(path, mmap_mode="r").dtype.kind == "f":
        return Arrays(path=str(path.resolve()))
    return Images(path=text)


def refuse_wrong(config: DistillConfig, parent: Any) -> None:
    """Refuse a wrapped parent whose predictions do not fit the data that it is to be distilled on."""
    if not config.check or not callable(getattr(parent, "check", None)):
        return
    examples = config.data.samples().sample(CHECKED, torch.Generator().manual_seed(0))
    wrong = parent.check(examples)
    if wrong:
        raise InputError(f"{wrong}; if it is meant, --set check=false")


def distill(
    model: Any, data: Any, out: str | PathLike[str], /, device: torch.device | str = "cpu", **settings: Any
) -> MetaFlowMap:
    """:func:`metaflowmaps.distill`."""
    folder = Path(out)
    source = _source(data, folder)
    config = distilling(in_memory(model), model, source, settings.pop("fast", False))
    unknown = {"parent", "data", "teacher"} & set(settings)
    if unknown:
        raise InputError(f"{min(unknown)} is not set here: it follows from the model and the data")
    config = fitted(merged(config, settings))
    refuse_wrong(config, model)
    return trained_map(config, folder, "distill", device, model)


def _spread(data: DataSource) -> float | None:
    """The spread of a law's coordinates about 0; None: measured on the examples."""
    law = data.law()
    return None if law is None else round(float((law.variance + law.mean.square()).mean().sqrt()), 4)


def _source(data: Any, folder: Path) -> DataSource:
    """The data source of what a caller has: a source, a path, or examples, which are kept beside the run."""
    if isinstance(data, DataSource):
        return data
    if isinstance(data, str | PathLike):
        return data_named(str(data))
    if not isinstance(data, Tensor | np.ndarray):
        raise InputError(f"data is a path, a tensor (n, *event) or a data source, got {type(data).__name__}")
    array = np.asarray(data.detach().cpu() if isinstance(data, Tensor) else data, dtype=np.float32)
    content = io.BytesIO()
    np.save(content, array)
    return Arrays(path=keep(content.getvalue(), folder / KEPT))


def in_memory(model: Any) -> str:
    """What a run's configuration calls a model in memory: its kind, and a hash of its weights."""
    if not all(hasattr(model, part) for part in ("path", "drift")):
        raise InputError(
            f"a model to distil has a path and a drift, {type(model).__name__} has not: mfm.wrap(network, …)"
        )
    if not isinstance(model, nn.Module):
        return f"a {type(model).__name__} in memory"
    weights = hashlib.sha256()
    for value in model.state_dict().values():
        weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"a {type(model).__name__} in memory, weights {weights.hexdigest()[:16]}"
