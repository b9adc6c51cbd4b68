"""Configurations: frozen, strict, and written beside every result.

``--set key.sub=value`` goes through :func:`override`, which refuses a key that does not exist and suggests the nearest.
"""

import json
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.work.choices import Choice, one_line


class Config(BaseModel):
    """The base of every configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


C = TypeVar("C", bound=Config)


def override(config: C, settings: Iterable[str]) -> C:
    """config with each ``key.sub=value`` applied; values are JSON, or else plain text."""
    data = config.model_dump()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set takes key=value, got {setting!r}")
        place, value = data, _parse(text)
        owner: Any = config
        *parents, last = key.strip().split(".")
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                raise unknown("setting", key, _keys(data))
            place, owner = place[parent], getattr(owner, parent, None)
        if last not in place and not isinstance(owner, Choice):  # which knows its own options
            raise unknown("setting", key, _keys(data))
        if isinstance(place.get(last), dict) and not isinstance(value, dict):
            if not (isinstance(getattr(owner, last, None), Choice) and isinstance(value, str)):
                raise InputError(f"{key} is a group of settings: set one of {', '.join(place[last])}")
            value = {"name": value}  # another choice begins with its own defaults
        if last == "name" and isinstance(owner, Choice) and place.get(last) != value:
            place.clear()
        place[last] = value
    return validated(type(config), data)


def merged(config: C, settings: dict[str, Any]) -> C:
    """config with settings by name on top; a group may be given in part, as a dictionary."""
    data = config.model_dump()
    for name, value in settings.items():
        if name not in data:
            raise unknown("setting", name, data)
        both = isinstance(data[name], dict) and isinstance(value, dict)
        data[name] = {**data[name], **value} if both else value
    return validated(type(config), data)


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """``key=value`` pairs as a dictionary; values are JSON, or else plain text."""
    out = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set takes key=value, got {setting!r}")
        out[key.strip()] = _parse(text)
    return out


def validated(kind: type[C], data: Any) -> C:
    """Build a configuration; what is wrong comes back as one line."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise InputError(one_line(error, kind.__name__)) from None


def differences(one: Any, other: Any, prefix: str = "") -> list[str]:
    """The leaves at which two dumped configurations differ, as ``key: a ≠ b``."""
    if isinstance(one, dict) and isinstance(other, dict):
        lines = []
        for key in sorted({*one, *other}):
            lines += differences(one.get(key), other.get(key), f"{prefix}{key}.")
        return lines
    return [] if one == other else [f"{prefix.rstrip('.')}: {_short(one)} ≠ {_short(other)}"]


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _keys(data: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in data.items():
        keys += _keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return keys


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
