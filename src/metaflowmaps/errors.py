"""The one exception for bad input.

Every message says what was given, what is allowed and what to type. The command line turns it into one line on
stderr and exit code 2; from Python it is a ``ValueError``.
"""

import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Something the caller gave cannot be used; the message names the fix."""


def unknown(kind: str, given: object, allowed: Iterable[str]) -> InputError:
    """An unknown name, with the nearest allowed one suggested."""
    names = sorted(allowed)
    near = get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {kind} {given!r}: {hint}allowed are {', '.join(names)}")


def check_one_of(kind: str, given: object, allowed: Iterable[str]) -> None:
    """Refuse a name that is not allowed."""
    names = tuple(allowed)
    if given not in names:
        raise unknown(kind, given, names)


def warn_caller(message: str) -> None:
    """A warning at the first line outside of the package (and of torch, which calls it), however deep it is given."""
    frame, level = sys._getframe(1), 2
    inside = {__package__, "torch"}
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
