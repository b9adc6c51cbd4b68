"""How steering methods and samplers look: a method has one colour and one marker in every figure."""

import re
from collections.abc import Iterable
from typing import Any

from metaflowmaps.lab.figures.plots import MAP
from metaflowmaps.steering import BestOfN, Method, Unsteered
from metaflowmaps.work.choices import choices

Style = dict[str, Any]  # of a line, as matplotlib takes it

# what is no steering method has its look here; any two looks stay apart for red- and green-blind eyes too
SAMPLERS = {"map": (MAP, "o"), "ode": ("#46107f", "D")}


def looks() -> dict[str, tuple[str, str]]:
    """Colour and marker of every sampler and method by name, the same in every figure; those on the map come first."""
    methods = sorted(choices(Method).items(), key=lambda item: not item[0].startswith("mfm"))
    return {**{name: method.look for name, method in methods}, **SAMPLERS}


def base_method(name: str) -> tuple[str | None, bool]:
    """The name of :func:`looks` that a name is or is a variant of (None: of none), and whether it is that name."""
    known = re.sub(r"^best-of-\d+$", BestOfN.name, name.lower())
    base = max((key for key in looks() if known.startswith(key)), key=len, default=None)
    return base, known == base


def style(name: str) -> Style:
    """Colour and marker of a method; variants of it are dashed and hollow. best-of-1000 is best-of-n at n = 1000."""
    base, own = base_method(name)
    color, marker = looks()[base or Unsteered.name]
    return {
        "color": color,
        "marker": marker,
        "markersize": 7 if own else 6,
        "linewidth": 1.8 if own else 1.2,
        "linestyle": "-" if own else "--",
        "markerfacecolor": color if own else "white",
    }


def looks_of(names: Iterable[str]) -> dict[str, Style]:
    """A style a name, in the order of the methods: its method's; a free one where it is no method's variant."""
    wanted = list(dict.fromkeys(names))
    free = [key for key in looks() if key not in {base_method(name)[0] for name in wanted}]
    styles, variants = {}, dict.fromkeys(looks(), 0)
    for name in wanted:
        base, own = base_method(name)
        styles[name] = style(name if base is not None else free.pop(0) if free else Unsteered.name)
        if base is not None and not own:
            styles[name]["linestyle"] = ("--", ":", "-.")[variants[base] % 3]
            variants[base] += 1
    order = list(looks())
    return dict(sorted(styles.items(), key=lambda item: order.index(base_method(item[0])[0] or Unsteered.name)))
