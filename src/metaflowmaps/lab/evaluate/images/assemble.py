"""What an image experiment stands on, put together: classifiers, data, autoencoder, features, what the map is told."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from metaflowmaps.checkpoint import load_classifier, resolve_checkpoint
from metaflowmaps.checkpoint.shipped import shipped
from metaflowmaps.data import DataSource, Examples, ImageSet, Latents
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.interop.opening import is_latent
from metaflowmaps.lab.evaluate.images.judging import Judge, takes
from metaflowmaps.lab.evaluate.images.setup import LATENT_BATCH, MOST, Conditions, ImageEvalConfig, ImageSetup
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.metrics.frechet import read_statistics
from metaflowmaps.metrics.inception import Inception
from metaflowmaps.pipeline import Pipeline

NONE = "none"  # data=none: leave them out


def open_setup(
    opened: OpenedModel, config: ImageEvalConfig, without_data: bool = False
) -> tuple[ImageSetup, dict[str, object]]:
    """The setup of a checkpoint, and what identifies its parts. ``without_data``: can it do with none?"""
    model, latent = opened.model, opened.latent
    data = _data(opened, config.data, without_data)
    name, run = "images" if data is None else data.name, opened.checkpoint.run
    sources: dict[str, object] = {}
    codec = (lambda: opened.codec(config.vae)) if latent else None

    def part(role: str, chosen: str | None, load: Callable[..., Any]) -> Any:
        place = _place(name, role, chosen, run)
        if place is None:
            return None
        loaded = load(place).to(model.device)
        sees = codec is not None and load is load_classifier and takes(loaded, setup.codec.image_shape(shape))
        if not takes(loaded, shape) and not sees:
            raise InputError(
                f"{role} {place} takes images of shape {tuple(loaded.event_shape)}, the map's are {model.event_shape}"
            )
        sources[role] = resolve_checkpoint(place).digest
        return loaded

    shape = tuple(model.event_shape)
    nothing = ImageSet("images", torch.empty(0, *shape))
    setup = ImageSetup(model, nothing, nothing, Judge(None, nothing), open_codec=codec)
    guide, judge = part("guide", config.guide, load_classifier), part("judge", config.judge, load_classifier)
    if judge is not None and "guide" in sources and sources["guide"] == sources["judge"]:
        raise InputError("guide and judge are one and the same classifier: a reward must not be judged by itself")
    drift = part("drift", config.drift, MetaFlowMap.from_pretrained)
    setup.guide, setup.drift = guide, None if drift is None else drift.drift
    if data is not None:
        setup.train, setup.held_out = _parts(data, guide is not None or judge is not None)
        _check_data(opened.name, setup, guide, judge)
    setup.most = config.pictures or (MOST if latent else None)
    if latent:
        setup.shard = LATENT_BATCH
    setup.judge = _judge(setup, judge, config)
    return setup, sources


def equip(
    setup: ImageSetup, opened: OpenedModel, config: ImageEvalConfig, named: Callable[[str], Any], kinds: tuple[str, ...]
) -> dict[str, object]:
    """Give an experiment's setup labels, guidance, precision, statistics and rewards by text; what was found out."""
    pipe = Pipeline(setup.model, None, (), opened.stored.get("guidance"))
    pipe.precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
    classes, labelled = pipe.num_classes, setup.train.labels is not None or len(setup.train) == 0
    if config.labels in ("uniform", "data") and not classes:
        raise InputError(f"labels={config.labels}: this map knows no classes, leave labels out")
    if config.labels == "data" and setup.held_out.labels is None:
        raise InputError("labels=data: these data have no classes, take labels=uniform or labels=none")
    conditional = bool(classes) and (config.labels in ("uniform", "data") or (config.labels == "auto" and labelled))
    setup.conditions = Conditions(pipe, config.labels, config.guidance, conditional)
    cond = setup.cond(setup.labels(1, "check", 0), 1)
    if cond is not None:  # a scale that the network does not have is refused here, before anything is begun
        with torch.no_grad(), setup.autocast():
            setup.model.drift(0.5, torch.zeros(1, *setup.model.event_shape, device=setup.model.device), cond)
    setup.named, setup.kinds = named, kinds
    told: dict[str, object] = {}
    if conditional:
        told |= {"conditional": True, "usual_guidance": pipe.guidance}
    if setup.judge.by == "inception":
        told["features"] = "inception"
    if config.statistics is not None:
        setup.statistics = read_statistics(Path(config.statistics).expanduser())
    if setup.latent:
        told["autoencoder"] = setup.codec.identity  # read now: a missing one is said before anything is drawn
    return told


