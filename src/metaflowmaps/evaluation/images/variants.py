r"""Steering methods by name, as the image experiments list them: ``method[-plain]-N``, N draws a step (or particles).

``-plain`` is the method as published, without what this package adds by default (blend, recycled draws, tempering).
``tds-64`` returns all 64 particles of a system, ``tds-one-64`` one of each; ``dps`` and ``none`` have no N.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaflowmaps.errors import InputError
from metaflowmaps.evaluation.images.stage import Stage
from metaflowmaps.steering import METHODS, SteerResult, steer

PLAIN: dict[str, dict[str, Any]] = {
    "mfm-g": {"blend": False},
    "mfm-gf": {"recycle": 1},
    "mfm-smc": {"recycle": 1, "temper": 0.0},
}
TITLES = {"mfm-g": "MFM-G", "mfm-gf": "MFM-GF", "mfm-smc": "MFM-SMC", "mfm-search": "MFM-Search", "dps": "DPS",
          "tds": "TDS", "none": "unsteered", "glass": "GLASS", "best-of-n": "best-of-N"}  # fmt: skip


class Variant(NamedTuple):
    """A method with its number and options."""

    method: str
    number: int
    options: dict[str, Any]
    title: str


def variant(name: str) -> Variant:
    """What a name means."""
    base, _, last = name.rpartition("-")
    base, number = (base, int(last)) if last.isdigit() else (name, 0)
    method, plain, one = (
        base.removesuffix("-plain").removesuffix("-one"),
        base.endswith("-plain"),
        base.endswith("-one"),
    )
    if method not in METHODS or (plain and method not in PLAIN) or (one and method != "tds"):
        raise InputError(
            f"unknown method {name!r}: write method-N or method-plain-N, as in mfm-gf-4, of {', '.join(METHODS)}"
        )
    options = dict(PLAIN[method]) if plain else {}
    if method == "tds":
        number = number or 64
        options = {"particles": number, "returns": "one" if one else "all"}
    title = TITLES.get(method, method) + (" plain" if plain else "") + (" one returned" if one else "")
    unit = " particles" if method == "tds" else " draw" if number == 1 else " draws"
    return Variant(method, number, options, f"{title}, {number}{unit}" if number else title)


def run(
    stage: Stage, name: str, reward: Any, n: int, steps: int, generator: torch.Generator, **options: Any
) -> tuple[Tensor, SteerResult]:
    """Samples of a variant, cut to n: a particle system comes whole."""
    v = variant(name)
    whole = n
    if v.options.get("returns") == "all":
        whole = -(-n // v.number) * v.number
    result = steer(
        stage.model, reward, whole, v.method, max(1, v.number), steps, generator=generator, **{**v.options, **options}
    )
    return result.samples[:n], result
