"""The command line, ``mfm``: thin. It resolves a configuration, calls the package, prints, and sets the exit code.

Exit codes: 0 done, 2 bad usage or bad input (one line on stderr), 130 interrupted (state saved), 1 anything else.
A module a group of commands; importing it registers them.
"""

import errno
import os
import sys
import warnings
from contextlib import suppress
from typing import Annotated

import typer

from metaflowmaps.cli import train, run, convert, data, draw, judge  # isort: skip  # the order in which mfm --help lists them
from metaflowmaps.cli.options import app, complain, say
from metaflowmaps.errors import InputError
from metaflowmaps.work.ranks import launched, told_elsewhere

__all__ = ["app", "convert", "data", "draw", "judge", "main", "run", "train"]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Meta flow maps: train, draw, steer, tune, judge. Start with: mfm demo"""
    if version:
        from metaflowmaps import __version__

        print(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def main() -> None:
    """Run, and turn what went wrong into one line and an exit code."""
    warnings.showwarning = lambda message, *_args, **_kwargs: say(f"warning: {message}")
    code = _run()
    if launched().size > 1:  # what gloo leaves running may abort an interpreter that takes itself apart
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run() -> int:
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # click's own word for an interrupt
            say("interrupted; finished files are kept")
        return code if isinstance(code, int) else 0
    except InputError as error:
        if not told_elsewhere(error):
            complain(f"error: {error}")
        return 1 if _disk_full(error.__cause__) else 2
    except KeyboardInterrupt:
        say("interrupted; finished files are kept")
        return 130
    except BrokenPipeError:
        # the reader left: nothing more to say, and nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _failed(error)


def _disk_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _failed(error: Exception) -> int:
    """The exit code of what else may end a command, with its line; what nobody foresaw is raised."""
    from metaflowmaps.training.loop import Interrupted, NonFiniteLoss

    if isinstance(error, Interrupted):
        say(str(error))
        return 130
    if isinstance(error, NonFiniteLoss):
        say(f"error: {error}")
        return 1
    if _disk_full(error):
        say("error: no space left on the device: free some and run the same command again; checkpoints are intact")
        return 1
    if type(error).__name__ == "Abort":
        say("interrupted; finished files are kept")
        return 130
    # usage errors come from click, which typer carries inside itself from some version on: known by their shape
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message)
        else:
            context = getattr(error, "ctx", None)
            where = context.command_path if context is not None else "mfm"
            say(f"error: {' '.join(message.split())} (see {where} --help)")
        return 2
    if told_elsewhere(error):
        return 1
    raise error
