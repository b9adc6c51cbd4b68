"""The site is whole: every page is in the navigation, every public name in the API, every figure made by its page.

`make docs` builds it strictly; this needs nothing but the files.
"""

import re
import sys
from pathlib import Path

import matplotlib.figure
import pytest

import metaflowmaps as mfm

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

from figures import draw  # noqa: E402

LEARN = sorted((DOCS / "learn").glob("*.md"))
TRAINS = "tuning"


def test_the_navigation_has_every_page_once():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    named = re.findall(r"([\w./-]+\.md)$", navigation, re.M)
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    brought = {name for name in named if name.startswith("repository/")}
    assert len(named) == len(set(named))
    assert set(named) - brought == pages, "a page of docs/ has one line under nav: of mkdocs.yml"
    files = [*ROOT.glob("examples/*.py"), *ROOT.glob("notebooks/*.ipynb"), ROOT / "CHANGELOG.md"]
    assert brought == {f"repository/{file.relative_to(ROOT).as_posix()}.md" for file in files}


def test_the_api_has_every_public_name_once():
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    named = re.findall(r"^::: mfm\.([\w.]+)$", text, re.M)
    public = {name for name in mfm.__all__ if name not in ("rewards", "pretrained")}
    public |= {f"rewards.{name}" for name in mfm.rewards.__all__} | {"pretrained.load"}
    shared = {name for name in named if name.startswith("steering.")}  # base classes whose options methods share
    assert len(named) == len(set(named))
    assert set(named) - shared == public, "a page of docs/api/ has one line a public name: ::: mfm.NAME"


def headings(page):
    """The anchors that a page's headings make."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    plain = (re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in titles)
    return {re.sub(r"[\s-]+", "-", title) for title in plain}


def test_links_to_headings_lead_somewhere():
    missing = []
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md"]:
        for path, anchor in re.findall(r"\]\(([^)#:\s]*\.md)?#([^)]+)\)", page.read_text()):
            target = page.parent / path if path else page
            if not target.exists() or anchor not in headings(target):
                missing.append(f"{page.name}: {path}#{anchor}")
    assert not missing


@pytest.mark.parametrize("page", [p for p in LEARN if p.stem != TRAINS], ids=lambda page: page.stem)
def test_a_page_to_learn_from_draws_its_figure(page, monkeypatch, tmp_path):
    """The code as it stands; what takes longest, making the PNG, is `make figures`."""
    saved = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda self, name, **options: saved.append((name, self)))
    draw(page, tmp_path)
    ((name, figure),) = saved
    assert len(figure.axes) > 1
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text())
    assert shown == [f"../images/learn/{name}"]
    assert (page.parent / shown[0]).is_file()


@pytest.mark.attack
def test_the_page_on_tuning_draws_its_figure(tmp_path):
    (made,) = draw(DOCS / "learn" / f"{TRAINS}.md", tmp_path)
    assert Path(made).stat().st_size > 10_000
