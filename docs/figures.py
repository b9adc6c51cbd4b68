"""``python docs/figures.py [PAGE …]``: the figures of the pages in learn/, drawn by the code that stands on them.

A page's code saves its figure in the folder it is run in; here that is images/learn.
"""

import contextlib
import re
import shutil
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)


def code_of(page: Path) -> str:
    """All Python of a page, as one program."""
    return "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))


def draw(page: Path, out: Path) -> list[str]:
    """Run a page's code in a folder of its own; its figures, moved to ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        exec(compile(code_of(page), str(page), "exec"), {"__name__": page.stem})
        return [shutil.copy(made, out) for made in Path(folder).glob("*.png")]


def main(names: list[str]) -> None:
    """Draw the figures of all pages, or of those named."""
    for page in sorted((DOCS / "learn").glob("*.md")):
        if not names or page.stem in names:
            for made in draw(page, DOCS / "images" / "learn"):
                print(made)


if __name__ == "__main__":
    main(sys.argv[1:])
