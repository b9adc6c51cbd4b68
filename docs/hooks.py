"""What `make docs` does besides building pages: it brings files that lie outside docs/, and finds the public names.

- A link out of docs/ (``../examples/chain.py``) becomes one to a page of the site: code and notebooks as pages, folders
  as lists, pictures as they are.
- ``::: mfm.NAME`` documents the public name, wherever it is defined.
"""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

import metaflowmaps as mfm
from metaflowmaps.work.choices import Choice

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?P<path>(?:\.\./)[^)#\s]+)(?P<anchor>#[^)]*)?\)")
NAME = re.compile(r"^::: mfm\.(?P<name>[\w.]+)$", re.M)
ROLE = re.compile(r":(?:class|meth|mod|func):(?=<code>)")
ALWAYS = ("examples/*.py", "notebooks/*.ipynb", "CHANGELOG.md")  # which the navigation lists


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside docs/ and is linked to, or that the navigation lists."""
    docs = Path(config.docs_dir)
    wanted = {path for names in ALWAYS for path in ROOT.glob(names)}
    for page in docs.rglob("*.md"):
        links = LINK.finditer(page.read_text(encoding="utf-8"))
        wanted |= {path for link in links if (path := outside(page, link["path"])) is not None}
    for path in sorted(wanted):
        files.append(brought(path, config))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links out of docs/ and public names, as the site has them."""
    here = Path(page.file.src_uri).parent
    up = "../" * len(here.parts)

    def link(found: re.Match[str]) -> str:
        path = outside(Path(config.docs_dir) / page.file.src_uri, found["path"])
        return found[0] if path is None else f"]({up}{uri(path)}{found['anchor'] or ''})"

    def public(found: re.Match[str]) -> str:
        lines = [f"::: {canonical(found['name'])}", "    options:", f"      heading: mfm.{found['name']}"]
        if is_choice(named(found["name"])):
            lines.append("      members: false")  # its options are its fields; what it does is the family's affair
        return "\n".join(lines)

    return NAME.sub(public, LINK.sub(link, markdown))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Roles of docstrings are the names they stand before."""
    return ROLE.sub("", html)


def outside(page: Path, link: str) -> Path | None:
    """The file or folder of the repository that a link of a page leads to, where that is not in docs/."""
    path = (page.parent / link).resolve()
    return path if path.exists() and not path.is_relative_to(ROOT / "docs") else None


def uri(path: Path) -> str:
    """Where the site has a file of the repository: those that are not pictures are pages."""
    inside = path.relative_to(ROOT).as_posix()
    return f"repository/{inside}" if path.suffix == ".png" else f"repository/{inside}.md"


def brought(path: Path, config: Any) -> File:
    """A picture as it is, or a page made of a folder, a notebook, or a file of text."""
    if path.suffix == ".png":
        return File.generated(config, uri(path), abs_src_path=str(path))
    return File.generated(config, uri(path), content=page_of(path))


def page_of(path: Path) -> str:
    """Markdown that shows a file or a folder."""
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.is_file())
        return "\n".join([f"# {path.relative_to(ROOT)}/", "", *(f"- `{name}`" for name in names)])
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8").replace("](docs/", "](../")
    if path.suffix == ".ipynb":
        return notebook(path)
    return f"# {path.name}\n\n```{path.suffix[1:]}\n{path.read_text(encoding='utf-8')}```\n"


def notebook(path: Path) -> str:
    """Cells in turn, with the text and the pictures that were stored with them."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"]).replace(".ipynb)", ".ipynb.md)")
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            parts.append(shown(output))
    parts.append(f"*This page is `{path.relative_to(ROOT)}` of the repository.*")
    return "\n\n".join(part for part in parts if part)


def shown(output: dict[str, Any]) -> str:
    """An output of a cell."""
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="what the cell shows" src="data:image/png;base64,{picture}">'
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def named(name: str) -> Any:
    """What a public name stands for."""
    thing: Any = mfm
    for part in name.split("."):
        thing = getattr(thing, part)
    return thing


def is_choice(thing: Any) -> bool:
    """Whether it is a method or a process, whose methods are called by `steer` alone."""
    return isinstance(thing, type) and issubclass(thing, Choice)


def canonical(name: str) -> str:
    """Where a public name is defined: ``steer`` is ``metaflowmaps.steering.steer.steer``."""
    thing = named(name)
    if hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    return getattr(thing, "__name__", f"metaflowmaps.steering.presets.{name}")
