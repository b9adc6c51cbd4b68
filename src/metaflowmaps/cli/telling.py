"""What a command says when it ends: its figures in words, what was chosen for the user, what was written, what to try.

This is the one place that prints results. Counters that only a program wants (calls, bytes) are in ``--json`` and in
results.json alone.
"""

import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from metaflowmaps.cli.context import Options, Results, Tables, say
from metaflowmaps.work.durations import busy, spoken, spoken_range
from metaflowmaps.work.launch import launched

MEASURING = ("eval", "finetune", "demo", "advise", "bench")  # commands whose tables are printed
COUNTERS = {  # for programs: they stand in results.json
    *("forwards", "backwards", "reward_calls", "reward_backwards", "decodes"),
    *("peak_memory_bytes", "ess", "base_ess", "nonfinite"),
}
WORDS = {  # of figures whose name in results.json does not say enough
    "num": "samples",
    "num_draws": "draws",
    "method_title": "method",
    "reward_mean": "mean reward",
    "reward_std": "its standard deviation",
    "reward_max": "highest reward",
    "nfe": "evaluations a sample",
    "seconds": "time",
    "wall_seconds": "from start to end",
    "processor_seconds": "of the processor, imports included",
    "expected_seconds": "time that it will take",
}
CHOICES = (  # options that decide what comes out: of those that nobody typed the value is told
    *("reward", "strength", "task", "law", "method", "num_draws", "process", "steps", "t", "num", "samples", "seed"),
)
HIDDEN = ("run.json",)
MAX_NAMES = 8  # of files that are listed


def emit(results: Results | str | None, config: Options, options: Mapping[str, str], given: Collection[str]) -> None:
    """The result on stdout, for people; of several ranks, the first one's.

    Args:
        results: of the command; a text is what it prints.
        config: of the command.
        options: the option of each field.
        given: the fields that were typed.
    """
    if results is None or launched().rank:
        return
    if isinstance(results, str):
        print(results)
        if following := config.next_command({}, shlex.quote(results)):
            say(f"next: {following}")  # stdout is what was asked for, and may be piped
        return
    if str(results.get("command")).startswith(MEASURING) and not results.get("dry_run"):
        from metaflowmaps.lab.report.html import tables_of

        print_tables(tables_of(results))
    _print_columns(list(_figures({**results.get("metrics", {}), **results.get("cost", {})}, "dry_run" in results)))
    _print_columns(list(_closing(results, config, options, given)))


def emit_json(results: Results | str | None) -> None:
    """The result on stdout for programs; of several ranks, the first one's."""
    if results is not None and not launched().rank:
        print(results if isinstance(results, str) else json.dumps(results))


def _figures(figures: Mapping[str, object], every: bool) -> Iterator[tuple[str, str]]:
    """Names and values of what a person wants to know; the plan of ``--dry-run`` is told whole."""
    for name, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, int | float | str) or (name in COUNTERS and not every):
            continue
        words = WORDS.get(name, name.replace("_", " "))
        if isinstance(value, str):
            yield words, value
        elif name.startswith("expected"):
            yield words, spoken_range(value)
        elif name.endswith("seconds"):
            yield words, spoken(value)
        else:
            yield words, f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _closing(
    results: Results, config: Options, options: Mapping[str, str], given: Collection[str]
) -> Iterator[tuple[str, str]]:
    """What was chosen by default, what lies where, and the next command."""
    if chosen := _chosen(results.get("config", {}), options, given):
        yield "chosen by default", chosen
    if results.get("dry_run"):
        if "expected_seconds" in results["metrics"] and (slower := busy()):
            yield "warning", slower
        yield "nothing was run", "the same command without --dry-run runs it"
        return
    where = ""
    if "out" in results:
        folder = Path(results["out"])
        folder = folder if folder.is_dir() else folder.parent
        where = shlex.quote(str(folder))
        yield "written", f"{where}: {', '.join(_files(folder))}"
    # a worker that leaves the rest to others has no results yet
    if "command" in results and (following := config.next_command(results, where)):
        yield "next", following


def _chosen(resolved: Results, options: Mapping[str, str], given: Collection[str]) -> str:
    """The options that nobody typed, as one would type them."""
    words = []
    for name in CHOICES:
        value = resolved.get(name)
        value = value.get("name") if isinstance(value, dict) else value
        if name in options and name not in given and isinstance(value, str | int | float):
            told = f"{value:g}" if isinstance(value, float) else str(value)
            words.append(f"{options[name]} {shlex.quote(told)}")
    return " ".join(words)


def _files(folder: Path) -> list[str]:
    """What a folder holds, pictures first."""
    held = [file for file in folder.iterdir() if not file.name.startswith(".") and file.name not in HIDDEN]
    order = [".png", ".html", ".safetensors", ".npz"]
    held.sort(key=lambda file: (order.index(file.suffix) if file.suffix in order else len(order), file.name))
    names = [f"{file.name}/" if file.is_dir() else file.name for file in held]
    more = len(names) - MAX_NAMES
    return names if more <= 1 else [*names[:MAX_NAMES], f"{more} more"]


def _print_columns(rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        print(f"{name:{width}s}  {value}")


def print_tables(tables: Tables) -> None:
    """Tables as text."""
    for title, (head, rows) in tables.items():
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        print(f"\n{title}")
        for row in [head, *rows]:
            cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            print("  ".join(cells))
    if tables:
        print()
