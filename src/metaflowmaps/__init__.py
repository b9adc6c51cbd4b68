"""Meta Flow Maps: one-step posterior sampling and reward alignment for flow models.

What is public stands in :mod:`metaflowmaps._public`; it is loaded, and torch with it, when a name is first asked for.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaflowmaps._public import *  # noqa: F403
    from metaflowmaps._public import __all__ as __all__

__version__ = "0.2.0"  # the distribution takes it from here; a checkout on PYTHONPATH has no other


def __getattr__(name: str) -> Any:
    """A module of the package, or a public name."""
    if not name.startswith("__") and find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    public = import_module("metaflowmaps._public")
    if name != "__all__" and name not in public.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(public, name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted({*globals(), *import_module("metaflowmaps._public").__all__})
