"""The one exception for bad input.

Every message says what was given, what is allowed and what to type. The command line turns it into one line on
stderr and exit code 2; from Python it is a ``ValueError``.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
SYNONYMS = {  # what people type who know the thing by another name: what it may be called here
    "seed": ("generator", "seeds"),
    "generator": ("seed",),
    "n": ("num_samples",),
    "num": ("num_samples", "n"),
    "num_samples": ("num", "n"),
    "lam": ("strength",),
    "scale": ("strength", "guidance"),
    "label": ("cond",),
    "labels": ("cond",),
}


class InputError(ValueError):
    """Something the caller gave cannot be used; the message names the fix.

    Examples:
        >>> try:
        ...     mfm.MFMGF(num_draws=0)
        ... except mfm.InputError as error:
        ...     print(error)
        num_draws must be at least 1 (a whole number), got 0
    """


def unknown(kind: str, given: object, allowed: Iterable[str]) -> InputError:
    """An unknown name, with the nearest allowed one suggested."""
    names = sorted(allowed)
    near = [name for name in SYNONYMS.get(str(given), ()) if name in names]
    near = near or get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {kind} {given!r}: {hint}allowed are {', '.join(names)}")


def check_one_of(kind: str, given: object, allowed: Iterable[str]) -> None:
    """Refuse a name that is not allowed."""
    names = tuple(allowed)
    if given not in names:
        raise unknown(kind, given, names)


class UnknownKeyword(InputError, TypeError):
    """A keyword that there is not, which is a TypeError as Python's own; the message names the right one."""


def known_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose unknown keywords point to the right name."""
    parameters = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def called(*args: P.args, **given: P.kwargs) -> R:
        check_keywords(f"argument of {function.__name__}", given, parameters)
        return function(*args, **given)

    return called


def check_keywords(kind: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse keywords that are not allowed.

    Args:
        kind: what they are called.
        given: the keywords.
        allowed: those that there are.
    """
    names = tuple(allowed)
    for name in given:
        if name not in names:
            raise UnknownKeyword(str(unknown(kind, name, names)))


def warn_caller(message: str) -> None:
    """A warning at the first line outside of the package (and of torch, which calls it), however deep it is given."""
    frame, level = sys._getframe(1), 2
    inside = {__package__, "torch"}
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
