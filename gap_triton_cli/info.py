"""``gap-triton info``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from .console import console


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for bug reports.")] = False,
) -> None:
    """Show versions, devices and the back ends that apply."""
    from gap_triton.environment import environment

    machine = environment()
    if as_json:
        print(json.dumps(machine, indent=2))
        return
    table = Table(show_header=False, box=None)
    for package, number in machine["versions"].items():
        table.add_row(package, number or "not installed")
    for i, device in enumerate(machine["devices"]):
        table.add_row("devices" if i == 0 else "", device)
    for use, backend in machine["backends"].items():
        table.add_row(use, backend)
    console.print(table)
