r"""What a comparison may name: a method, with the words that tables have for its settings.

    mfm-gf-4             N = 4 draws a step (tds: particles)
    mfm-g-plain-1        as published, without what this package adds by default (blend, recycled draws, tempering)
    mfm-g-rescale-1      the direction alone: the steering term γ times as long as the drift (γ = 1 in the paper)
    mfm-g-plain-clip     at most as long
    tds-64-all, tds-64-one   all particles of a system are returned, or one of each
    best-of-n-map-64     of one-step samples
    dps-scale=.03        any option of the method: a rival at its best setting
    my.py:MyMethod       a method of one's own; a number may follow it as well

A word means the same for every method; one that says nothing to a method is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

from metaflowmaps.errors import InputError, unknown
from metaflowmaps.steering import Method, Process
from metaflowmaps.work.choices import choices, choose, with_options

Options = Mapping[str, object]  # of a method, by the names of its fields


@dataclass(frozen=True)
class Variant:
    """A method with its settings, and the length of the steering term where the name sets it."""

    name: str
    method: Method
    renormalize: str | None
    title: str

    @property
    def rescaled(self) -> bool:
        """Is the steering term's length set by γ?"""
        return self.renormalize == "rescale"

    def process(self, base: Process) -> Process:
        """The process to run on: ``base``, or the method's own kind with its steps, and this variant's settings."""
        if self.method.own_moves:
            return self.method.usual(steps=base.steps, grid=base.grid)
        return base if self.renormalize is None else replace(base, renormalize=self.renormalize)

    def using(self, options: Options) -> "Variant":
        """The same with other options of its method."""
        return replace(self, method=changed(self.method, options))


@dataclass(frozen=True)
class _Word:
    """What a word does to a method or to the process, and how titles say it."""

    title: str
    options: Callable[[Method], Options] = lambda method: {}
    renormalize: str | None = None


def _undressed(method: Method) -> Options:
    """Rescaling and clipping leave the theory: gradients are then taken as published."""
    return method.published if method.gradients else {}


WORDS = {
    "plain": _Word("plain", lambda method: method.published),
    "rescale": _Word("rescaled", _undressed, "rescale"),
    "clip": _Word("clipped", _undressed, "clip"),
    "denoise": _Word("centred on D", lambda method: {"centre": "denoise"}),
    "unguided": _Word("unguided", lambda method: {"guide": "none"}),
    "particle": _Word("by particle", lambda method: {"selection": "particle"}),
    "all": _Word("all returned", lambda method: {"returns": "all"}),
    "one": _Word("one returned", lambda method: {"returns": "one"}),
    "map": _Word("of one-step samples", lambda method: {"source": "map"}),
}


def variant(name: str) -> Variant:
    """What a name means."""
    method_class, rest = _method_of(name)
    words = [word for word in rest.split("-") if word]
    numbers = [int(word) for word in words if word.isdecimal()]
    if len(numbers) > 1:
        raise InputError(f"{name!r} has two numbers: write method-word-N, as in mfm-gf-plain-4")
    method = with_options(method_class, {})
    if numbers:
        method = method.with_draws(numbers[0]) if method.draws else changed(method, {"particles": numbers[0]})
    renormalize, title = None, method.titled()
    for word in (word for word in words if not word.isdecimal()):
        if "=" in word:
            option, _, value = word.partition("=")
            method = changed(method, {option: _value(method, option, value)})
            title += f" {option} {value}"
            continue
        if word not in WORDS:
            raise unknown("word of a method's name", word, WORDS)
        meant = WORDS[word]
        options = meant.options(method)
        if (word == "plain" and not options) or (meant.renormalize and method.own_moves):
            raise InputError(f"{name!r}: {word!r} says nothing to {method.titled()}; leave it out")
        method, renormalize = changed(method, options), meant.renormalize or renormalize
        title += f" {meant.title}"
    for number in numbers:
        title += f", {number} {'draw' if method.draws else 'particle'}{'s' * (number != 1)}"
    return Variant(name, method, renormalize, title)


def changed(method: Method, options: Options) -> Method:
    """The method with other options; those it does not have are refused."""
    known = [field.name for field in fields(method)]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            raise unknown(f"option of {method.titled()}", option, known)
    return replace(method, **options)  # type: ignore[type-var,no-any-return]


def _value(method: Method, option: str, text: str) -> object:
    """An option's value from its text: a number where the default is one."""
    default = getattr(method, option, "")
    if isinstance(default, str) or text.isalpha():
        return text
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise InputError(f"{option}={text}: write a number, as in dps-scale=.03") from None


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
