"""Choices are objects; their names are resolved here and nowhere else.

A **family** is a base class whose concrete subclasses are the choices: steering methods, processes, losses, networks,
data sources, fine-tuning objectives. A choice is a frozen dataclass or a frozen configuration whose fields are its
options and whose class attribute ``name`` is what a user types. What stands outside the package is typed as
``file.py:Name`` or ``package.module:Name`` and is a choice like any other: no list anywhere knows the names.
"""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

from metaflowmaps.errors import InputError, check_keywords, unknown
from metaflowmaps.work.own_code import admit

if TYPE_CHECKING:  # pydantic takes as long to load as this package: it comes with the first option that is read
    from pydantic import GetCoreSchemaHandler, TypeAdapter, ValidationError
    from pydantic_core import CoreSchema

T = TypeVar("T")
PACKAGE = __name__.partition(".")[0]
_OUTSIDE = "metaflowmaps_outside_"  # modules read from files, by the hash of their path
_objects: dict[str, Any] = {}  # classes and functions of the user's, as they were last written
_adapters: "dict[type[Any], TypeAdapter[Any]]" = {}


class Choice:
    """What families have in common: a name to be typed and a title for tables."""

    name: ClassVar[str]
    title: ClassVar[str] = ""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """An option that there is not points to the one that is meant."""
        if dataclasses.is_dataclass(cls):  # pydantic looks by itself
            check_keywords(f"option of {cls.__name__}", options, options_of(cls))
        return super().__new__(cls)

    @classmethod
    def titled(cls) -> str:
        """The title, or else the name."""
        return cls.title or getattr(cls, "name", cls.__name__)


def choices(base: type[T]) -> dict[str, type[T]]:
    """The choices of a family that come with the package: name -> class."""
    importlib.import_module(base.__module__.rpartition(".")[0])  # a family's package imports its members
    members: dict[str, type[T]] = {}
    waiting = list(base.__subclasses__())
    while waiting:
        member = waiting.pop(0)
        waiting += member.__subclasses__()
        if member.__module__.startswith(f"{PACKAGE}.") and "name" in vars(member):
            members[member.name] = member  # type: ignore[attr-defined]
    return members


def choose(base: type[T], text: str) -> type[T]:
    """The class of a family that ``text`` names.

    Args:
        base: the family.
        text: a name of :func:`choices`, ``file.py:Name`` or ``package.module:Name``.
    """
    if ":" in text:
        member = outside(text)
        if not (isinstance(member, type) and issubclass(member, base)):
            raise InputError(f"{text} is no {kind_of(base)}: derive it from {base.__module__}.{base.__name__}")
        _check_whole(base, member)
        return member
    known = choices(base)
    if text not in known:
        raise unknown(kind_of(base), text, [*known, "file.py:Name"])
    return known[text]


def _check_whole(base: type[Any], member: type[Any]) -> None:
    """Refuse a class from outside that lacks what every member of its family has."""
    if not isinstance(getattr(member, "name", None), str):
        raise InputError(f'{member.__name__} has no name: write name = "…" in the class')
    if missing := sorted(getattr(member, "__abstractmethods__", ())):
        raise InputError(f"{member.__name__} is no whole {kind_of(base)}: it has no {', '.join(missing)}")
    if not (hasattr(member, "model_fields") or dataclasses.is_dataclass(member)):
        raise InputError(f"{member.__name__} is no dataclass: write @dataclass(frozen=True) above the class")


def build(base: type[T], text: str, options: Mapping[str, Any]) -> T:
    """The choice that ``text`` names, with these options; those it does not have are refused with the nearest."""
    return with_options(choose(base, text), options)


def with_options(member: type[T], options: Mapping[str, Any]) -> T:
    """A choice's class with options, each validated against its field."""
    fields = options_of(member)
    for option in options:
        if option not in fields:
            raise unknown(f"option of {spelled(member)}", option, fields)
    from pydantic import ValidationError

    try:
        return cast(T, _adapter(member).validate_python(dict(options)))
    except ValidationError as error:
        raise InputError(one_line(error, spelled(member))) from None


def _adapter(member: type[Any]) -> "TypeAdapter[Any]":
    """What reads and writes the options of a class: milliseconds to make, and so made once."""
    from pydantic import TypeAdapter

    if member not in _adapters:
        _adapters[member] = TypeAdapter(member)
    return _adapters[member]


def options_of(member: type[Any]) -> list[str]:
    """The names of a choice's options."""
    if hasattr(member, "model_fields"):  # pydantic's
        return [name for name in member.model_fields if name != "name"]
    return [field.name for field in dataclasses.fields(member) if field.init]


