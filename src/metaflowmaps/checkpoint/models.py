"""Models as checkpoints: save, load, resolve a path, a shipped name or a hub id."""

import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path as FilePath
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from metaflowmaps import __version__
from metaflowmaps._files import read_regular
from metaflowmaps.checkpoint.manifest import (
    CONFIG,
    EMA,
    FORMAT,
    INSTEAD,
    MANIFEST,
    MODEL,
    CheckpointError,
    parse_json,
    reading,
    shortened,
    wrong_format,
)
from metaflowmaps.checkpoint.reading import Checkpoint, read_checkpoint
from metaflowmaps.checkpoint.shipped import names, shipped
from metaflowmaps.checkpoint.store import CheckpointStore
from metaflowmaps.checkpoint.writing import old_name, write_checkpoint
from metaflowmaps.errors import InputError, unknown

CLASSIFIER = "classifier"
Built = TypeVar("Built", bound=nn.Module)
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class Pretrained(nn.Module):
    """A model that saves itself as a checkpoint, and is loaded from one or from the hub.

    A subclass says its ``kind``, describes itself (:meth:`describe`) and is made from that description
    (:meth:`from_description`); weights and files are seen to here.
    """

    kind: ClassVar[str]

    def describe(self) -> dict[str, Any]:
        """What ``from_description`` needs, as JSON."""
        raise NotImplementedError

    @classmethod
    def from_description(cls, described: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> Self:
        """The model, freshly initialised; ``shapes`` are those of the tensors that it will hold."""
        raise NotImplementedError

    def save_pretrained(self, path: str | FilePath) -> None:
        """Write config.json, model.safetensors and manifest.json into a directory, all or nothing.

        Args:
            path: The directory; a checkpoint that is there is replaced, anything else is refused.
        """
        save_model(self, path)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | FilePath, revision: str | None = None, weights: str = "ema") -> Self:
        """Load a model; anything damaged is refused.

        Args:
            path_or_hub_id: A checkpoint directory, a training run (its newest valid checkpoint), the name of a model
                that comes with the package, or a hub repository ``owner/name``.
            revision: Of a hub repository: a branch, tag or commit.
            weights: "ema" for the averaged ones where there are any, "raw" for the last iterate.

        Returns:
            The model, on CPU and in evaluation mode.
        """
        return _load(path_or_hub_id, revision, weights, cls.kind, cls.from_description)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None, **options: Any) -> str:
        """Upload what ``save_pretrained`` writes.

        Args:
            repo_id: ``owner/name``, made if need be.
            private: Whether a new repository is private.
            token: Of the hub; by default the one that ``hf auth login`` keeps.
            options: As for ``huggingface_hub.HfApi.upload_folder`` (revision, commit_message, …).

        Returns:
            The repository's address.
        """
        with tempfile.TemporaryDirectory() as folder:
            save_model(self, FilePath(folder) / "model")
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


def model_config(model: nn.Module) -> dict[str, Any]:
    """config.json of a model or a classifier."""
    kind, described = CLASSIFIER, {}
    if isinstance(model, Pretrained):
        kind, described = model.kind, model.describe()
    else:
        from metaflowmaps.networks import describe_network  # configurations bring pydantic

        described = {"network": describe_network(model)}
    return {"format": FORMAT, "kind": kind, **described, "version": __version__}


def save_model(
    model: nn.Module,
    path: str | FilePath,
    notes: Mapping[str, Any] | None = None,
    documents: Mapping[str, Any] | None = None,
) -> None:
    """Write a model or a classifier as a checkpoint, all or nothing.

    Args:
        model: A :class:`Pretrained` model, or a classifier of ours.
        path: The directory.
        notes: More for its configuration.
        documents: JSON files of its own beside it: name -> content.
    """
    config = {**model_config(model), **(notes or {})}
    write_checkpoint(path, {MODEL: model.state_dict()}, {CONFIG: config, **(documents or {})})


