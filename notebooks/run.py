"""``python notebooks/run.py [NAME …]``: run the notebooks in a kernel, and store what they show (`make notebooks`).

Stored are outputs alone, without times, versions or folders of the machine: what is run again changes where something
has changed.
"""

import re
import sys
from pathlib import Path

import nbclient
import nbformat

HERE = Path(__file__).resolve().parent
CELL_FILE = re.compile(r"\S*/ipykernel_\d+/\d+\.py:\d+: ")  # what a warning calls the cell that it comes from


def run(path: Path) -> None:
    """Execute every cell, in order, in a fresh kernel."""
    notebook = nbformat.read(path, as_version=4)
    here = {"metadata": {"path": HERE}}
    nbclient.NotebookClient(notebook, timeout=600, record_timing=False, resources=here).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = CELL_FILE.sub("", output.text)
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in sorted(HERE.glob("*.ipynb")):
        if len(sys.argv) == 1 or path.stem in sys.argv[1:]:
            run(path)
            print(path.name)
