"""The training log: one JSON object a line, and its picture."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def append(log: Path, row: Row) -> None:
    """Add one row to a log."""
    with log.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(log: Path) -> list[Row]:
    """Read all rows of a log."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def plot(log: Path, picture: Path) -> None:
    """Draw loss and accuracy over the steps of a log into a PNG file."""
    # Imported here: a figure is the only thing in training that needs matplotlib.
    from matplotlib.figure import Figure

    rows = read(log)
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    loss = figure.subplots()
    accuracy = loss.twinx()
    loss.plot(steps, [row["loss"] for row in rows], color="tab:blue", linewidth=1)
    accuracy.plot(steps, [row["accuracy"] for row in rows], color="tab:orange", linewidth=1)
    loss.set(xlabel="step", yscale="log")
    loss.set_ylabel("loss (cross-entropy)", color="tab:blue")
    accuracy.set(ylim=(0, 1))
    accuracy.set_ylabel("accuracy", color="tab:orange")
    for before, after in pairwise([{"stage": None}, *rows]):
        if after["stage"] != before["stage"]:
            accuracy.axvline(after["step"], color="grey", linewidth=0.8, linestyle=":")
            accuracy.text(after["step"], 0.02, f" {after['stage']}", rotation=90, fontsize="small")
    loss.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120, metadata={"Software": None})
