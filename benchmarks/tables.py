"""``python -m benchmarks tables [--check]``: the tables of README and docs, made of the files in ``results/``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. ``tables`` writes it there. ``--check`` fails
where text and file differ or a file is missing, and warns of results older than the code that they measure.
Nothing here imports torch.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import provenance
from benchmarks.table_rows import TABLES, Rows

MARK = re.compile(r"(?P<open><!-- table: (?P<name>[\w-]+) -->\n)(?P<text>.*?)(?P<close><!-- end -->)", re.DOTALL)


def markdown(rows: Rows) -> str:
    """A head and rows as a table."""
    head, *below = rows
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (head, ["---"] * len(head), *below))


def read(file: Path) -> dict[str, Any]:
    """A result file."""
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def printed(benchmark: str) -> str:
    """All tables of one benchmark, by name."""
    kept = ((name, table, read(provenance.RESULTS / table.file)) for name, table in TABLES.items())
    made = ((name, table.rows(result)) for name, table, result in kept if provenance.benchmark_of(result) == benchmark)
    return "\n".join(f"{name}\n\n{markdown(rows)}" for name, rows in made)


def filled(text: str, results: Path) -> tuple[str, list[str]]:
    """A page with its tables as the result files have them, and what is wrong with those that cannot be made."""
    wrong = []

    def made(mark: re.Match[str]) -> str:
        name = mark["name"]
        table = TABLES.get(name)
        if table is None or not (results / table.file).is_file():
            wrong.append(f"table {name}: " + ("nothing makes it" if table is None else f"{table.file} is missing"))
            return mark[0]
        return (
            mark["open"] + markdown(table.rows(json.loads((results / table.file).read_text("utf-8")))) + mark["close"]
        )

    return MARK.sub(made, text), wrong


def main(arguments: list[str], root: Path = provenance.ROOT) -> int:
    """Write the tables, or with ``--check`` compare them; 1 where something is wrong."""
    if arguments not in ([], ["--check"]):
        print(f"tables takes --check or nothing, not {' '.join(arguments)}", file=sys.stderr)
        return 2
    check, results, wrong = bool(arguments), root / "benchmarks" / "results", []
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        new, faults = filled(text, results)
        pairs = zip(MARK.finditer(text), MARK.finditer(new), strict=True)
        differing = [f"table {old['name']}: not what its file says" for old, now in pairs if old["text"] != now["text"]]
        wrong += [f"{page.relative_to(root)}: {fault}" for fault in (*faults, *(differing if check else ()))]
        if differing and not check:
            page.write_text(new, encoding="utf-8")
    if check:
        warn(results)
    for line in wrong:
        print(line, file=sys.stderr)
    if check and wrong:
        print("python -m benchmarks tables writes them anew", file=sys.stderr)
    return 1 if wrong else 0


def warn(results: Path) -> None:
    """Name results that are older than the code that they measure. No error: code has to be able to change."""
    if provenance.git("rev-parse", "HEAD") is None:
        print("no git checkout: whether results are older than their code was not looked at", file=sys.stderr)
        return
    for file in sorted(results.rglob("*.json")):
        for line in provenance.stale(file.relative_to(results).as_posix(), read(file)):
            print(f"warning: {line}", file=sys.stderr)
