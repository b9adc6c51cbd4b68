"""One self-contained HTML page from any runs: figures first, tables second, light and dark, no network, no script.

A run is a directory with a results.json; what is said about it comes from sections.py. Figures are white pictures on a
white card in both schemes. They are made to be read down to half size: on a screen too narrow for that a figure scrolls
in its own box, as tables do in theirs, first column fixed. The page itself never scrolls sideways.
"""

import base64
import html
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from metaflowmaps._files import read_regular, write_whole
from metaflowmaps.errors import InputError
from metaflowmaps.lab.report.sections import Description, described, duration, leaves, number, tables_of
from metaflowmaps.lab.results import Results

__all__ = ["read_results", "tables_of", "write_report"]

STYLE = """
:root { color-scheme: light dark;
  --ink: #1d2126; --quiet: #545b64; --paper: #ffffff; --line: #dfe3e8; --card: #f5f6f8; --link: #0b57d0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --quiet: #a9b0ba; --paper: #14171b; --line: #333a43; --card: #1d2126; --link: #8ab4f8; }
  figure .scroll { filter: brightness(.93); } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .4rem; }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .3rem; }
p { margin: .5rem 0; } .quiet { color: var(--quiet); font-size: .9rem; } a { color: var(--link); }
nav { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; margin: 1rem 0; }
nav ol { margin: 0; padding-left: 1.3rem; } nav li { padding: .15rem 0; }
section { margin-top: 2.2rem; padding-top: 1.4rem; border-top: 1px solid var(--line); }
code, pre { font: .86em/1.5 ui-monospace, monospace; }
.command { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .45rem .7rem;
  white-space: pre-wrap; }
figure { margin: 1.2rem 0; }
figure .scroll { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .5rem; }
figure img { display: block; width: 100%; height: auto; margin: 0 auto;
  max-width: calc(var(--pixels) * .75); min-width: calc(var(--pixels) / 2 - 5rem); }
figcaption { color: var(--quiet); font-size: .9rem; margin-top: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .55rem; text-align: left; white-space: nowrap; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); padding-left: 0;
  min-width: 6.5rem; max-width: 45vw; white-space: normal; }
.number { text-align: right; } thead th { color: var(--quiet); font-weight: 600; }
details { margin: 1rem 0; } summary { color: var(--quiet); cursor: pointer; font-size: .9rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .6rem .8rem;
  max-height: 22rem; overflow: auto; white-space: pre-wrap; }
@media print { section { break-before: page; } figure, tr { break-inside: avoid; } }
"""

# nothing may be loaded and nothing run, whatever a run's results hold
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PNG_HEAD, PNG_TAIL = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


SUBJECTS = ("recipe", "task", "experiment", "law")  # what a heading says of a run besides its command


@dataclass(frozen=True)
class Run:
    """A run's directory, what it holds, and what is said of it."""

    directory: Path
    results: Results
    said: Description

    @classmethod
    def read(cls, directory: Path) -> "Run":
        """The run; refused by its file's name where it cannot be shown."""
        results = read_results(directory)
        try:
            return cls(directory, results, described(results))
        except InputError as error:
            raise _damaged(directory / "results.json", error) from None

    @property
    def title(self) -> str:
        """What was done, on what."""
        config = self.results.config
        subject = next((config[key] for key in SUBJECTS if isinstance(config.get(key), str)), None)
        return f"{self.said.title}: {subject}" if subject else self.said.title

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
    contents = "".join(f"<li><a href=#{anchor}>{_text(title)}</a></li>" for anchor, title in links)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Meta Flow Maps report</title><style>{STYLE}</style></head><body>"
        "<header><h1>Meta Flow Maps</h1>"
        '<p class="quiet">A meta flow map draws clean data from p(x₁ | x<sub>t</sub>) in one network call, '
        "for any noisy state x<sub>t</sub> at any time t.</p></header>"
        + (f'<nav aria-label="Contents"><ol>{contents}</ol></nav>' if len(titles) > 1 else "")
        + f"<main>{''.join(sections)}</main></body></html>\n"
    )
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
        document = json.loads(read_regular(file))
        schema = document["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(file, error) from None
    if schema != 1:
        raise InputError(f"{file} has schema {schema}, this version reads 1: update metaflowmaps")
    try:
        return Results.of(document)
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
    parts = [
        f'<section id="{anchor}"><h2>{_text(title)}</h2>',
        f"<p>{_text(said.summary)}</p>" if said.summary else "",
        f'<p class="command"><code>{_text(results.invocation or "mfm " + results.command)}</code></p>',
        f'<p class="quiet">{_text(where[:1].upper() + where[1:])}</p>' if where else "",
        *(_figure(picture, title, said.captions.get(picture.name, "")) for picture in run.pictures),
        *(_table(name, *table) for name, table in said.tables.items()),
        _details(results),
    ]
    return "".join(parts) + "</section>"


def _figure(picture: Path, title: str, caption: str) -> str:
    data = read_regular(picture)
    if not (data.startswith(PNG_HEAD) and data.endswith(PNG_TAIL)):
        raise _damaged(picture, "not a whole PNG")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))  # of the header chunk, always first
    words = re.sub(r"[-_]+", " ", picture.stem)
    shown = caption or f"{words[:1].upper()}{words[1:]}."
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="{_text(words)}">'
        f'<img alt="{_text(words)} ({_text(title)})" width="{width}" height="{height}" style="--pixels: {width}px" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></div>'
        f"<figcaption>{_text(shown)}</figcaption></figure>"
    )


def _table(name: str, head: list[str], rows: list[list[str]]) -> str:
    columns = zip(*rows, strict=True) if rows else [()] * len(head)
    kinds = [' class="number"' if i and _numeric(column) else "" for i, column in enumerate(columns)]
    top = "".join(f'<th scope="col"{kind}>{_text(cell)}</th>' for cell, kind in zip(head, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{_text(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<h3>{_text(name)}</h3><div class="scroll" tabindex="0" role="region" aria-label="{_text(name)}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _numeric(column: tuple[str, ...]) -> bool:
    """Whether a column is set as numbers: most of its cells begin with a digit or a sign."""
    filled = [cell for cell in column if cell not in ("", "–")]
    return 2 * sum(bool(re.match(r"[-−+±<>≤≥ ]*(\d|nan|inf)", cell)) for cell in filled) > len(filled)


def _details(results: Results) -> str:
    """Costs, environment and resolved settings, folded away."""
    held = {"Cost": results.cost, "Environment": results.environment}
    rows = {name: [[what, number(value)] for what, value in leaves(part)] for name, part in held.items()}
    settings = re.sub(  # a list of numbers stays on one line
        r"\[[^\[\]{}\"]*\]", lambda m: re.sub(r"\s+", " ", m[0]), json.dumps(results.config, indent=1)
    )
    return (
        "<details><summary>Cost, environment and settings</summary>"
        + "".join(_table(name, ["what", "value"], table) for name, table in rows.items() if table)
        + f'<h3>Settings</h3><pre tabindex="0" role="region" aria-label="Settings">{_text(settings)}</pre></details>'
    )


def _text(value: object) -> str:
    return html.escape(str(value))
