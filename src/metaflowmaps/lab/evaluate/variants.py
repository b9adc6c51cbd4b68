r"""What a comparison may name: a method, with the words that tables have for its settings.

    mfm-gf-4                N = 4 draws a step (tds: particles) mfm-g-plain-1           as published, without what this
    package adds by default (blend, recycled draws, tempering) mfm-g-rescale-1         the direction alone: the steering
    term γ times as long as the drift (γ = 1 in the paper) mfm-g-plain-clip        at most as long tds-64-all,
    tds-64-one  all particles of a system are returned, or one of each my.py:MyMethod          a method of one's own; a
    number may follow it as well

A word means the same for every method; one that says nothing to a method is refused.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, NamedTuple

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.steering import Method, Process
from metaflowmaps.work.choices import choices, choose, with_options


class Variant(NamedTuple):
    """A method with its settings, and those of the process that come with it."""

    name: str
    method: Method
    control: dict[str, Any]  # options of the process
    title: str

    @property
    def rescaled(self) -> bool:
        """Is the steering term's length set by γ?"""
        return self.control.get("renormalize") == "rescale"

    def process(self, base: Process) -> Process:
        """The process to run on: ``base``, or the method's own kind with its steps, and this variant's settings."""
        if self.method.own_moves:
            return self.method.usual(steps=base.steps, grid=base.grid)
        return replace(base, **self.control)

    def using(self, **options: Any) -> "Variant":
        """The same with other options of its method."""
        return self._replace(method=changed(self.method, options))


class _Word(NamedTuple):
    """What a word does to a method or to the process, and how titles say it."""

    title: str
    options: Callable[[Method], dict[str, Any]] = lambda method: {}
    control: dict[str, Any] = {}  # noqa: RUF012  never written to


def _undressed(method: Method) -> dict[str, Any]:
    """Rescaling and clipping leave the theory: gradients are then taken as published."""
    return method.published if method.gradients else {}


WORDS = {
    "plain": _Word("plain", lambda method: method.published),
    "rescale": _Word("rescaled", _undressed, {"renormalize": "rescale"}),
    "clip": _Word("clipped", _undressed, {"renormalize": "clip"}),
    "denoise": _Word("centred on D", lambda method: {"centre": "denoise"}),
    "unguided": _Word("unguided", lambda method: {"guide": "none"}),
    "particle": _Word("by particle", lambda method: {"selection": "particle"}),
    "all": _Word("all returned", lambda method: {"returns": "all"}),
    "one": _Word("one returned", lambda method: {"returns": "one"}),
}


def variant(name: str) -> Variant:
    """What a name means."""
    method_class, rest = _method_of(name)
    words = [word for word in rest.split("-") if word]
    numbers = [int(word) for word in words if word.isdecimal()]
    if len(numbers) > 1:
        raise InputError(f"{name!r} has two numbers: write method-word-N, as in mfm-gf-plain-4")
    method = numbered(with_options(method_class, {}), numbers[0]) if numbers else with_options(method_class, {})
    control: dict[str, Any] = {}
    title = [method.titled()]
    for word in words:
        if word.isdecimal():
            continue
        if word not in WORDS:
            raise unknown("word of a method's name", word, WORDS)
        options = WORDS[word].options(method)
        if (word == "plain" and not options) or (WORDS[word].control and method.own_moves):
            raise InputError(f"{name!r}: {word!r} says nothing to {method.titled()}; leave it out")
        method, control = changed(method, options), {**control, **WORDS[word].control}
        title.append(WORDS[word].title)
    count = f", {numbers[0]} {_unit(method, numbers[0])}" if numbers else ""
    return Variant(name, method, control, " ".join(title) + count)


def changed(method: Method, options: dict[str, Any]) -> Method:
    """The method with other options; those it does not have are refused."""
    known = [field.name for field in fields(method)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise unknown(f"option of {method.titled()}", option, known)
    return replace(method, **options)  # type: ignore[type-var,no-any-return]


def numbered(method: Method, number: int) -> Method:
    """A method's number: its draws, or its particles where it does not draw."""
    return method.with_draws(number) if method.draws else changed(method, {"particles": number})


def _method_of(name: str) -> tuple[type[Method], str]:
    """The method's class, and the words behind it: the longest name that fits."""
    if ":" in name:
        place, _, last = name.rpartition(":")
        own, _, rest = last.partition("-")
        return choose(Method, f"{place}:{own}"), rest
    known = choices(Method)
    fitting = [own for own in known if name == own or name.startswith(f"{own}-")]
    if not fitting:
        raise unknown("method", name, [*known, "file.py:Name"])
    longest = max(fitting, key=len)
    return known[longest], name.removeprefix(longest)


def _unit(method: Method, number: int) -> str:
    unit = "draw" if method.draws else "particle"
    return unit if number == 1 else f"{unit}s"
