"""From a configuration's fields to options: names, help, defaults, bounds, and errors that name the option."""

import subprocess
import sys
from collections.abc import Callable
from typing import Annotated, Literal

import click
import pytest
from pydantic import Field

from metaflowmaps.cli import app
from metaflowmaps.cli.context import Argument, Context, Options
from metaflowmaps.errors import InputError
from metaflowmaps.work.config import Config

Command = Callable[..., tuple[int, str, str]]
EVERY = [[name] for name in app.COMMANDS] + [
    ["eval", name] for name in ("posterior", "steering", "value", "generation")
]


class Inner(Config):
    size: int = 3


class Example(Options):
    """A configuration."""

    thing: Annotated[str, Argument("THING")] = Field(description="What it is about.")
    num_draws: int = Field(4, ge=1, le=9, description="How many.")
    kind: Literal["left", "right"] = Field("left", description="Which.")
    fast: bool = Field(False, description="Quickly.")
    check: bool = Field(True, description="Look twice.")
    only: tuple[int, ...] = Field((), description="These alone.")
    inner: Inner = Inner()


def parsed(*arguments: str) -> tuple[Example, Context]:
    """What a command of this configuration is given."""
    seen: list[tuple[Example, Context]] = []

    def run(config: Example, context: Context) -> None:
        seen.append((config, context))

    command = app.command("example", run, "Do it.")
    with command.make_context("example", list(arguments)) as context:
        command.invoke(context)
    return seen[0]


def test_defaults_are_those_of_the_fields():
    config, context = parsed("x")
    assert config == Example(thing="x")
    assert (context.out, context.seed, context.device, context.dry_run) == (None, None, "auto", False)


def test_every_kind_of_field_has_its_option():
    config, context = parsed(
        "x", "--num-draws", "7", "--kind", "right", "--fast", "--no-check", "--only", "1", "--only", "2",
        "--set", "inner.size=5", "--seed", "3", "--json",
    )  # fmt: skip
    assert config == Example(
        thing="x", num_draws=7, kind="right", fast=True, check=False, only=(1, 2), inner=Inner(size=5)
    )
    assert (context.seed, context.as_json) == (3, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--num-draws", "0"], "--num-draws must be at least 1, got 0"),
        (["--num-draws", "10"], "--num-draws must be at most 9, got 10"),
        (["--num-draws", "two"], "bad value for --num-draws"),
        (["--kind", "lef"], "did you mean 'left'"),
        (["--only", "a"], "bad value for --only"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--set", "inner.siz=1"], "did you mean 'inner.size'"),
        (["--set", "inner=1"], "inner is a group"),
    ],
)
def test_a_bad_value_names_its_option(arguments: list[str], says: str):
    with pytest.raises(InputError) as caught:
        parsed("x", *arguments)
    assert says in str(caught.value)


def test_a_missing_argument_is_named():
    with pytest.raises(click.UsageError) as caught:
        parsed()
    assert "'THING'" in caught.value.format_message()


def test_help_says_what_fields_say():
    def run(config: Example, context: Context) -> None: ...

    command = app.command("example", run, "Do it.")
    text = " ".join(command.get_help(click.Context(command, info_name="example")).split())
    for words in ("Do it.", "THING: What it is about.", "--num-draws N How many. [default: 4]", "--check / --no-check"):
        assert words in text
    assert "left|right" in text


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_of_every_command(command: Command, words: list[str]):
    code, out, err = command(*words, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: mfm {' '.join(words)}")
    assert "Show this message" in out


def test_the_list_of_commands_imports_none_of_them():
    code = (
        "import sys; sys.argv = ['mfm', '--help']\n"
        "from metaflowmaps import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules, 'imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Draw samples of the data law" in done.stdout
