"""Run the notebook of the documents top to bottom, as Jupyter does; with ``--save`` its outputs go into it.

python tests/scripts/notebook.py [--save]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "quick-start.ipynb"


def main() -> None:
    """Read the command line and run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="write the outputs into the notebook")
    save = parser.parse_args().save
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2, f"expected the scene and the overlay, got {len(pictures)} pictures"
    if save:
        for cell in notebook.cells:  # the bars of transformers' loading are of no use to a reader
            if "outputs" in cell:
                cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
                for each in cell.outputs:
                    each.get("data", {}).pop("image/jpeg", None)  # the picture is there as PNG too
        nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.name}: {len(notebook.cells)} cells ran, {len(pictures)} pictures")


if __name__ == "__main__":
    main()
