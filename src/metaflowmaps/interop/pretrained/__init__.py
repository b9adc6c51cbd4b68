r"""Published weights of the ImageNet family as meta flow maps: SiT, REPA, DMF and the released MFM.

``load`` reads a file, finds the layout by its keys, folds time direction, sign and doubled outputs into the weights
(:mod:`metaflowmaps.interop.pretrained.layout`) and returns a :class:`MetaFlowMap` on the linear path in the plain
parameterisation. Of SiT and DMF it is the map that they initialise: equal to its parent at any context.

A DMF and a SiT without the doubled outputs have the same keys and shapes, and opposite times. Which of them a file is,
the probe of :mod:`metaflowmaps.interop.pretrained.direction` says; of untrained weights, the name of the file. Where
neither does, the family is asked for.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.interop.pretrained.direction import Direction, time_direction
from metaflowmaps.interop.pretrained.dmf import DMF, DMF_512
from metaflowmaps.interop.pretrained.files import HUB_FILES, SUFFIXES, WeightsOrigin, holds_weights, read_weights
from metaflowmaps.interop.pretrained.layout import (
    OVERRIDES,
    Family,
    Weights,
    expected,
    fill,
    law_of,
    misfit,
    network_config,
    shape_of,
)
from metaflowmaps.interop.pretrained.mfm import MFM
from metaflowmaps.interop.pretrained.sit import REPA, SIT, SIT_512
from metaflowmaps.networks import DiT, make_network
from metaflowmaps.path import LinearPath

FAMILIES: dict[str, Family] = {kind.layout: kind for kind in (MFM, DMF, DMF_512, SIT, SIT_512, REPA)}
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
    """A published model: the map, the layout of its file, where the file came from, which way its time runs.

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
        family: "mfm", "dmf", "sit", or "auto" to tell by its tensors; or one layout of a family (:data:`FAMILIES`),
            such as "repa".
        config: What shapes cannot tell: "heads", "encoder_depth", "guidance" (the scales of a released MFM's table;
            for the others True or a list, to begin an embedding with); and where guidance of a plain family acts:
            "guidance_since" and "guidance_until" (times), "guidance_channels" (the first few).
        revision: Of a file on the hub.
        check: Whether to probe which way time runs; a drift that runs backwards is refused.

    Returns:
        A map on the linear path, on CPU and in float32. Of "mfm" it is the released one; of "dmf" the one that equals
        its parent at any context; of "sit" the one whose ``drift`` is SiT's. Harmless tensors that it does not use
        are named in a warning.

    Examples:
        >>> model = mfm.pretrained.load("adh1s/mfm")  # the hub's weights; a file of yours as well  # doctest: +SKIP
        >>> cond = {"label": torch.tensor([207])}  # doctest: +SKIP
        >>> latents = model.generate(1, steps=1, cond=cond)  # (1, 4, 32, 32)  # doctest: +SKIP
    """
    published = load_with_source(path, family, config, revision, check)
    if published.source.note:
        warnings.warn(published.source.note, UserWarning, stacklevel=2)
    return published.model


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
    asked = {"auto": None, **{kind.name: None for kind in FAMILIES.values()}, **FAMILIES}
    if family not in asked:
        raise unknown("family", family, tuple(asked))
    given = dict(config or {})
    for key in given:
        if key not in OVERRIDES:
            raise unknown("entry of config", key, OVERRIDES)
    weights, source = read_weights(path, revision)
    kinds = _by_name(_fitting(path, family, weights), source.name)
    kind, model = kinds[0], _filled(path, kinds[0], weights, given)
    direction = _direction(model) if check else None
    if len(kinds) > 1:
        kind = _decided(path, kinds, source.name, direction)
        if kind is not kinds[0]:
            model, direction = _filled(path, kind, weights, given), direction and direction.turned()
    if direction is not None and direction.verdict == "backward":
        raise InputError(
            f"{path}: as {kind.layout} its drift carries data to noise (it explains its own samples better backwards: "
            f"R = {direction.reversed:.2f} against {direction.given:.2f}): these are weights of another convention, "
            f"{_other_way(kind, weights)}wrap the model with mfm.wrap(…, time='data-at-0'), or load them with "
            "check=False (--no-check)"
        )
    return Published(model, kind, source._replace(left_out=tuple(sorted(filter(kind.leaves_out, weights)))), direction)


def _filled(path: str | Path, kind: Family, weights: Weights, given: Mapping[str, Any]) -> MetaFlowMap:
    """The map of a file's tensors, which fit."""
    try:
        options = network_config(kind, shape_of(weights), given)
        law = law_of(kind, options, given)
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what the file does not fill is the same each time
            network = make_network({"name": "dit", **options})
        assert isinstance(network, DiT)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    fill(network, kind, weights)
    model = MetaFlowMap(network, LinearPath(), "plain").eval()
    model.guidance_law, model.decoder_id = law, kind.decoder
    return model