def chosen_features(config: ImageEvalConfig, model: MetaFlowMap) -> str:
    """What ``features=auto`` means for this map: Inception where it can be had, and where FID is asked for."""
    if config.features != "auto" or not is_latent(model):
        return config.features
    if config.statistics is not None:
        return "inception"
    try:
        import torch_fidelity.feature_extractor_inceptionv3  # noqa: F401
    except (ImportError, RuntimeError):  # torchvision without its torch raises the latter
        return "auto"
    return "inception"


def _data(opened: OpenedModel, chosen: str | None, without_data: bool) -> DataSource | None:
    """Which data: as told, or those of training; None where they are left out, and can be."""
    checkpoint, given, latent = opened.name, opened.data, opened.latent
    if without_data and (chosen == NONE or (chosen is None and (given is None or _gone(given)))):
        return None
    if given is None and not latent:
        raise InputError(f"{checkpoint} was not trained on images by this package: nothing to judge it with")
    if chosen is None and (given is None or (latent and _gone(given))):
        gone = "" if given is None else f" (those it was trained on are not in {_path(given)})"
        raise InputError(
            f"{checkpoint} names no pictures to judge it with{gone}: --set data=DIR, as mfm encode-latents SOURCE "
            "--out DIR makes it"
        )
    base = given or Latents()
    return base.moved(chosen) if chosen else base


def _path(given: DataSource) -> str | None:
    return getattr(given, "path", None)


def _gone(given: DataSource) -> bool:
    path = _path(given)
    return path is not None and not Path(path).expanduser().exists()


def _check_data(checkpoint: str, setup: ImageSetup, guide: Any, judge: Any) -> None:
    """Are there enough, of the right shape, and of as many classes as the classifiers know?"""
    train, held_out, model = setup.train, setup.held_out, setup.model
    if train.event_shape != model.event_shape:
        raise InputError(f"{checkpoint} makes images of shape {model.event_shape}, the data have {train.event_shape}")
    if len(held_out) < 2:
        raise InputError(
            f"{checkpoint} has one image held out, and judging takes more: "
            + ("encode more pictures" if setup.latent else "train with --set data.hold_out=N")
        )
    for role, classifier in (("guide", guide), ("judge", judge)):
        if classifier is not None and train.labels is not None and classifier.num_classes != train.num_classes:
            raise InputError(
                f"the {role} knows {classifier.num_classes} classes, the images have {train.num_classes}: "
                f"name another with --set {role}=RUN"
            )


def _judge(setup: ImageSetup, classifier: Any, config: ImageEvalConfig) -> Judge:
    """The judge, by the features that are asked for."""
    decode = setup.decode if setup.latent else None
    by = None if config.features == "auto" else config.features
    if by == "classifier" and classifier is None:
        raise InputError("features=classifier needs one: train it and give it with --set judge=RUN")
    if by == "components" and len(setup.train) == 0:
        raise InputError("features=components are those of data: give some with --set data=DIR")
    inception = None
    if by == "inception":
        try:
            inception = Inception(config.inception).to(setup.model.device)
        except OSError as error:  # no network, or a file that is none of its weights
            text = " ".join(str(error).split())[:120]
            raise InputError(
                f"Inception's weights cannot be had ({text}): --set inception=FILE, or --set features=components"
            ) from None
    return Judge(classifier, setup.train, by, inception, decode)


def _parts(data: DataSource, labelled: bool) -> tuple[Examples, Examples]:
    """The images; with their classes too where classifiers know them, though the map was trained without."""
    try:
        if labelled and data.classes == 0 and "labels" in type(data).model_fields:
            with suppress(InputError):
                return data.model_copy(update={"labels": True}).load()
        return data.load()
    except InputError as error:  # training calls it data.path, judging data
        raise InputError(str(error).replace("--set data.path=", "--set data=")) from None


def _place(name: str, role: str, chosen: str | None, run: Path | None) -> str | None:
    """Where a part is: as told, beside the run, in it, or in the package."""
    if chosen is not None:
        return None if chosen == "none" else chosen
    candidates = []
    if run is not None:
        candidates = [run / "drift"] if role == "drift" else [run.parent / f"{name}-{role}"]
    for path in candidates:
        if (path / "checkpoints").is_dir():
            return str(path)
    carried = None if role == "drift" and run is not None else shipped(f"{name}-{role}")
    return None if carried is None else str(carried)