def load_classifier(path_or_hub_id: str | FilePath, revision: str | None = None, weights: str = "ema") -> nn.Module:
    """The classifier of a checkpoint or run, as ``from_pretrained`` has it: (B, *event) -> logits, frozen."""

    from metaflowmaps.networks import make_classifier

    def build(described: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> nn.Module:
        return make_classifier(described["network"])

    return _load(path_or_hub_id, revision, weights, CLASSIFIER, build).requires_grad_(False)


def _load(
    path_or_hub_id: str | FilePath,
    revision: str | None,
    weights: str,
    kind: str,
    build: Callable[[Mapping[str, Any], Mapping[str, torch.Size]], Built],
) -> Built:
    if weights not in ("ema", "raw"):
        raise unknown("weights", weights, ("ema", "raw"))
    checkpoint = resolve_checkpoint(path_or_hub_id, revision)
    name = EMA if weights == "ema" and checkpoint.has(EMA) else MODEL
    stored = checkpoint.tensors(name)
    file, config = checkpoint.path / CONFIG, checkpoint.config
    try:
        _check_kind(config, kind)
        # loading a model must not disturb the caller's random numbers, nor obey their default device
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), _no_larger_than(stored):
            model = build(config, {key: value.shape for key, value in stored.items()})
    except KeyError as error:
        raise CheckpointError(file, f"does not say {error}, without which there is no model") from error
    except InputError as error:
        raise CheckpointError(file, str(error)) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        problem = f"does not describe a model ({type(error).__name__}: {error}): {INSTEAD}"
        raise CheckpointError(file, problem) from error
    problem = _misfit(model, stored)
    if problem:
        raise CheckpointError(checkpoint.path / name, f"does not fit {CONFIG}, {problem}: {INSTEAD}")
    broken = sorted(key for key, value in stored.items() if not bool(torch.isfinite(value).all()))
    if broken:
        raise CheckpointError(
            checkpoint.path / name, f"holds numbers that are not finite, in {shortened(broken)}: {INSTEAD}"
        )
    for key, slot in [*model.named_parameters(), *model.named_buffers()]:
        if key in stored:  # a tied weight is listed under one of its names only
            slot.data = slot.data.to(stored[key].dtype)
    model.load_state_dict(stored)
    if config.get("dtype") == "float32":  # stored in fewer bits than it works in
        model.float()
    from metaflowmaps.networks.low_rank import fold, rank_of

    if rank_of(model):  # tuned at low rank, it is an ordinary map from here on
        fold(model)
        model.requires_grad_(True)
    return model.eval()


@contextmanager
def _no_larger_than(stored: Mapping[str, Tensor]) -> Iterator[None]:
    """Stop building where it takes twice what is stored: a configuration may ask for a million layers."""
    left = {"weights": 2 * len(stored) + 16, "numbers": 2 * sum(value.numel() for value in stored.values()) + 2**20}
    thread = threading.get_ident()

    def count(_module: nn.Module, _name: str, weight: Tensor | None) -> None:
        if weight is None or threading.get_ident() != thread:
            return
        left["weights"] -= 1
        left["numbers"] -= weight.numel()
        if min(left.values()) < 0:
            raise InputError(f"asks for a larger model than the one whose weights lie beside it: {INSTEAD}")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _check_kind(config: Mapping[str, Any], kind: str) -> None:
    if config.get("kind") != kind:
        raise InputError(f"is of kind {config.get('kind')!r}, and a {kind!r} is needed here: give a checkpoint of one")
    if config.get("format") != FORMAT:
        raise InputError(wrong_format(config.get("format")))


def resolve_checkpoint(path: str | FilePath, revision: str | None = None) -> Checkpoint:
    """The checkpoint meant by a checkpoint or run directory, a shipped model's name or a hub id; verified."""
    local = FilePath(path)
    with reading(local):
        root = local if local.name == "checkpoints" else local / "checkpoints"
        if root.is_dir() and not (local / MANIFEST).exists():
            return _newest(root)
        if (local / "run.json").is_file() and not (local / MANIFEST).exists():
            raise CheckpointError(local, f"not finished, no checkpoint was written yet: run {_command(local)} again")
        if local.exists() or old_name(local).is_dir():
            return read_checkpoint(local)
    carried = shipped(str(path))
    if carried is not None:
        return read_checkpoint(carried)
    if HUB_ID.fullmatch(str(path)):
        return read_checkpoint(_download(str(path), revision))
    near = get_close_matches(str(path), names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise CheckpointError(
        path,
        f"no such file or directory: {hint}give a checkpoint (a directory with {MANIFEST}), a training run "
        f"(a directory with checkpoints/) or {', '.join(['a hub id (owner/name)', *names()])}",
    )


def export_run(path_or_hub_id: str | FilePath, out: str | FilePath, notes: Mapping[str, Any]) -> None:
    """The averaged weights of a run as a checkpoint of their own, with its configuration and ``notes``.

    They are stored in float16 (an error of 5e-4 of a weight) and become float32 again when loaded.
    """
    checkpoint = resolve_checkpoint(path_or_hub_id)
    stored = checkpoint.tensors(EMA if checkpoint.has(EMA) else MODEL)
    weights = {name: value.half() if value.is_floating_point() else value for name, value in stored.items()}
    write_checkpoint(out, {MODEL: weights}, {CONFIG: {**checkpoint.config, **notes, "dtype": "float32"}})


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
    return "; ".join(f"{what}: {shortened(keys)}" for what, keys in parts.items() if keys)


def _command(run: FilePath) -> str:
    """The command that makes a run, as its claim has it."""
    claim = parse_json(run / "run.json", read_regular(run / "run.json"))
    named = claim.get("command") if isinstance(claim, dict) else None
    return f"the `mfm {named} …` command that began it"


def _newest(root: FilePath) -> Checkpoint:
    checkpoint, skipped = CheckpointStore(root).latest_valid()
    if checkpoint is None:
        reason = f"; the newest: {skipped[0]}" if skipped else ""
        raise CheckpointError(root, f"holds no valid checkpoint: not finished, run `mfm train …` again{reason}")
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
