"""The command line, ``mfm``: one file a command, a frozen configuration and ``run(config, context)`` in each.

Exit codes: 0 done, 2 bad usage or bad input (one line on stderr), 130 interrupted (state saved), 1 anything else.
"""

import errno
import os
import re
import sys
import warnings
from contextlib import suppress
from typing import Any

from metaflowmaps.errors import InputError

INTERRUPTED = "interrupted; finished files are kept"


def main() -> None:
    """Run, and turn what went wrong into one line and an exit code."""
    try:
        code, ranks = _run()
    except KeyboardInterrupt:  # in the seconds of the first imports too
        print(INTERRUPTED, file=sys.stderr)
        code, ranks = 130, 1
    if ranks > 1:  # what gloo leaves running may abort an interpreter that takes itself apart
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _run() -> tuple[int, int]:
    """The exit code, and how many ranks there are."""
    import click

    from metaflowmaps.cli.app import main as commands
    from metaflowmaps.cli.context import complain, say
    from metaflowmaps.work.launch import launched, reported_by_first_rank

    warned: set[str] = set()

    def warn(message: Warning | str, *_args: Any, **_more: Any) -> None:
        """Say it once, whatever its numbers: shards are alike."""
        words = re.sub(r"\d+", "", str(message))
        if words not in warned:
            warned.add(words)
            say(f"warning: {message}")

    warnings.showwarning = warn
    ranks = launched().size
    try:
        with commands().make_context("mfm", sys.argv[1:]) as context:
            context.command.invoke(context)
        sys.stdout.flush()
        return 0, ranks
    except click.exceptions.Exit as end:
        return end.exit_code, ranks
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "mfm"
        say(f"error: {' '.join(error.format_message().split())} (see {where} --help)")
        return 2, ranks
    except InputError as error:
        if not reported_by_first_rank(error):
            complain(f"error: {error}")
        return 1 if _disk_full(error.__cause__) else 2, ranks
    except KeyboardInterrupt:
        say(INTERRUPTED)
        return 130, ranks
    except BrokenPipeError:
        # the reader left: nothing more to say, and nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, ranks
    except Exception as error:
        return _failed(error), ranks


def _disk_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _failed(error: Exception) -> int:
    """The exit code of what else may end a command, with its line; what nobody foresaw is raised."""
    from metaflowmaps.cli.context import Failed, say
    from metaflowmaps.training.loop import Interrupted, NonFiniteLoss
    from metaflowmaps.work.launch import reported_by_first_rank

    if isinstance(error, Interrupted):
        say(str(error))
        return 130
    if isinstance(error, NonFiniteLoss | Failed):
        say(f"error: {error}")
        return 1
    if _disk_full(error):
        say("error: no space left on the device: free some and run the same command again; checkpoints are intact")
        return 1
    if reported_by_first_rank(error):
        return 1
    raise error
