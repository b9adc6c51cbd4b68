"""The command line, ``mfm``: one file a command, a frozen configuration and ``run(config, context)`` in each.

Exit codes: 0 done, 2 bad usage or bad input (one line on stderr), 130 interrupted (state saved), 1 anything else.
"""

import errno
import io
import os
import re
import sys
import warnings
from contextlib import suppress
from typing import Any

from metaflowmaps.errors import InputError
from metaflowmaps.work.progress import ForgivingStream

INTERRUPTED = "interrupted; finished files are kept"


def main() -> None:
    """Run, and turn what went wrong into one line and an exit code."""
    before = sys.stdout, sys.stderr
    try:
        code = _main()
    finally:
        sys.stdout, sys.stderr = before
    sys.exit(code)


def _main() -> int:
    _open_streams()
    try:
        code, ranks = _run()
    except KeyboardInterrupt:  # in the seconds of the first imports too
        print(INTERRUPTED, file=sys.stderr)
        code, ranks = 130, 1
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # said by now; what is left in it would be tried again at exit
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if ranks > 1:  # what gloo leaves running may abort an interpreter that takes itself apart
        sys.stderr.flush()
        os._exit(code)
    return code


def _open_streams() -> None:
    """Streams that can be written to whatever they were: closed, of few letters, and stderr on a full disk too."""
    for number in range(3):  # closed, it would become the number of the next file, and be written to as a stream
        with suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = ForgivingStream(sys.stderr)  # type: ignore[assignment]


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
    ranks = 1
    try:
        ranks = launched().size
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
        if ranks == 1 or not reported_by_first_rank(error):
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
    from metaflowmaps.cli.context import Failed, complain, say
    from metaflowmaps.training.loop import Interrupted, NonFiniteLoss
    from metaflowmaps.training.run_log import RunLost
    from metaflowmaps.work.launch import reported_by_first_rank
    from metaflowmaps.work.ranks import RankLost

    if isinstance(error, Interrupted):
        say(str(error))
        return 130
    if isinstance(error, NonFiniteLoss | RunLost | Failed):
        say(f"error: {error}")
        return 1
    if isinstance(error, RankLost):
        complain(f"error: {error}")
        return 1
    if _disk_full(error):
        say("error: no space left on the device: free some and run the same command again; checkpoints are intact")
        return 1
    if reported_by_first_rank(error):
        return 1
    if isinstance(error, OSError):
        file = error.filename if isinstance(error.filename, str) else "a file or a connection"
        complain(
            f"error: {file}: {error.strerror or error}: check the disk and its permissions, then the same command again"
        )
        return 1
    raise error
