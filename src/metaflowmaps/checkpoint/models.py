"""Models as checkpoints, maps and classifiers: save, load, resolve a path, a shipped name or a hub id."""

import re
import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from metaflowmaps.checkpoint.files import (
    CONFIG,
    EMA,
    FORMAT,
    INSTEAD,
    MANIFEST,
    MODEL,
    Checkpoint,
    CheckpointError,
    old_name,
    read_checkpoint,
    reading,
    some,
    write_checkpoint,
    wrong_format,
)
from metaflowmaps.checkpoint.shipped import names, shipped
from metaflowmaps.checkpoint.store import CheckpointStore
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.networks import CLASSIFIERS, NETWORKS, make_classifier, make_network
from metaflowmaps.networks.low_rank import add_low_rank, fold, rank_of
from metaflowmaps.path import make_path

KIND, CLASSIFIER = "meta-flow-map", "classifier"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def model_config(model: nn.Module) -> dict[str, Any]:
    """What build_model needs."""
    if not isinstance(model, MetaFlowMap):
        return {"format": FORMAT, "kind": CLASSIFIER, "network": _network(model, CLASSIFIERS), **_version()}
    return {
        "format": FORMAT,
        "kind": KIND,
        "path": model.path.name,
        "parameterization": model.parameterization,
        "data_std": model.data_std,
        "network": _network(model.network, NETWORKS),
        **({"low_rank": rank_of(model.network)} if rank_of(model.network) else {}),
        **_version(),
    }


def _network(network: nn.Module, registry: Mapping[str, type[nn.Module]]) -> dict[str, Any]:
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


def _version() -> dict[str, str]:
    return {"version": version("metaflowmaps")}


def build_model(config: Mapping[str, Any], kind: str = KIND) -> nn.Module:
    """The model a config describes, freshly initialised; keys it does not need are ignored."""
    if config.get("kind") != kind:
        raise InputError(f"is of kind {config.get('kind')!r}, and a {kind!r} is needed here: give a checkpoint of one")
    if config.get("format") != FORMAT:
        raise InputError(wrong_format(config.get("format")))
    needed = ("network",) if kind == CLASSIFIER else ("path", "parameterization", "data_std", "network")
    for key in needed:
        if key not in config:
            raise InputError(f"does not say {key!r}, without which there is no model")
    if kind == CLASSIFIER:
        return make_classifier(config["network"])
    network, path = make_network(config["network"]), make_path(config["path"])
    if config.get("low_rank"):
        add_low_rank(network, config["low_rank"])
    return MetaFlowMap(network, path, config["parameterization"], data_std=config["data_std"])


