"""Configurations: frozen, strict, and written beside every result.

``--set key.sub=value`` goes through :func:`override`, which refuses a key that does not exist and suggests the nearest.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.work.choices import Choice, one_line


class Config(BaseModel):
    """The base of every configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    renamed: ClassVar[Mapping[str, str]] = {}  # settings of an earlier version: what they are called now


C = TypeVar("C", bound=Config)


def override(config: C, settings: Iterable[str]) -> C:
    """config with each ``key.sub=value`` applied; values are JSON, or else plain text."""
    data = config.model_dump()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set takes key=value, got {setting!r}")
        _put(config, data, key.strip(), _parse(text))
    return validated(type(config), data)


def merged(config: C, settings: Mapping[str, Any]) -> C:
    """config with settings by name on top; a group or a choice may be given in part, as a dictionary."""
    data = config.model_dump()
    for name, value in _choices_first(config, settings):
        held: Any = data
        owner: Any = config
        for part in _now(config, name).split("."):
            held, owner = held.get(part) if isinstance(held, dict) else None, getattr(owner, part, None)
        if isinstance(held, dict) and isinstance(value, dict):
            another = isinstance(owner, Choice) and value.get("name", held.get("name")) != held.get("name")
            value = value if another else {**held, **value}
        _put(config, data, name, value)
    return validated(type(config), data)


def _choices_first(config: Config, settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Settings in an order in which no choice takes back the options that are given with it under earlier names."""
    items: list[tuple[str, Any]] = []
    for name, value in settings.items():
        split = isinstance(value, dict) and any(old.startswith(f"{name}.") for old in config.renamed)
        items += [(f"{name}.{key}", v) for key, v in value.items()] if split else [(name, value)]
    named = [(_now(config, name), name, value) for name, value in items]
    named.sort(key=lambda item: (item[0] != item[1], not item[0].endswith(".name")))
    return [(name, value) for _, name, value in named]


def _now(config: Config, key: str) -> str:
    """What a setting is called that an earlier version named otherwise."""
    for old, new in config.renamed.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return key


def _put(config: Config, data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a dumped configuration; a choice that is named anew begins with its own defaults."""
    *parents, last = _now(config, key).split(".")
    place: dict[str, Any] = data
    owner: Any = config
    for parent in parents:
        if isinstance(owner, Choice):
            place.setdefault(parent, {})
        if not isinstance(place.get(parent), dict):
            raise unknown("setting", key, _keys(data))
        place, owner = place[parent], getattr(owner, parent, None)
    if last not in place and not isinstance(owner, Choice):  # which knows its own options
        raise unknown("setting", key, _keys(data))
    if isinstance(place.get(last), dict) and isinstance(value, str | int | float | None):
        if not (isinstance(getattr(owner, last, None), Choice) and isinstance(value, str)):
            raise InputError(f"{key} is a group of settings: set one of {', '.join(place[last])}")
        value = {"name": value}
    if last == "name" and isinstance(owner, Choice) and place.get(last) != value:
        place.clear()
    place[last] = value


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
