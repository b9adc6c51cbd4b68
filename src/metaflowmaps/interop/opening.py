"""What a path, a name or a hub id means: a map, the autoencoder of its latents, the names of its classes.

A checkpoint may hold ``pipeline.json``: the autoencoder (a hub id, or a folder beside the map), the classes' names, the
usual guidance.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

from metaflowmaps import imagenet_names as imagenet
from metaflowmaps.checkpoint import Checkpoint, resolve_checkpoint
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.interop import pretrained
from metaflowmaps.interop.autoencoder import SD_VAE, AutoencoderCodec

DOCUMENT = "pipeline.json"


def stored(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """pipeline.json of a checkpoint that has one."""
    return dict(checkpoint.document(DOCUMENT)) if checkpoint is not None and checkpoint.has(DOCUMENT) else {}


def pipeline_document(
    model: MetaFlowMap, class_names: Sequence[str], vae: str | None = None, guidance: float | None = None
) -> dict[str, Any]:
    """pipeline.json of a map: its classes' names, or "imagenet"; its autoencoder, for latents the usual one."""
    classes = int(getattr(model.network, "num_classes", 0))
    names: Any = list(class_names) if len(class_names) == classes else []
    if classes == len(imagenet.wnids()) and tuple(names) in ((), imagenet.wnids(), imagenet.class_names()):
        names = "imagenet"
    document: dict[str, Any] = {"schema": 1, "guidance": guidance, "class_names": names}
    if vae is not None or is_latent(model):
        document["vae"] = vae or model.decoder_id or SD_VAE
    return document


def names_of(model: MetaFlowMap, checkpoint: Checkpoint | None) -> tuple[str, ...]:
    """The names of a map's classes: those that its checkpoint holds, ImageNet's for a thousand of them."""
    names = stored(checkpoint).get("class_names")
    if names == "imagenet" or (not names and int(getattr(model.network, "num_classes", 0)) == 1000):
        return imagenet.class_names()
    return tuple(names or ())


def codec_of(
    model: MetaFlowMap,
    checkpoint: Checkpoint | None,
    vae: str | FilePath | AutoencoderCodec | None = None,
    **options: Any,
) -> AutoencoderCodec | None:
    """The autoencoder of a map: as told, as its checkpoint names it, or the usual one of latents; None for pixels."""
    if isinstance(vae, AutoencoderCodec):
        return vae
    known = stored(checkpoint)
    usual = (model.decoder_id or SD_VAE) if is_latent(model) else None
    place = vae or known.get("vae") or usual
    if place is None:
        return None
    own = None if vae is not None or checkpoint is None else beside(checkpoint, str(place))
    return AutoencoderCodec.from_pretrained(own or place, **options)


def beside(checkpoint: Checkpoint, name: str) -> FilePath | None:
    """The folder of that plain name in a checkpoint's own, if there is one; a file names nothing outside of it."""
    folder = checkpoint.path / name
    return folder if FilePath(name).name == name != ".." and folder.is_dir() else None


def is_latent(model: MetaFlowMap) -> bool:
    """Does the map live on four channels of latents, and not on grey or coloured pixels?"""
    return len(model.event_shape) == 3 and model.event_shape[0] == 4


def open_map(
    path_or_hub_id: str | FilePath,
    family: str = "auto",
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> tuple[MetaFlowMap, Checkpoint | None]:
    """A checkpoint of ours, with what was read, or a published file, converted."""
    if published(path_or_hub_id) or family != "auto" or config:
        return pretrained.load(path_or_hub_id, family, config, revision), None
    return MetaFlowMap.from_pretrained(path_or_hub_id, revision), resolve_checkpoint(path_or_hub_id, revision)


def published(path_or_hub_id: str | FilePath) -> bool:
    """Is this a file of weights (or its folder), here or on the hub, rather than a checkpoint of ours?"""
    name, local = str(path_or_hub_id), FilePath(path_or_hub_id).expanduser()
    if local.exists():
        return local.is_file() or (local.is_dir() and pretrained.holds_weights(local))
    return name in pretrained.HUB_FILES or FilePath(name.partition("@")[0]).suffix in pretrained.SUFFIXES
