"""``python tests/docstrings.py``: every public name says what it takes and what it returns, with shapes.

A public function, and a public class with a constructor of its own, has ``Args:`` that name every parameter; a function
that returns something has ``Returns:`` or says it in its first line's equation. ``make check`` runs this.
"""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass

import metaflowmaps as mfm

OWN_WORDS = {"self", "cls"}


def public() -> Iterator[tuple[str, object]]:
    """Every public name: of the package, and of its rewards."""
    for module in (mfm, mfm.rewards, mfm.pretrained):
        for name in getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")]):
            thing = getattr(module, name)
            if (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__.startswith("metaflowmaps"):
                yield f"{module.__name__}.{name}", thing


def parameters(thing: object) -> list[str]:
    """What a caller passes."""
    if inspect.isclass(thing) and (getattr(thing, "_is_protocol", False) or issubclass(thing, BaseException)):
        return []
    if inspect.isclass(thing) and "__init__" not in vars(thing) and not is_dataclass(thing):
        return []
    try:
        signature = inspect.signature(thing)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return []
    return [p.name for p in signature.parameters.values() if p.name not in OWN_WORDS]


def text_of(thing: object) -> str:
    """The docstring, with those of the classes it derives from and of the constructor."""
    if not inspect.isclass(thing):
        return inspect.getdoc(thing) or ""
    documents = [vars(c).get("__doc__") or "" for c in thing.__mro__ if c.__module__.startswith("metaflowmaps")]
    return "\n".join([*documents, inspect.getdoc(thing.__init__) or ""])


def complaints() -> list[str]:
    """One line for each name that does not say enough."""
    out = []
    for name, thing in public():
        text, wanted = text_of(thing), parameters(thing)
        if not (inspect.getdoc(thing) or "").strip():
            out.append(f"{name}: no docstring")
        missing = [p for p in wanted if f"{p}:" not in text and f"{p}``" not in text]
        if wanted and "Args:" not in text:
            out.append(f"{name}: no Args: for {', '.join(wanted)}")
        elif missing:
            out.append(f"{name}: Args: does not name {', '.join(missing)}")
        if (
            inspect.isfunction(thing)
            and "Returns:" not in text
            and inspect.signature(thing).return_annotation is not None
        ):
            out.append(f"{name}: no Returns:")
    return sorted(set(out))


if __name__ == "__main__":
    lines = complaints()
    print("\n".join(lines) or "public docstrings are complete")
    sys.exit(bool(lines))
