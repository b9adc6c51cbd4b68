"""Print what completes mfm's commands and options in a shell: eval "$(mfm completion bash)" in your ~/.bashrc.

The script is written once and knows every name by itself: it starts no Python while you type.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, get_args, get_origin

import click
from pydantic import Field
from pydantic.fields import FieldInfo

from metaflowmaps.cli.context import Argument, Context, Options, Results
from metaflowmaps.work.choices import Pick, choices

SCRIPT = """\
_mfm() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    local of="${{COMP_WORDS[1]}}"
    [ "$of" = eval ] && of="eval ${{COMP_WORDS[2]}}"
    if [ "$COMP_CWORD" = 1 ]; then words="{commands}"
    elif [ "$COMP_CWORD" = 2 ] && [ "${{COMP_WORDS[1]}}" = eval ]; then words="{eval}"
    else
        case "$of $before" in
{values}
            *) case "$current" in
                -*) case "$of" in
{options}
                esac ;;
                *) case "$of" in
{places}
                esac ;;
            esac ;;
        esac
    fi
    COMPREPLY=( $(compgen -W "$words" -- "$current") )
}}
complete -o default -F _mfm mfm
"""
ZSH = "autoload -Uz compinit bashcompinit\ncompinit\nbashcompinit\n"


class Completion(Options):
    """Which shell."""

    shared = ()

    shell: Annotated[Literal["bash", "zsh"], Argument("SHELL")] = Field(description="bash or zsh.")

    def next_command(self, results: Results, folder: str) -> str:
        """It is to be read by the shell, and not by people."""
        return f'put eval "$(mfm completion {self.shell})" into your ~/.{self.shell}rc'


def run(config: Completion, context: Context) -> str:
    """The script."""
    from metaflowmaps.cli.app import COMMANDS

    commands = dict(_commands())
    script = SCRIPT.format(
        commands=" ".join(COMMANDS),
        eval=" ".join(name.removeprefix("eval ") for name in commands if name.startswith("eval ")),
        values="\n".join(_cases(12, _values(commands))),
        options="\n".join(_cases(20, {name: _options(made) for name, made in commands.items()}.items())),
        places="\n".join(_cases(20, _places())),
    )
    return (ZSH if config.shell == "zsh" else "") + script


def _commands() -> Iterator[tuple[str, click.Command]]:
    """Every command by what one types for it."""
    from metaflowmaps.cli.app import main

    context = click.Context(main())
    for name in main().list_commands(context):
        made = main().get_command(context, name)
        if isinstance(made, click.Group):
            for part in made.list_commands(context):
                each = made.get_command(context, part)
                assert each is not None
                yield f"{name} {part}", each
        elif made is not None:
            yield name, made


def _options(made: click.Command) -> list[str]:
    return [word for p in made.params if isinstance(p, click.Option) for word in p.opts + p.secondary_opts] + ["--help"]


def _values(commands: dict[str, click.Command]) -> Iterator[tuple[str, list[str]]]:
    """What may stand after an option that takes one of a few names."""
    from metaflowmaps.cli.app import Command

    for name, made in commands.items():
        assert isinstance(made, Command)
        for parameter in made.params:
            field = made.kind.model_fields.get(str(parameter.name))
            if isinstance(parameter, click.Option) and field is not None and (names := _names(field)):
                yield from ((f"{name} {option}", names) for option in parameter.opts)


def _names(field: FieldInfo) -> list[str]:
    """The names that a field may have."""
    for mark in field.metadata:
        if isinstance(mark, Pick):
            return list(choices(mark.base))
    return list(map(str, get_args(field.annotation))) if get_origin(field.annotation) is Literal else []


def _places() -> Iterator[tuple[str, list[str]]]:
    """What may stand where no option does: recipes, tasks, and the maps that come with the package."""
    from metaflowmaps.checkpoint.shipped import names
    from metaflowmaps.lab.imagenet_tasks import TASKS
    from metaflowmaps.recipes import RECIPES

    yield "train", list(RECIPES)
    yield "run", list(TASKS)
    yield "completion", ["bash", "zsh"]
    for name in ("sample", "posterior", "advise", "steer", "finetune", "bench", "eval *"):
        yield name, [model for model in names() if not model.endswith(("-guide", "-judge"))]


def _cases(indent: int, words: Iterable[tuple[str, list[str]]]) -> Iterator[str]:
    """Branches of the shell's ``case``; a star stays outside of the quotes."""
    for pattern, names in words:
        quoted = f'"{pattern[:-1]}"*' if pattern.endswith("*") else f'"{pattern}"'
        yield f'{" " * indent}{quoted}) words="{" ".join(names)}" ;;'
