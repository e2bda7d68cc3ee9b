"""Rows of measurements, and the one CSV file that they are added to."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench import ROOT

CSV = ROOT / "bench" / "results" / "microbenchmarks.csv"


@dataclass(frozen=True)
class Machine:
    """Where and with what a row was measured. ``"unknown"`` and ``"-"`` (has none) are said rather than left out."""

    date: str
    commit: str
    device: str
    driver: str
    cpu: str
    torch: str
    triton: str
    gap_triton: str


@dataclass(frozen=True)
class Row:
    """One way to compute one result, timed in one mode.

    Attributes:
        operator: Which result, such as ``"visual_importance, text rows"``.
        shape: Name in `bench.shapes`.
        batch: B.
        dtype: Of the model's tensors.
        implementation: ``"triton"``, ``"reference"``, or a rival.
        mode: ``"eager"`` or ``"graph"``.
        median_us: Median time per call, microseconds.
        p20_us: 20 percent of the rounds took less.
        p80_us: 80 percent did.
        bytes: What the operator can't avoid moving, see `bench.floor`; the same for every implementation.
        flops: Operations that it can't avoid, likewise.
        launches: Kernels, copies and fills on the device per call; None where nothing counts them.
        floor_us: The least time, from bytes, flops and what this machine was measured to do.
        ratio: Median over floor.
    """

    operator: str
    shape: str
    batch: int
    dtype: str
    implementation: str
    mode: str
    median_us: float
    p20_us: float
    p80_us: float
    bytes: int
    flops: int
    launches: float | None
    floor_us: float
    ratio: float

    @property
    def group(self) -> tuple[str, str, int, str]:
        """What rows have in common that can be compared with each other."""
        return self.operator, self.shape, self.batch, self.mode


COLUMNS = [field.name for kind in (Machine, Row) for field in fields(kind)]


def append(path: Path, where: Machine, row: Row) -> None:
    """Add a row to a CSV file, which is begun with its header.

    Raises:
        ValueError: if the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.exists() and path.stat().st_size > 0
    if begun:
        with path.open(encoding="utf-8", newline="") as file:
            found = next(csv.reader(file))
        if found != COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}, got {', '.join(found)}")
    values = {**asdict(where), **asdict(row)}
    written = {name: _written(value) for name, value in values.items()}
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not begun:
            writer.writeheader()
        writer.writerow(written)


def _written(value: object) -> object:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else value


def read(path: Path) -> list[Row]:
    """The rows of a CSV file, without where they were measured; none if there is no such file."""
    if not path.exists():
        return []
    integers, texts = ("batch", "bytes", "flops"), ("operator", "shape", "dtype", "implementation", "mode")

    def value(name: str, text: str) -> object:
        if name in texts:
            return text
        return int(text) if name in integers else None if text == "-" else float(text)

    names = [field.name for field in fields(Row)]
    with path.open(encoding="utf-8", newline="") as file:
        return [Row(**{name: value(name, line[name]) for name in names}) for line in csv.DictReader(file)]  # type: ignore[arg-type]
