"""What several networks ask of their arguments."""

from collections.abc import Mapping
from typing import Any

from metaflowmaps._shapes import check_count
from metaflowmaps.errors import InputError


def check_counts(config: Mapping[str, Any], *keys: str) -> None:
    """Refuse a value that is no whole number >= 1."""
    for key in keys:
        check_count(config[key], key)


def check_divides(part: int, whole: int, names: tuple[str, str]) -> None:
    """Refuse a part that does not divide the whole."""
    if whole % part:
        raise InputError(f"{names[0]} must divide {names[1]}, got {part} and {whole}; change one of them")


def check_dropout(dropout: float) -> None:
    """Refuse a share that is no number in [0, 1)."""
    if not isinstance(dropout, float | int) or not 0 <= dropout < 1:
        raise InputError(f"dropout must be a number in [0, 1), got {dropout!r}")
