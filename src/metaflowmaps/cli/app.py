"""From a command's module to its options: names, help, defaults and bounds are those of its configuration's fields.

A command is a module of this folder with ``run(config, context) -> Results``; the type of ``config`` is its
configuration and the docstring of the module its help. A field is an option ``--its-name`` (``--flag/--no-flag`` for
a bool, repeatable for a tuple), or a positional argument where it is marked :class:`Argument`; groups and whatever has
no option are reached by ``--set key.sub=value``. Modules are imported when they run: ``mfm --help`` reads docstrings.
"""

import ast
import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from metaflowmaps.cli.context import Argument, Context, Name
from metaflowmaps.cli.telling import emit, emit_json
from metaflowmaps.errors import InputError, unknown
from metaflowmaps.work.choices import Pick, choices, one_line, options_of
from metaflowmaps.work.config import Config, override

GROUPS = {  # as mfm --help lists them, by what one wants to do: name -> module
    "Begin": {"demo": "demo", "doctor": "doctor", "recipes": "recipes", "completion": "completion"},
    "Make a map": {"train": "train", "distill": "distill", "convert": "convert", "encode-latents": "encode"},
    "Draw and steer": {
        "sample": "sample",
        "posterior": "posterior",
        "advise": "advise",
        "steer": "steer",
        "play": "play",
        "finetune": "finetune",
    },
    "Measure and show": {"eval": "evaluate", "bench": "bench", "run": "run", "report": "report"},
}
COMMANDS = {name: module for group in GROUPS.values() for name, module in group.items()}
SETTING = "Change a setting: key.sub=value (repeatable)."
BOUNDS = {"greater_than_equal": ("at least", "ge"), "less_than_equal": ("at most", "le")}
BOUNDS |= {"greater_than": ("greater than", "gt"), "less_than": ("less than", "lt")}
Run = Callable[[Any, Context], Any]


