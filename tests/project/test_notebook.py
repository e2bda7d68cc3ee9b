"""The notebook's cells run top to bottom as plain Python, and say what the text between them says.

`make docs` runs them in Jupyter's kernel besides.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "quick-start.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_runs_top_to_bottom() -> None:
    names: dict[str, Any] = {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    assert names["accuracy"]["no pruning"] > 0.95
    assert names["accuracy"]["kept"] > 0.8
    assert names["accuracy"]["compacted"] < 0.1
    assert names["picture"].stat().st_size > 10_000


def test_its_outputs_are_those_of_a_run_without_errors() -> None:
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    assert not [each for each in outputs if each["output_type"] == "error" or each.get("name") == "stderr"]
    assert sum("image/png" in each.get("data", {}) for each in outputs) == 2
    counts = [cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
