"""Join runs into one self-contained HTML page."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from metaflowmaps.cli.context import Argument, Context, Options, Results
from metaflowmaps.lab.report.html import write_report


class Report(Options):
    """Which runs, and where to."""

    shared = ()

    runs: Annotated[tuple[Path, ...], Argument("RUN...")] = Field(
        description="Results of commands, or directories of such."
    )
    out: Path = Field(Path("report.html"), description="The page: a file, or a directory for report.html.")

    def next_command(self, results: Results, folder: str) -> str:
        """It is looked at in a browser."""
        return f"open {folder} in a browser"


def run(config: Report, context: Context) -> str:
    """The page's path."""
    out = config.out
    return str(write_report(list(config.runs), out / "report.html" if out.is_dir() else out))
