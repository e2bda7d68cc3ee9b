"""The table that is printed at the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from bench.record import Row

OURS = ("triton", "reference")
"""The operator on its kernels, and on its definition in PyTorch; the table is about the first of them there is."""


@dataclass(frozen=True)
class Skip:
    """A comparison that wasn't made, and why."""

    operator: str
    case: str
    implementation: str
    reason: str


def summary(rows: Sequence[Row], device: str, on_gpu: bool) -> Table:
    """One line per operator, shape, batch and mode: our time, its floor, and how much faster than each rival it is."""
    title = f"Microbenchmarks, {device}"
    if not on_gpu:
        title += "\nNo GPU: times of the PyTorch reference on a CPU, eager only. They say nothing about the kernels."
    table = Table(title=title)
    table.add_column("operator")
    table.add_column("shape")
    for name in ("batch", "mode", "us", "p20", "p80", "launches", "floor us", "x floor"):
        table.add_column(name, justify="right" if name != "mode" else "left")
    table.add_column("times as fast as")
    groups: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    for group in groups.values():
        ours = next((row for name in OURS for row in group if row.implementation == name), None)
        if ours is None:
            continue
        table.add_row(
            ours.operator,
            ours.shape,
            str(ours.batch),
            ours.mode,
            *(f"{value:.1f}" for value in (ours.median_us, ours.p20_us, ours.p80_us)),
            "-" if ours.launches is None else f"{ours.launches:g}",
            f"{ours.floor_us:.1f}",
            f"{ours.ratio:.2f}",
            ", ".join(
                f"{row.implementation} {row.median_us / ours.median_us:.2f}"
                for row in group
                if row is not ours
            ),
        )
    return table


def skipped(skips: Sequence[Skip]) -> list[str]:
    """One line per reason, with what was skipped for it."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for skip in skips:
        reasons.setdefault((skip.implementation, skip.reason), []).append(f"{skip.operator} {skip.case}")
    return [
        f"{implementation} not timed: {reason} ({'; '.join(cases)})"
        for (implementation, reason), cases in reasons.items()
    ]
