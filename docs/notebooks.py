"""Run the tutorials, each in a folder of its own that is then removed, and save them with their output.

Run: python docs/notebooks.py [NAME ...]
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "tutorials"


def main(names: list[str]) -> None:
    os.environ["TTY_COMPATIBLE"] = "0"  # the progress bar of a terminal is no output
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as work:
            resources = {"metadata": {"path": work}}
            NotebookClient(notebook, timeout=1200, coalesce_streams=True, resources=resources).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # when each line ran
        nbformat.write(notebook, path)
        print(path)


if __name__ == "__main__":
    main(sys.argv[1:])
