"""``python -m benchmarks [NAME …]``: all benchmarks, or those named; ``tables [--check]``: the tables of the docs."""

import sys
from importlib import import_module

from benchmarks import BENCHMARKS, tables


def main() -> int:
    """Run them in order."""
    names = sys.argv[1:] or list(BENCHMARKS)
    if names[0] == "tables":
        return tables.main(names[1:])
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"unknown benchmark {unknown[0]!r}: allowed are {', '.join(BENCHMARKS)}, tables", file=sys.stderr)
        return 2
    for name in names:
        module, function = BENCHMARKS[name].split(":")
        getattr(import_module(f"benchmarks.{module}"), function)()
        print(tables.printed(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
