"""What evaluations find, as results.json holds it."""

from dataclasses import asdict
from typing import Any

Json = dict[str, Any]


def known(row: Any) -> Json:
    """A row (a dataclass) as results.json holds it: its fields, but for those that are None."""
    return {key: value for key, value in asdict(row).items() if value is not None}
