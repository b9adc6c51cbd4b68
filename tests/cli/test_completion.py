"""Commands and options completed by a shell, and what mfm --help groups."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from metaflowmaps.cli import app

Command = Callable[..., tuple[int, str, str]]
TYPED = {
    "mfm st": "steer",
    "mfm eval po": "posterior",
    "mfm steer digits --met": "--method",
    "mfm steer digits --process ": "ode sde",
    "mfm eval posterior --sa": "--samples",
    "mfm train gm": "gmm gmm-from-data",
    "mfm eval steering dig": "digits digits-drift",
    "mfm completion z": "zsh",
}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from metaflowmaps.cli.completion import Completion, run
    from metaflowmaps.cli.context import Context

    file = tmp_path_factory.mktemp("completion") / "mfm.bash"
    file.write_text(run(Completion(shell="bash"), Context()))
    return file


def test_bash_completes_what_is_typed(script: Path):
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    ask = 'ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _mfm; echo "${COMPREPLY[*]}"; }'
    words = [line.split(" ") for line in TYPED]
    lines = "\n".join("ask " + " ".join(f"'{word}'" for word in line) for line in words)
    done = subprocess.run(
        ["bash", "-c", f". {script}\n{ask}\n{lines}"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""
    assert dict(zip(TYPED, done.stdout.splitlines(), strict=True)) == TYPED


def test_zsh_reads_the_same_through_its_bash_completion(script: Path, command: Command):
    code, out, _ = command("completion", "zsh")
    assert (code, out.rstrip("\n")) == (
        0,
        f"autoload -Uz compinit bashcompinit\ncompinit\nbashcompinit\n{script.read_text()}".rstrip(),
    )
    code, _, err = command("completion", "fish")
    assert (code, "allowed are bash, zsh" in err) == (2, True)


def test_help_lists_every_command_under_what_it_is_for(command: Command):
    code, out, _ = command("--help")
    assert code == 0
    titles = [line[:-1] for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[1:] == list(app.GROUPS)
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and line[2].isalpha()]
    assert [name for name in listed if name in app.COMMANDS] == list(app.COMMANDS)


def test_an_option_of_a_method_is_told_how_to_give_it(command: Command):
    code, _, err = command("steer", "digits", "--recycle", "4")
    assert code == 2
    assert "it is an option of the method: --set method.recycle=…" in err
