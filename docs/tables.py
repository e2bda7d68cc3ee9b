"""Writes the measured tables into the documents: ``python docs/tables.py`` after new results were put in docs/results/.

A document marks the place with ``<!-- table: docs/results/NAME.json -->`` and ``<!-- end of table -->``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from gap_triton.demo.run import markdown_of
from gap_triton.demo.table import Row

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/layers.md")

PLACE = re.compile(r"(<!-- table: (?P<file>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def with_tables(text: str, folder: Path) -> str:
    """``text`` of a document in ``folder`` with every marked table made anew from its results file."""

    def table(match: re.Match[str]) -> str:
        results = json.loads((ROOT / match["file"]).read_text(encoding="utf-8"))
        rows = [Row(**row) for row in results["rows"]]
        versions = results["versions"]
        link = (ROOT / match["file"]).relative_to(folder).as_posix()
        source = (
            f"*{results['samples']} held-out scenes; {results['device']}; torch {versions['torch']}, "
            f"transformers {versions['transformers']}; [{Path(match['file']).name}]({link}).*"
        )
        return f"{match[1]}{markdown_of(rows)}\n{source}\n{match[3]}"

    return PLACE.sub(table, text)


if __name__ == "__main__":
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8"), path.parent), encoding="utf-8")
        print(f"wrote {name}")
