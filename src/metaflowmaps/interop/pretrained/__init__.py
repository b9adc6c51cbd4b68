r"""Published weights of the ImageNet family as meta flow maps: SiT, DMF and the released MFM.

``load`` reads a file, finds the family by its keys, folds time direction, sign and doubled outputs into the weights
(:mod:`metaflowmaps.interop.pretrained.layout`) and returns a :class:`MetaFlowMap` on the linear path in the plain
parameterisation. Of SiT and DMF it is the map that they initialise: equal to its parent at any context.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.interop.pretrained.direction import Direction, time_direction
from metaflowmaps.interop.pretrained.dmf import DMF
from metaflowmaps.interop.pretrained.files import HUB_FILES, SUFFIXES, WeightsOrigin, holds_weights, read_weights
from metaflowmaps.interop.pretrained.layout import (
    OVERRIDES,
    Family,
    Weights,
    expected,
    fill,
    misfit,
    network_config,
    shape_of,
)
from metaflowmaps.interop.pretrained.mfm import MFM
from metaflowmaps.interop.pretrained.sit import SIT
from metaflowmaps.networks import DiT, make_network
from metaflowmaps.path import LinearPath

FAMILIES: dict[str, Family] = {family.name: family for family in (MFM, DMF, SIT)}
__all__ = [
    "FAMILIES",
    "HUB_FILES",
    "SUFFIXES",
    "Direction",
    "Published",
    "WeightsOrigin",
    "holds_weights",
    "load",
    "load_with_source",
    "time_direction",
]


class Published(NamedTuple):
    """A published model: the map, the family its file is of, where the file came from, which way its time runs.

    The direction is None where it was not probed.
    """

    model: MetaFlowMap
    family: Family
    source: WeightsOrigin
    direction: Direction | None


def load(
    path: str | Path,
    family: str = "auto",
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    check: bool = True,
) -> MetaFlowMap:
    """The map of a published file.

    Args:
        path: The file, the folder that holds it, or ``owner/name[/file][@revision]`` on the hub.
        family: "mfm", "dmf", "sit", or "auto" to tell by its tensors.
        config: What shapes cannot tell: "heads", "encoder_depth", "guidance" (the scales of a released MFM's table;
            for the others True or a list, to begin an embedding with).
        revision: Of a file on the hub.
        check: Whether to probe which way time runs; a drift that runs backwards is refused.

    Returns:
        A map on the linear path, on CPU and in float32. Of "mfm" it is the released one; of "dmf" the one that equals
        its parent at any context; of "sit" the one whose ``drift`` is SiT's.
    """
    return load_with_source(path, family, config, revision, check).model


def load_with_source(
    path: str | Path,
    family: str = "auto",
    config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    check: bool = True,
) -> Published:
    """:func:`load`, with all that is known of the file.

    Args:
        path: as in ``load``.
        family: as in ``load``.
        config: as in ``load``.
        revision: as in ``load``.
        check: as in ``load``.

    Returns:
        The map, its family, the file's source and hash, and which way its time runs.
    """
    if family not in ("auto", *FAMILIES):
        raise unknown("family", family, ("auto", *FAMILIES))
    given = dict(config or {})
    for key in given:
        if key not in OVERRIDES:
            raise unknown("entry of config", key, OVERRIDES)
    weights, source = read_weights(path, revision)
    kind = _family(path, family, weights)
    try:
        options = network_config(kind, shape_of(weights), given)
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what the file does not fill is the same each time
            network = make_network({"name": "dit", **options})
        assert isinstance(network, DiT)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    fill(network, kind, weights)
    model = MetaFlowMap(network, LinearPath(), "plain").eval()
    direction = _direction(model) if check else None
    if direction is not None and direction.verdict == "backward":
        raise InputError(
            f"{path}: as {kind.name} its drift carries data to noise (it explains its own samples better backwards: "
            f"R = {direction.reversed:.2f} against {direction.given:.2f}): these are weights of another convention, "
            "wrap the model with mfm.wrap(…, time='data-at-0'), or load them with check=False (--no-check)"
        )
    return Published(model, kind, source, direction)


def _family(path: str | Path, asked: str, weights: Weights) -> Family:
    """The family asked for, or the only one that fits; else one line with what does not, and the nearest."""
    misfits = {name: misfit(family, weights) for name, family in FAMILIES.items()}
    fits = [name for name, problems in misfits.items() if not problems]
    if asked == "auto" and fits:
        return FAMILIES[fits[0]]
    if asked in fits:
        return FAMILIES[asked]
    nearest = min(misfits, key=lambda name: (_differences(FAMILIES[name], weights), name))
    if asked != "auto":
        hint = f"it is a {fits[0]} file: family={fits[0]!r}" if fits else f"the nearest family is {nearest}"
        raise InputError(f"{path} is no {asked} file ({'; '.join(misfits[asked])}): {hint}")
    raise InputError(
        f"{path} is of none of the families {', '.join(FAMILIES)}; the nearest is {nearest}, from which it differs: "
        f"{'; '.join(misfits[nearest])}"
    )


def _differences(family: Family, weights: Weights) -> int:
    """By how many keys a file differs from a family's."""
    try:
        needed = expected(family, shape_of(weights))
    except InputError:
        needed = {f"{name}.mlp.0.weight": () for name in family.own}
        return len(needed.keys() - weights.keys())
    wrong = sum(tuple(weights[k].shape) != needed[k] for k in needed.keys() & weights.keys())
    return len(needed.keys() ^ weights.keys()) + wrong


def _direction(model: MetaFlowMap) -> Direction:
    classes = int(model.network.num_classes)  # type: ignore[arg-type]
    label = torch.arange(4) * max(classes // 4, 1) % max(classes, 1)  # four classes, spread over all
    return time_direction(lambda t, x: model.drift(t, x, {"label": label}), model.event_shape)
