"""``gap-triton methods``."""

from __future__ import annotations

import inspect
import json
from typing import Annotated

import typer
from rich.table import Table

from .console import console


def methods(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the published methods that --method takes, with what each keeps and its default budget."""
    from gap_triton.presets import PRESETS

    found = []
    for name, configure in PRESETS.items():
        module = inspect.getmodule(configure)
        found.append(
            {
                "method": name,
                "keeps": first_paragraph(configure),
                "budget": inspect.signature(configure).parameters["budget"].default,
                "source": first_paragraph(module).rstrip("."),
            }
        )
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("budget", no_wrap=True)
    table.add_column("what is kept, and source")
    for each in found:
        table.add_row(each["method"], str(each["budget"]), f"{each['keeps']} [dim]{each['source']}.[/dim]")
    console.print(table)


def first_paragraph(documented: object) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())
