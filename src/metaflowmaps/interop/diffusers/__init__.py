"""Pipelines of diffusers: what each kind has of its own, and a model to steer for each of its calls."""

import importlib
import pkgutil
from typing import Any

from metaflowmaps.errors import InputError
from metaflowmaps.interop.diffusers import families
from metaflowmaps.interop.diffusers.family import Family


def known_families() -> dict[str, type[Family]]:
    """The class of each pipeline that is known, by the pipeline's class name."""
    for module in pkgutil.iter_modules(families.__path__):
        importlib.import_module(f"{families.__name__}.{module.name}")
    waiting, found = [Family], dict[str, type[Family]]()
    while waiting:
        member = waiting.pop()
        waiting += member.__subclasses__()
        found |= dict.fromkeys(vars(member).get("pipelines", ()), member)
    return found


def family_of(pipe: Any, family: type[Family] | None = None) -> Family:
    """The family of a pipeline, or the one that is given, on it."""
    if family is not None:
        return family(pipe)
    known = known_families()
    for kind in type(pipe).__mro__:
        if kind.__name__ in known:
            return known[kind.__name__](pipe)
    raise InputError(
        f"{type(pipe).__name__} is no pipeline that this package knows: give one of {', '.join(sorted(known))}, or "
        "from_diffusers(…, family=MyFamily)"
    )


__all__ = ["Family", "family_of", "known_families"]