def dumped(choice: Any) -> dict[str, Any]:
    """A choice as JSON can hold it: its name and its options. :func:`built` makes it again."""
    options = _adapter(type(choice)).dump_python(choice, mode="json", warnings=False)
    return {"name": spelled(type(choice)), **{k: v for k, v in options.items() if k != "name"}}


def built(base: type[T], data: Any) -> T:
    """A choice from itself, from a name, or from ``{"name": …, option: value, …}``."""
    if isinstance(data, base):
        _check_whole(base, type(data))
        return data
    if isinstance(data, str):
        return build(base, data, {})
    if isinstance(data, Mapping) and isinstance(data.get("name"), str):
        return build(base, data["name"], {key: value for key, value in data.items() if key != "name"})
    raise InputError(f"a {kind_of(base)} is one of {', '.join(sorted(choices(base)))} or file.py:Name, got {data!r}")


def kind_of(base: type[Any]) -> str:
    """What a family's members are called in messages."""
    return str(getattr(base, "kind", base.__name__.lower()))


class Pick:
    """A configuration's field that holds a choice: ``method: Annotated[Method, Pick(Method)]``.

    It accepts the object, its name or ``{"name": …, option: value}``, and is written as the last.
    """

    def __init__(self, base: type[Any]) -> None:
        self.base = base

    def __get_pydantic_core_schema__(self, source: Any, handler: "GetCoreSchemaHandler") -> "CoreSchema":
        """How pydantic reads and writes such a field."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            functools.partial(built, self.base),
            serialization=core_schema.plain_serializer_function_ser_schema(dumped),
        )


class PickOutside:
    """A configuration's field that holds a class or function of the user's: the object, or ``file.py:Name``.

    What this process has written it reads as the same object: a function made in a function is found nowhere else.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: "GetCoreSchemaHandler") -> "CoreSchema":
        """How pydantic reads and writes such a field."""
        from pydantic_core import core_schema

        return core_schema.no_info_plain_validator_function(
            lambda given: _read_again(given) if isinstance(given, str) else given,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda given: None if given is None else _written(given)
            ),
        )


def _written(given: Any) -> str:
    text = spelled(given)
    _objects[text] = given
    return text


def _read_again(text: str) -> Any:
    return _objects[text] if text in _objects else outside(text)


# -- from outside the package ----------------------------------------------------------------------------------------


def outside(text: str) -> Any:
    """The object that ``file.py:Name`` or ``package.module:Name`` means."""
    place, _, name = text.rpartition(":")
    module = _read(Path(place)) if place.endswith(".py") else _imported(place, text)
    if not hasattr(module, name):
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise unknown(f"name in {place}", name, public)
    return getattr(module, name)


def spelled(member: Any) -> str:
    """How a choice's class (or a function) is typed: the inverse of :func:`choose`, wherever it is read again."""
    if not hasattr(member, "__qualname__"):  # an object that can be called
        member = type(member)
    module = member.__module__
    if module.startswith(f"{PACKAGE}."):
        return str(getattr(member, "name", member.__name__))
    if module.startswith(_OUTSIDE) or module == "__main__":
        return f"{Path(inspect.getfile(member)).resolve()}:{member.__qualname__}"
    return f"{module}:{member.__qualname__}"


def _read(file: Path) -> ModuleType:
    path = file.expanduser().resolve()
    if not path.is_file():
        raise InputError(f"there is no file {file}: give file.py:Name, with the path of the file")
    running = sys.modules["__main__"]
    if getattr(running, "__file__", None) and Path(str(running.__file__)).resolve() == path:
        return running  # a script that loads what it has saved: not run anew
    name = _OUTSIDE + sha256(str(path).encode()).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    content = path.read_bytes()
    admit(str(path), content)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while they are made
    try:
        # what was admitted, and no bytecode that lies beside it
        exec(compile(content, str(path), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:  # a script may end itself
        del sys.modules[name]
        text = " ".join(str(error).split())
        raise InputError(f"{file} cannot be run ({type(error).__name__}: {text}): mend it") from error
    return module


def _imported(place: str, text: str) -> ModuleType:
    if place not in sys.modules:
        admit(place, f"module {place}".encode())
    try:
        return importlib.import_module(place)
    except (ImportError, SystemExit) as error:
        raise InputError(f"{text} cannot be imported ({error}): give file.py:Name or package.module:Name") from None


def one_line(error: "ValidationError", owner: str) -> str:
    """What pydantic found wrong first, in one line."""
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):  # it names the fix already
        return str(cause)
    where = ".".join(str(part) for part in first["loc"]) or owner
    given = " ".join(repr(first["input"]).split())
    message = first["msg"].removeprefix("Value error, ")
    return f"bad value for {where}: {message} (given {given if len(given) <= 60 else given[:57] + '...'})"