def _fitting(path: str | Path, asked: str, weights: Weights) -> list[Family]:
    """The layouts that a file fits; else one line with what does not, and the nearest."""
    misfits = {layout: misfit(kind, weights) for layout, kind in FAMILIES.items()}
    fits = [kind for layout, kind in FAMILIES.items() if not misfits[layout]]
    marked = [kind for kind in fits if kind.marks and any(key.startswith(kind.marks) for key in weights)]
    told = marked or [kind for kind in fits if not kind.marks]
    if asked == "auto" and told:
        return told
    exact = [kind for kind in fits if asked == kind.layout != kind.name]
    wanted = exact or [kind for kind in told if asked == kind.name]
    if wanted:
        return wanted
    of_family = [layout for layout, kind in FAMILIES.items() if asked in ("auto", layout, kind.name)]
    nearest = min(of_family, key=lambda layout: (_differences(FAMILIES[layout], weights), layout))
    if asked != "auto":
        name = _by_name(told, str(path))[0].name if told else ""
        hint = f"it is a {name} file: family={name!r}" if told else _nearest_of_all(weights)
        raise InputError(f"{path} is no {asked} file ({'; '.join(misfits[nearest])}): {hint}")
    raise InputError(
        f"{path} is of none of the families {', '.join(dict.fromkeys(kind.name for kind in FAMILIES.values()))}; the "
        f"nearest is {nearest}, from which it differs: {'; '.join(misfits[nearest])}"
    )


def _nearest_of_all(weights: Weights) -> str:
    nearest = min(FAMILIES.values(), key=lambda kind: (_differences(kind, weights), kind.layout))
    return f"the nearest family is {nearest.name}"


def _by_name(kinds: list[Family], file: str) -> list[Family]:
    """Layouts of the family that the file is named after first."""
    return sorted(kinds, key=lambda kind: kind.name not in _words(file))


def _words(file: str) -> list[str]:
    return re.findall("[a-z]+", Path(file).name.lower())


def _decided(path: str | Path, kinds: list[Family], file: str, direction: Direction | None) -> Family:
    """Which of two layouts with opposite times: as time runs in the first of them, else as the file is named."""
    verdict = "undecided" if direction is None else direction.verdict
    if verdict != "undecided":
        return kinds[0] if verdict == "forward" else kinds[1]
    named = [kind for kind in kinds if kind.name in _words(file)]
    if len(named) == 1:
        return named[0]
    names = " and ".join(f"a {kind.name}" for kind in kinds)
    choice = " or ".join(f"family={kind.name!r}" for kind in kinds)
    raise InputError(
        f"{path}: {names} may have just these tensors, and which way time runs does not tell them apart here: give "
        f"{choice} (--family)"
    )


def _other_way(kind: Family, weights: Weights) -> str:
    """What to ask for instead, where a layout of the opposite time fits as well."""
    others = [other for other in FAMILIES.values() if other.negated != kind.negated and not misfit(other, weights)]
    return f"those of a {others[0].name} perhaps: family={others[0].name!r}, or else " if others else ""


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
    cond = {"label": label}
    if model.guidance_law is not None and model.guidance_law.asked:
        cond["guidance"] = torch.full((4,), model.guidance_law.scale)  # the one that it was trained at
    return time_direction(lambda t, x: model.drift(t, x, cond), model.event_shape)
