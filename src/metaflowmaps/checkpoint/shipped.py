"""Trained models that come with the package, by name: digits and emoji, each with -guide and -judge; digits-drift."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "shipped"


def shipped(name: str) -> Path | None:
    """The checkpoint of that name, if the package carries one."""
    folder = FOLDER / name
    return folder if "/" not in name and (folder / "manifest.json").is_file() else None


def names() -> list[str]:
    """What the package carries."""
    return sorted(path.parent.name for path in FOLDER.glob("*/manifest.json"))
