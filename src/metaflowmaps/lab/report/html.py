"""One self-contained HTML page from any runs: pictures first, one small table, all else folded away; no network.

A run is a directory with a results.json; what is said about it comes from sections.py, and a story that a reader can
turn (lab/story.py) from story.py. Figures are white pictures on a white card in light and in dark. They are made to be
read down to half size: on a screen too narrow for that a figure scrolls in its own box, as wide tables do in theirs,
first column fixed. The page itself never scrolls sideways. It has a script only where there is a story, and loses
nothing without it.
"""

import base64
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from metaflowmaps._files import read_regular, write_whole
from metaflowmaps.errors import InputError
from metaflowmaps.lab.report.glossary import glossary
from metaflowmaps.lab.report.page import asset, document, escaped
from metaflowmaps.lab.report.sections import Description, described, duration, leaves, number, tables_of
from metaflowmaps.lab.report.story import story_cards
from metaflowmaps.lab.results import Results
from metaflowmaps.lab.story import Story, read_story

__all__ = ["read_results", "tables_of", "write_report"]

PNG_HEAD, PNG_TAIL = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


MOST_COLUMNS = 5  # of a table that is shown: more do not fit a phone, and unfold
SUBJECTS = ("recipe", "task", "experiment", "law")  # what a heading says of a run besides its command


@dataclass(frozen=True)
class Run:
    """A run's directory, what it holds, and what is said of it."""

    directory: Path
    results: Results
    said: Description
    story: tuple[Story, dict[str, Tensor]] | None

    @classmethod
    def read(cls, directory: Path) -> "Run":
        """The run; refused by its file's name where it cannot be shown."""
        results = read_results(directory)
        try:
            return cls(directory, results, described(results), read_story(results.metrics, directory))
        except InputError as error:
            raise _damaged(directory / "results.json", error) from None

    @property
    def title(self) -> str:
        """What was done, on what."""
        config = self.results.config
        subject = next((str(config[key]) for key in SUBJECTS if isinstance(config.get(key), str)), "")
        known = subject in self.results.command  # "eval posterior" of the task posterior
        return self.said.title if known else f"{self.said.title}: {subject}"

    @property
    def methods(self) -> Iterator[str]:
        """The names of methods that it speaks of."""
        for steered in self.story[0].steered if self.story else ():
            yield from (method.method for method in steered.methods)
        by_name, chosen = self.results.metrics.get("methods"), self.results.config.get("method")
        yield from by_name if isinstance(by_name, dict) else ()
        if isinstance(chosen, dict):
            yield str(chosen.get("name"))

    @property
    def pictures(self) -> list[Path]:
        """In the order of their captions, and then by name."""
        order = list(self.said.captions)
        place = {name: i for i, name in enumerate(order)}
        return sorted(self.directory.glob("*.png"), key=lambda p: (place.get(p.name, len(order)), p.name))


def write_report(runs: list[Path], out: Path) -> Path:
    """Join the runs' results, figures and tables into ``out``, whole or not at all; directories of runs are opened."""
    found = {directory.resolve(): directory for run in runs for directory in _runs_in(run)}
    shown = [Run.read(directory) for directory in found.values()]
    titles = _titles(shown)
    anchors = [f"section-{i}" for i, _ in enumerate(shown, 1)]
    sections = [_section(*parts) for parts in zip(shown, titles, anchors, strict=True)]
    # unquoted, so that no quoted address in the page is other than data: one search shows that it loads nothing
    links = zip(anchors, titles, strict=True)
    contents = "".join(f"<li><a href=#{anchor}>{escaped(title)}</a></li>" for anchor, title in links)
    main = "".join(sections)
    body = (
        "<header><h1>Meta Flow Maps</h1>"
        '<p class="quiet">A meta flow map draws clean data from p(x₁ | x<sub>t</sub>) in one network call, '
        "for any noisy state x<sub>t</sub> at any time t.</p></header>"
        + (f'<nav aria-label="Contents"><ol>{contents}</ol></nav>' if len(titles) > 1 else "")
        + f"<main>{main}</main>{glossary(main, (name for run in shown for name in run.methods))}"
    )
    script = asset("page.js") if any(run.story for run in shown) else ""
    page = document("Meta Flow Maps report", body, asset("page.css"), script)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, page.encode())
    except OSError as error:
        raise InputError(f"cannot write --out {out}: {error.strerror}; choose another file") from error
    return out


def _runs_in(place: Path) -> list[Path]:
    """The run itself, or the runs one level below; a run below that has no results yet is not there."""
    if (place / "results.json").is_file() or not place.is_dir():
        return [place]
    return sorted(file.parent for file in place.glob("*/results.json")) or [place]


