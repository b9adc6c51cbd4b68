"""Where a result is from: the commit it was measured at, the source files it measures, and whether these changed since.

The files that a benchmark measures are those that its module imports, directly or not. What only shows figures is left
out. What hands them on (the command line, processes, files) is left out too, but for what it imports. A file has
changed where its statements have: comments, docstrings and line breaks move no figure.
"""

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import BENCHMARKS

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SHOWN = (
    "src/metaflowmaps/lab/figures/", "src/metaflowmaps/lab/report/", "src/metaflowmaps/lab/results.py",
    "benchmarks/benchmark_figures.py", "benchmarks/control_report.py", "benchmarks/__init__.py",
    "benchmarks/provenance.py",
)  # fmt: skip
HANDED_ON = (
    "src/metaflowmaps/cli/",
    "src/metaflowmaps/work/",
    "src/metaflowmaps/_files.py",
    "src/metaflowmaps/errors.py",
)


def git(*arguments: str) -> str | None:
    """What git says in this checkout; None without git, without a checkout, or where git refuses."""
    try:
        asked = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def commit_now() -> dict[str, Any]:
    """The commit of this checkout, and whether its code differs from it; kept in every result file."""
    changed = git("status", "--porcelain", "--", "src", "benchmarks/*.py")
    return {"commit": git("rev-parse", "--short=12", "HEAD"), "uncommitted_changes": bool(changed)}


def commits_of(result: dict[str, Any]) -> list[str]:
    """The commits a result file was measured at: one for each part that names its own, else the file's."""
    whole = result.get("commit") or result.get("environment", {}).get("commit")
    parts = [part.get("commit") or whole for part in (result.get("parts") or result.get("problems") or {}).values()]
    return sorted({commit for commit in parts or [whole] if commit})


def benchmark_of(result: dict[str, Any]) -> str:
    """The benchmark that wrote a result file. The evaluations that ``images`` collects name their own command."""
    words = str(result.get("invocation") or result.get("command")).split()
    return words[3] if words[:3] == ["python", "-m", "benchmarks"] else "images"


@cache
def measured_files(benchmark: str) -> frozenset[str]:
    """The source files that the figures of a benchmark depend on, relative to the checkout."""
    waiting, seen = [ROOT / "benchmarks" / f"{BENCHMARKS[benchmark].split(':')[0]}.py"], set()
    while waiting:
        file = waiting.pop()
        if file not in seen and not _name(file).startswith(SHOWN):
            seen.add(file)
            waiting.extend(_imported(file))
    return frozenset(name for name in map(_name, seen) if not name.startswith(HANDED_ON))


def _name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def _imported(file: Path) -> list[Path]:
    """The files of this project that a file imports, anywhere in it."""
    found = []
    for node in _nested(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [name.name for name in node.names if name.name != "__version__"]  # which is no code to measure
            found += [_file(f"{node.module}.{name}") or _file(node.module) for name in names]
        elif isinstance(node, ast.Import):
            found += [_file(name.name) for name in node.names]
    return [path for path in found if path]


@cache
def _file(module: str) -> Path | None:
    base = (ROOT if module.split(".")[0] == "benchmarks" else ROOT / "src").joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@cache
def _changed_since(commit: str) -> dict[str, str] | None:
    """Each file that differs from a commit, with what git calls its contents there; None where that is not known."""
    lines = git("diff", "--raw", "--no-abbrev", "--no-renames", commit, "--")
    return None if lines is None else {line.split("\t")[1]: line.split()[2] for line in lines.splitlines()}


@cache
def _says_other(contents: str, file: str) -> bool:
    """Whether the statements of a file differ from those of its earlier contents; so they do where it was not there.

    Most commits share the contents of most files, which are then compared once.
    """
    before, now = git("cat-file", "blob", contents), _statements_now(file)
    return before is None or now is None or _statements(before) != now


@cache
def _statements_now(file: str) -> str | None:
    path = ROOT / file
    return _statements(path.read_text(encoding="utf-8")) if path.is_file() else None


def _statements(source: str) -> str:
    """A file's code without docstrings and layout."""
    tree = ast.parse(source)
    for node in _nested(tree):
        if hasattr(node, "body"):
            node.body = [line for line in node.body if not _is_text(line)]
    return ast.dump(tree)


def _nested(tree: ast.Module) -> Iterator[ast.AST]:
    """A module and its statements at any depth, without their expressions: most of a tree, and slow to walk."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            waiting.extend(getattr(node, block, ()))


def _is_text(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def stale(name: str, result: dict[str, Any]) -> list[str]:
    """One line for each commit of a result file that the code it measures has moved on from."""
    lines, benchmark = [], benchmark_of(result)
    for commit in commits_of(result):
        changed = _changed_since(commit)
        if changed is None:
            lines.append(f"{name}: made at {commit}, which this checkout does not hold")
        elif since := sorted(f for f in changed.keys() & measured_files(benchmark) if _says_other(changed[f], f)):
            what = f"older than its code: {len(since)} files differ from {commit} ({since[-1]} …)"
            lines.append(f"{name}: {what}; python -m benchmarks {benchmark}")
    return lines if commits_of(result) else [f"{name}: names no commit"]
