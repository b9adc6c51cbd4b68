"""``python notebooks/run.py [NAME …]``: run the notebooks in a kernel, and store what they show (`make notebooks`).

Stored are outputs alone: no execution times and no kernel's version, so that running again changes what has changed.
"""

import sys
from pathlib import Path

import nbclient
import nbformat

HERE = Path(__file__).resolve().parent


def run(path: Path) -> None:
    """Execute every cell, in order, in a fresh kernel."""
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": HERE}}).execute()
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.ipynb")):
        if len(sys.argv) == 1 or path.stem in sys.argv[1:]:
            run(path)
            print(path.name)