class Commands(click.Group):
    """Commands that are made when they are asked for.

    Args:
        name: what they are called together.
        text: their help.
        members: each one's module, or function.
        groups: the names under each title of the help.
        more: as click takes it.
    """

    def __init__(
        self,
        name: str,
        text: str,
        members: Mapping[str, str | Run],
        groups: Mapping[str, Iterable[str]] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(name, help=text, no_args_is_help=False, invoke_without_command=True, callback=_asked, **more)
        self.members, self.groups = members, groups or {"Commands": members}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are listed."""
        return list(self.members)

    def get_command(self, ctx: click.Context, name: str) -> click.Command:
        """The command of that name; of an unknown one, the nearest is suggested."""
        if name not in self.members:
            raise unknown("command", name, self.members)
        member = self.members[name]
        if not isinstance(member, str):
            return command(name, member, inspect.getdoc(member) or "")
        module = importlib.import_module(f"{__package__}.{member}")
        if hasattr(module, "COMMANDS"):
            return Commands(name, module.__doc__ or "", module.COMMANDS)
        return command(name, module.run, module.__doc__ or "")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without an import of any."""
        for title, names in self.groups.items():
            with formatter.section(title):
                formatter.write_dl([(name, self._first_line(self.members[name])) for name in names])

    @staticmethod
    def _first_line(member: str | Run) -> str:
        if not isinstance(member, str):
            return (inspect.getdoc(member) or "").splitlines()[0]
        spec = find_spec(f"{__package__}.{member}")
        text = ast.get_docstring(ast.parse(Path(str(spec and spec.origin)).read_text(encoding="utf-8"))) or ""
        return text.splitlines()[0]


@click.pass_context
def _asked(ctx: click.Context) -> None:
    """Where no command was named, that is bad usage and the help is the answer."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
        ctx.exit(2)


def main() -> click.Group:
    """``mfm`` itself."""
    version = click.Option(
        ["--version"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_version,
        help="Print the version and exit.",
    )
    text = "Meta flow maps: train, draw, steer, tune, judge. Start with: mfm demo"
    return Commands("mfm", text, COMMANDS, GROUPS, params=[version])


class Command(click.Command):
    """One command; an option that is one of ``--set`` is told so.

    Args:
        kind: its configuration.
        given: as click takes it.
    """

    def __init__(self, kind: type[Config], *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.kind = kind

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """What was typed, as click reads it."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            option = error.option_name.lstrip("-").replace("-", "_")
            for name, field in self.kind.model_fields.items():
                pick = next((mark for mark in field.metadata if isinstance(mark, Pick)), None)
                members = choices(pick.base).values() if pick is not None else ()
                if any(option in options_of(member) for member in members):
                    fix = f"it is an option of the {name}: --set {name}.{option}=…"
                    raise click.UsageError(f"No such option '{error.option_name}': {fix}", ctx) from None
            raise


def command(name: str, run: Run, text: str) -> click.Command:
    """The command that a function and the fields of its configuration make."""
    kind = config_of(run)
    fields = {name: (kind, field) for name, field in kind.model_fields.items()}
    shared = getattr(kind, "shared", ())
    fields |= {name: (Context, Context.model_fields[name]) for name in shared}
    made = {field: parameter(field, info) for field, (_, info) in fields.items()}
    parameters = [made[field] for field in made if made[field] is not None]
    own_set = "device" in shared and not any("--set" in p.opts for p in parameters if p is not None)
    if own_set:
        parameters.append(click.Option(["--set", "settings"], multiple=True, metavar="KEY=VALUE", help=SETTING))

    def callback(**given: Any) -> None:
        given = {key: value for key, value in given.items() if value is not None and value != ()}
        settings = given.pop("settings", ()) if own_set else ()
        own = {key: value for key, value in given.items() if key not in shared}
        options = {field: parameter.opts[-1] for field, parameter in made.items() if parameter is not None}
        context = checked(Context, {key: given[key] for key in shared if key in given}, options)
        config = override(checked(kind, own, options), settings)
        results = run(config, context)
        if context.as_json:
            emit_json(results)
        else:
            emit(results, config, options, {*own, *given_by(settings), *given_by(own.get("settings", ()))})
        if isinstance(results, dict) and results.get("failed"):
            raise click.exceptions.Exit(1)

    arguments = [(p.metavar, made_help(kind, p.name)) for p in parameters if isinstance(p, click.Argument)]
    rows = "".join(f"\n\n{metavar}: {words}" for metavar, words in arguments)
    return Command(kind, name, params=parameters, callback=callback, help=text.strip() + rows)


def given_by(settings: Iterable[str]) -> set[str]:
    """The parts of the keys of ``--set``: process.steps=50 says which process, and its steps."""
    return {part for setting in settings for part in setting.partition("=")[0].strip().split(".")}


def config_of(run: Run) -> type[Config]:
    """The configuration that a command's function takes."""
    kind: type[Config] = get_type_hints(run)["config"]
    return kind


def made_help(kind: type[Config], name: str | None) -> str:
    """What a field says of itself."""
    return kind.model_fields[str(name)].description or ""


def parameter(name: str, field: FieldInfo) -> click.Parameter | None:
    """The argument or option of a field; None for what only ``--set`` reaches."""
    marks = {type(mark): mark for mark in field.metadata}
    annotation, many = _plain(field.annotation)
    argument, named, pick = marks.get(Argument), marks.get(Name), marks.get(Pick)
    if argument is not None:
        nargs = -1 if many else 1
        return click.Argument([name], required=field.is_required(), nargs=nargs, metavar=argument.metavar)
    if pick is None and not _scalar(annotation):
        return None
    names = list(named.names) if named is not None else [f"--{name.replace('_', '-')}"]
    text = field.description or ""
    if pick is not None:
        text += f" One of {', '.join(choices(pick.base))}, or file.py:Name."
    default = field.get_default(call_default_factory=True) if not field.is_required() else None
    if default not in (None, (), False) and not isinstance(default, BaseModel):
        text += f" [default: {getattr(default, 'name', default)}]"
    if annotation is bool:
        both = f"{names[0]}/--no-{names[0][2:]}" if default else names[0]
        return click.Option([both, name], default=None, is_flag=True, help=text)
    metavar = named.metavar if named is not None and named.metavar else _metavar(annotation, pick is not None)
    return click.Option([*names, name], multiple=many, metavar=metavar, help=text)


def checked(kind: type[Any], data: dict[str, Any], options: Mapping[str, str]) -> Any:
    """A configuration from what was typed; what is wrong names the option."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else ""
        option, context = options.get(field, field), first.get("ctx", {})
        if first["type"] == "literal_error":
            kinds = _plain(kind.model_fields[field].annotation)[0]
            raise unknown(option, first["input"], map(str, get_args(kinds))) from None
        if first["type"] in BOUNDS:
            words, bound = BOUNDS[first["type"]]
            raise InputError(f"{option} must be {words} {context[bound]}, got {first['input']}") from None
        text = re.sub(rf"for {re.escape(field)}[.\d]*:", f"for {option}:", one_line(error, "the options"), count=1)
        raise InputError(text) from None


def _plain(annotation: Any) -> tuple[Any, bool]:
    """An annotation without ``| None``, and of a tuple or list its elements' and True."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        annotation = members[0] if len(members) == 1 else annotation
    if get_origin(annotation) in (tuple, list) and len(set(get_args(annotation)) - {Ellipsis}) == 1:
        return get_args(annotation)[0], True
    return annotation, False


def _scalar(annotation: Any) -> bool:
    return annotation in (str, int, float, bool, Path) or get_origin(annotation) is Literal


def _metavar(annotation: Any, picked: bool) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    return "NAME" if picked else {int: "N", float: "X", Path: "PATH"}.get(annotation, "TEXT")


def _version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        from metaflowmaps import __version__

        click.echo(__version__)
        ctx.exit()
