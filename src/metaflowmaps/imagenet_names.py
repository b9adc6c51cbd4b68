"""The 1,000 classes of ILSVRC-2012 in their order, and classes looked up by number, WordNet id or name.

The file beside this one has a line a class: its WordNet id, then WordNet's lemmas for it, commas between them.
The order is that of the ids, which is also that of class folders in the data set: class 281 is n02123045, tabby cat.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from importlib.resources import files

from metaflowmaps.errors import InputError


@cache
def _lines() -> tuple[tuple[str, str], ...]:
    text = (files("metaflowmaps") / "imagenet_classes.txt").read_text(encoding="utf-8")
    pairs = [line.split(" ", 1) for line in text.splitlines()]
    return tuple((wnid, names) for wnid, names in pairs)


def wnids() -> tuple[str, ...]:
    """The WordNet ids, by class."""
    return tuple(wnid for wnid, _ in _lines())


def class_names() -> tuple[str, ...]:
    """The names, by class: all lemmas of it, as in ``tabby, tabby cat``."""
    return tuple(names for _, names in _lines())


def class_name(index: int, names: Sequence[str] | None = None) -> str:
    """The name of a class of ImageNet, or of a list of names."""
    known = class_names() if names is None else names
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(known):
        raise InputError(f"class {index!r} is not among the {len(known):,}: give a number from 0 to {len(known) - 1}")
    return known[index]


def class_index(name: str | int, names: Sequence[str] | None = None) -> int:
    """The class that a number, a WordNet id or a name means, of ImageNet or of a list of names.

    A name in the list may hold several, with commas between; case does not matter. What fits two classes is refused.
    """
    known = class_names() if names is None else tuple(names)
    if isinstance(name, int):
        return _checked(name, known)
    text = name.strip()
    meanings = _meanings(known, wnids() if names is None else ())
    found = meanings.get(_plain(text), ())
    if len(found) == 1:
        return found[0]
    if not found and text.removeprefix("-").isdecimal():
        return _checked(int(text), known)
    if found:
        candidates = " or ".join(_described(i, known, names is None) for i in found)
        raise InputError(f"the class {text!r} is ambiguous: it may be {candidates}; give the number")
    near = get_close_matches(_plain(text), meanings, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise InputError(f"unknown class {text!r}: {hint}give a name, or a number from 0 to {len(known) - 1}")


@cache
def _meanings(known: tuple[str, ...], ids: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Every way to say a class -> the classes it may mean."""
    found: dict[str, tuple[int, ...]] = {}
    for index, names in enumerate(known):
        for word in dict.fromkeys(_plain(part) for part in (names, *names.split(","), *ids[index : index + 1])):
            found[word] = (*found.get(word, ()), index)
    return found


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def _described(index: int, known: Sequence[str], imagenet: bool) -> str:
    return f"{index} ({wnids()[index]}, {known[index]})" if imagenet else f"{index} ({known[index]})"


def _checked(index: int, known: Sequence[str]) -> int:
    class_name(index, known)
    return index