def save_model(
    model: nn.Module,
    path: str | FilePath,
    notes: Mapping[str, Any] | None = None,
    documents: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as a checkpoint, all or nothing, with ``notes`` in its configuration and documents of its own."""
    config = {**model_config(model), **(notes or {})}
    write_checkpoint(path, {MODEL: model.state_dict()}, {CONFIG: config, **(documents or {})})


def load_model(path_or_hub_id: str | FilePath, revision: str | None = None, weights: str = "ema") -> MetaFlowMap:
    """The model of a checkpoint, a run's newest valid checkpoint or a hub repository: on CPU, in eval mode.

    ``weights``: "ema" for the averaged ones where there are any, "raw" for the last iterate.
    """
    model = _load(path_or_hub_id, revision, weights, KIND)
    assert isinstance(model, MetaFlowMap)
    return model


def load_classifier(path_or_hub_id: str | FilePath, revision: str | None = None, weights: str = "ema") -> nn.Module:
    """The classifier of a checkpoint or run, likewise: (B, *event) -> logits, frozen."""
    return _load(path_or_hub_id, revision, weights, CLASSIFIER).requires_grad_(False)


def _load(path_or_hub_id: str | FilePath, revision: str | None, weights: str, kind: str) -> nn.Module:
    if weights not in ("ema", "raw"):
        raise unknown("weights", weights, ("ema", "raw"))
    checkpoint = resolve_checkpoint(path_or_hub_id, revision)
    name = EMA if weights == "ema" and checkpoint.has(EMA) else MODEL
    stored = checkpoint.tensors(name)
    try:
        # loading a model must not disturb the caller's random numbers, nor obey their default device
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            model = build_model(checkpoint.config, kind)
            if (
                isinstance(model, MetaFlowMap) and "data_mean" in stored
            ):  # a number or a tensor: only the checkpoint knows
                model.data_mean = torch.zeros_like(stored["data_mean"])
    except InputError as error:
        raise CheckpointError(checkpoint.path / CONFIG, str(error)) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"does not describe a model ({type(error).__name__}: {error}): {INSTEAD}"
        raise CheckpointError(checkpoint.path / CONFIG, reason) from error
    problem = _misfit(model, stored)
    if problem:
        raise CheckpointError(checkpoint.path / name, f"does not fit {CONFIG}, {problem}: {INSTEAD}")
    for key, slot in [*model.named_parameters(), *model.named_buffers()]:
        if key in stored:  # a tied weight is listed under one of its names only
            slot.data = slot.data.to(stored[key].dtype)
    model.load_state_dict(stored)
    if checkpoint.config.get("dtype") == "float32":  # stored in fewer bits than it works in
        model.float()
    if rank_of(model):  # tuned at low rank, it is an ordinary map from here on
        fold(model)
        model.requires_grad_(True)
    return model.eval()


def resolve_checkpoint(path: str | FilePath, revision: str | None = None) -> Checkpoint:
    """The checkpoint meant by a checkpoint or run directory, a shipped model's name or a hub id; verified."""
    local = FilePath(path)
    with reading(local):
        root = local if local.name == "checkpoints" else local / "checkpoints"
        if root.is_dir() and not (local / MANIFEST).exists():
            return _newest(root)
        if local.exists() or old_name(local).is_dir():
            return read_checkpoint(local)
    carried = shipped(str(path))
    if carried is not None:
        return read_checkpoint(carried)
    if HUB_ID.fullmatch(str(path)):
        return read_checkpoint(_download(str(path), revision))
    raise CheckpointError(
        path,
        f"no such file or directory: give a checkpoint (a directory with {MANIFEST}), a training run "
        f"(a directory with checkpoints/) or {', '.join(['a hub id (owner/name)', *names()])}",
    )


def export_run(path_or_hub_id: str | FilePath, out: str | FilePath, notes: Mapping[str, Any]) -> None:
    """The averaged weights of a run as a checkpoint of their own, with its configuration and ``notes``.

    They are stored in float16 (an error of 5e-4 of a weight) and become float32 again when loaded.
    """
    found = resolve_checkpoint(path_or_hub_id)
    stored = found.tensors(EMA if found.has(EMA) else MODEL)
    weights = {name: value.half() if value.is_floating_point() else value for name, value in stored.items()}
    write_checkpoint(out, {MODEL: weights}, {CONFIG: {**found.config, **notes, "dtype": "float32"}})


def push_model(
    model: MetaFlowMap, repo_id: str, private: bool | None = None, token: str | None = None, **options: Any
) -> str:
    """Upload what save_model writes to a hub repository, made if need be; returns its address.

    ``options`` go to ``huggingface_hub.HfApi.upload_folder`` (revision, commit_message, …).
    """
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, FilePath(folder) / "model")
        try:
            from huggingface_hub import HfApi

            api = HfApi(token=token)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=FilePath(folder) / "model", **options)
        except Exception as error:
            fix = "check the name, the network and `hf auth login`"
            problem = f"not uploaded to the hub ({_first_line(error)}): {fix}"
            raise CheckpointError(repo_id, problem) from error
    return str(address)


def _misfit(model: nn.Module, stored: Mapping[str, Tensor]) -> str:
    """How stored tensors differ from what the model needs; empty where they fit."""
    needed = model.state_dict()
    wrong = []
    for key in sorted(needed.keys() & stored.keys()):
        have, need = stored[key], needed[key]
        if have.shape != need.shape:
            wrong.append(f"{key} is {tuple(have.shape)} not {tuple(need.shape)}")
        elif have.is_floating_point() != need.is_floating_point():
            wrong.append(f"{key} is {have.dtype} not {need.dtype}")
    mean, event = getattr(model, "data_mean", torch.zeros(())).shape, tuple(model.event_shape)  # type: ignore[arg-type]
    # its shape is free (a number or a tensor) as long as it broadcasts to a sample
    if len(mean) > len(event) or any(m not in (1, e) for m, e in zip(mean[::-1], event[::-1], strict=False)):
        wrong.append(f"data_mean is {tuple(mean)} for samples of {event}")
    parts = {
        "missing": sorted(needed.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - needed.keys()),
        "wrong shape or type": wrong,
    }
    return "; ".join(f"{what}: {some(keys)}" for what, keys in parts.items() if keys)


def _newest(root: FilePath) -> Checkpoint:
    checkpoint, skipped = CheckpointStore(root).latest_valid()
    if checkpoint is None:
        reason = f"; the newest: {skipped[0]}" if skipped else ""
        raise CheckpointError(root, f"holds no valid checkpoint: train first or use another run{reason}")
    for line in skipped:
        warnings.warn(f"skipped {line}", stacklevel=5)
    return checkpoint


def _download(repo_id: str, revision: str | None) -> str:
    try:
        from huggingface_hub import snapshot_download

        patterns = ["*.json", "*.safetensors"]
        return str(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except Exception as error:
        problem = f"no such directory, and not on the hub ({_first_line(error)}): check the spelling"
        raise CheckpointError(repo_id, problem) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