def read_results(run: Path) -> Results:
    """results.json of a run's directory."""
    file = run / "results.json"
    if not file.is_file():
        raise InputError(
            f"{file} does not exist: give the --out directory of a finished command, or one that holds some"
        )
    try:
        held = json.loads(read_regular(file))
        schema = held["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file, error) from None
    if schema != 1:
        raise InputError(f"{file} has schema {schema}, this version reads 1: update metaflowmaps")
    try:
        return Results.of(held)
    except InputError as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, why: object) -> InputError:
    said = " ".join(str(why).split())
    return InputError(f"{file} is damaged ({said}): move {file.parent} away and run its command again")


def _titles(runs: list[Run]) -> list[str]:
    """Of each run; with its directory where two would read the same."""
    count = Counter(run.title for run in runs)
    return [f"{run.title} ({run.directory})" if count[run.title] > 1 else run.title for run in runs]


def _section(run: Run, title: str, anchor: str) -> str:
    results, said = run.results, run.said
    seconds, device = results.cost.get("seconds"), results.environment.get("device")
    took = f"took {duration(seconds)}" if isinstance(seconds, int | float) else ""
    where = ", ".join(part for part in (took, f"on {device}" if device else "") if part)
    typed, figures = results.invocation or "mfm " + results.command, _figures(run, title)
    return (
        f'<section id="{anchor}"><h2>{escaped(title)}</h2>'
        + (f"<p>{escaped(said.summary)}</p>" if said.summary and not run.story else "")
        + (story_cards(*run.story) + _folded("The same as pictures to share", figures) if run.story else figures)
        + "".join(_table(name, *table) for name, table in said.brief.items())
        + "".join(_unfolding(name, *table, told=run.story is not None) for name, table in said.tables.items())
        + _folded("Command, cost, environment and settings", _details(results, typed, where))
        + "</section>"
    )


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escaped(title)}</summary>{body}</details>" if body else ""


def _unfolding(name: str, head: list[str], rows: list[list[str]], told: bool) -> str:
    """A table: folded where a story has told it, or where it does not fit a phone."""
    table = _table(name, head, rows)
    return _folded(name, table) if told or len(head) > MOST_COLUMNS else table


def _figures(run: Run, title: str) -> str:
    return "".join(_figure(picture, title, run.said.captions.get(picture.name, "")) for picture in run.pictures)


def _figure(picture: Path, title: str, caption: str) -> str:
    data = read_regular(picture)
    if not (data.startswith(PNG_HEAD) and data.endswith(PNG_TAIL)):
        raise _damaged(picture, "not a whole PNG")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))  # of the header chunk, always first
    words = re.sub(r"[-_]+", " ", picture.stem)
    shown = caption or f"{words[:1].upper()}{words[1:]}."
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{escaped(words)}">'
        f'<img alt="{escaped(words)} ({escaped(title)})" width="{width}" height="{height}" style="--pixels: {width}px" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></div>'
        f"<figcaption>{escaped(shown)}</figcaption></figure>"
    )


def _table(name: str, head: list[str], rows: list[list[str]]) -> str:
    columns = zip(*rows, strict=True) if rows else [()] * len(head)
    kinds = [' class="number"' if i and _numeric(column) else "" for i, column in enumerate(columns)]
    top = "".join(f'<th scope="col"{kind}>{escaped(cell)}</th>' for cell, kind in zip(head, kinds, strict=True))
    small = " small" if len(head) <= MOST_COLUMNS else ""
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escaped(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<h3>{escaped(name)}</h3><div class="scroll{small}" tabindex="0" role="region" aria-label="{escaped(name)}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _numeric(column: tuple[str, ...]) -> bool:
    """Whether a column is set as numbers: most of its cells begin with a digit or a sign."""
    filled = [cell for cell in column if cell not in ("", "–")]
    return 2 * sum(bool(re.match(r"[-−+±<>≤≥ ]*(\d|nan|inf)", cell)) for cell in filled) > len(filled)


def _details(results: Results, typed: str, where: str) -> str:
    """The command, what it cost, where it ran and its settings, resolved."""
    held = {"Cost": results.cost, "Environment": results.environment}
    rows = {name: [[what, number(value)] for what, value in leaves(part)] for name, part in held.items()}
    settings = re.sub(  # a list of numbers stays on one line
        r"\[[^\[\]{}\"]*\]", lambda m: re.sub(r"\s+", " ", m[0]), json.dumps(results.config, indent=1)
    )
    return (
        f'<p class="command"><code>{escaped(typed)}</code></p>'
        + (f'<p class="quiet">{escaped(where[:1].upper() + where[1:])}</p>' if where else "")
        + "".join(_table(name, ["what", "value"], table) for name, table in rows.items() if table)
        + f'<h3>Settings</h3><pre tabindex="0" role="region" aria-label="Settings">{escaped(settings)}</pre>'
    )
