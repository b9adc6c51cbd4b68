"""The suite on other versions: ``make matrix``. One virtualenv a way to install, under .matrix, made where missing.

    python tests/matrix.py [--only NAME ...] [--all] [--processes N]

PART of the suite is run, or all of it with ``--all``. A line whose Python is not on this machine is named as not run.
Results go to .matrix/results.json, and are printed as a table. The exit code is 1 where a test failed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".matrix"
RESULTS = FOLDER / "results.json"
TESTING = ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100"]

# what touches torch and the other dependencies most, and needs no extra: some minutes of one core
PART = (
    "checkpoint/test_directories.py", "cli/test_main.py", "cli/test_only_seeds.py", "cli/test_streams.py",
    "contracts", "networks", "report/test_html.py", "steering/test_limits.py", "steering/test_seeds.py",
    "test_bad_input.py", "test_flow_map.py", "test_guidance.py", "test_import.py", "test_losses.py",
    "test_meter.py", "test_randomness.py", "test_sampling.py", "training/test_loop.py",
    "training/test_resume.py", "work",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A way to install the package, and how the suite is run there.

    Args:
        name: For ``--only``.
        python: The interpreter's version.
        torch: Its version.
        lowest: Dependencies are the lower bounds of pyproject.toml, without extras; else the newest, with those of dev.
        options: For pytest.
    """

    name: str
    python: str
    torch: str
    lowest: bool = False
    options: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Of its virtualenv: lines that install the same share one."""
        return FOLDER / f"python{self.python}-torch{self.torch}-{'lowest' if self.lowest else 'newest'}"

    def requirements(self) -> list[str]:
        """What pip is asked for."""
        if not self.lowest:
            return [f"torch=={self.torch}", "-e", f"{ROOT}[dev]"]
        lowest = [bound.replace(">=", "==") for bound in dependencies() if not bound.startswith("torch")]
        return [f"torch=={self.torch}", *lowest, *TESTING, "-e", str(ROOT)]


LINES = (
    Line("oldest", "3.11", "2.13.0", lowest=True),
    Line("newest", "3.11", "2.14.1"),
    Line("rounding", "3.11", "2.14.1", options=("--rounding",)),
    Line("python-3.12", "3.12", "2.14.1"),
    Line("python-3.13", "3.13", "2.14.1"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the lines that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[line.name for line in LINES], help="these lines alone")
    parser.add_argument("--all", action="store_true", help="the whole suite, not PART of it")
    parser.add_argument("--processes", default="2", help="that share the tests")
    given = parser.parse_args(arguments)
    tests = ["tests"] if given.all else [f"tests/{name}" for name in PART]
    FOLDER.mkdir(exist_ok=True)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    lines = [line for line in LINES if not given.only or line.name in given.only]
    for line in lines:
        results[line.name] = run(line, tests, given.processes)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table({line.name: results[line.name] for line in lines}))
    return int(any(results[line.name].get("failed") for line in lines))


def run(line: Line, tests: list[str], processes: str) -> dict[str, object]:
    """The tests on a line: what is installed, how many ran, the names of those that failed."""
    python = interpreter(line.python)
    if python is None:
        return {"not run": f"no Python {line.python} here"}
    try:
        inside = prepare(line, python)
    except subprocess.CalledProcessError as error:
        return {"not run": f"{Path(error.cmd[0]).name} could not install it (exit code {error.returncode})"}
    told = FOLDER / f"{line.name}.xml"
    options = ["-n", processes, "--dist", "loadfile", *line.options, f"--junitxml={told}"]
    command = [str(inside), "-m", "pytest", *options, *tests]
    print(f"{line.name}: {' '.join(command[1:])}", flush=True)
    began = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code not in (0, 1):
        return {"failed": [f"pytest ended with {code}"], "installed": installed(inside)}
    cases = list(ElementTree.parse(told).iter("testcase"))
    fallen = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return {
        "tests": len(cases),
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in fallen],
        "skipped": sum(case.find("skipped") is not None for case in cases),
        "seconds": round(time.monotonic() - began),
        "installed": installed(inside),
    }


def interpreter(version: str) -> str | None:
    """A Python of this version that runs, on the path or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [sys.executable, shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python")))]
    code = "import ensurepip, sys; print('%d.%d' % sys.version_info[:2])"
    for python in filter(None, found):
        if subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip() == version:
            return python
    return None


def prepare(line: Line, python: str) -> Path:
    """The interpreter of the line's virtualenv, which is made anew where something else was asked for last time."""
    inside, stamp, wanted = line.folder / "bin" / "python", line.folder / "asked.json", line.requirements()
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return inside
    print(f"{line.name}: installing into {line.folder.relative_to(ROOT)} ...", flush=True)
    subprocess.run([python, "-m", "venv", "--clear", str(line.folder)], check=True)
    install = [str(inside), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *wanted], check=True)
    stamp.write_text(json.dumps(wanted), encoding="utf-8")
    return inside


def dependencies() -> list[str]:
    """The package's own, with their bounds."""
    bounds: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return bounds


def installed(inside: Path) -> dict[str, str]:
    """The versions of the package's dependencies in a virtualenv."""
    names = [re.split("[<>=]", bound)[0] for bound in dependencies()]
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    told: dict[str, str] = json.loads(subprocess.check_output([str(inside), "-c", code], text=True))
    return told


def table(results: dict[str, dict[str, object]]) -> str:
    """A row a line, and below it the tests that failed."""
    rows = [
        "| line | torch | numpy | tests | failed | skipped | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    failed = []
    for line in LINES:
        if line.name not in results:
            continue
        result = results[line.name]
        if "not run" in result:
            rows.append(f"| {line.name} | not run: {result['not run']} |")
            continue
        versions, names = result["installed"], result["failed"]
        cells = [line.name, versions["torch"], versions["numpy"], result.get("tests", "?"), len(names)]
        rows.append("| " + " | ".join(map(str, [*cells, result.get("skipped", ""), result.get("seconds", "")])) + " |")
        failed += [f"{line.name}: {name}" for name in names]
    return "\n".join([*rows, *failed])


if __name__ == "__main__":
    raise SystemExit(main())
