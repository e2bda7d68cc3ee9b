"""``gap-triton demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import console
from .refuse import told_as_option


def demo(
    output: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for pictures and results.json; made if missing.")
    ] = Path("demo-output"),
    samples: Annotated[int, typer.Option(min=1, help="Held-out scenes to ask about.")] = 2048,
) -> None:
    """Prune the embedded model with and without GAP: a table, two pictures and results.json.

    The model was trained for this project to answer "where is the red triangle?" with a box. No pruning is compared with
    keeping 50, 25 and 12.5 % of the visual tokens, each with the survivors' own position ids (GAP), with compacted ids
    and with permuted ids.
    """
    from gap_triton.demo.run import run_demo

    with told_as_option("--output"):
        output.mkdir(parents=True, exist_ok=True)
    run_demo(output, samples, console)
