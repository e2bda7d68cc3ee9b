"""The picture of single questions: where pruning hurts most, and where ids save most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")  # writes files; needs no screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from PIL import Image

from ..demo.pictures import COLOURS, DPI, draw_box
from .boxes import Box
from .question import Question
from .records import Record
from .ways import Way

SHOWN = 4  # of each
COLUMN = 2.7  # inches
UNPRUNED, KEPT, COMPACTED, TRUTH = "unpruned", "ids kept (GAP)", "ids compacted", "true box"
Line = Literal["-", "--"]
STYLES: dict[str, tuple[str, Line, float]] = {
    UNPRUNED: ("#CC79A7", "-", 1.6),
    COMPACTED: (COLOURS["compacted"], "-", 1.8),
    KEPT: (COLOURS["kept"], "-", 2.6),
    TRUTH: ("#FFFFFF", "--", 1.4),
}
OTHER_IDS: tuple[str, Line, float] = (COLOURS["permuted"], "-", 2.6)


@dataclass(frozen=True)
class Case:
    """One question with the boxes that it was answered with.

    Attributes:
        image: As the data have it.
        text: The expression.
        boxes: Label to box in pixels, in the order of drawing; None = none was answered.
        words: What stands above the image, below the expression: the IoUs.
    """

    image: Image.Image
    text: str
    boxes: dict[str, Box | None]
    words: str


def lines_of(
    questions: Sequence[Question], ways: Sequence[Way], records: Sequence[Sequence[Record]]
) -> list[tuple[str, list[Case]]]:
    """Return where the first pruned way loses most against unpruned, and where it gains most against compacted ids.

    Args:
        questions: What was asked, boxes all.
        ways: Unpruned first, and at least one more.
        records: The answers of each way, in the order of the questions.
    """
    way = ways[1]
    label = KEPT if way.config.ids == "kept" else f"ids {way.config.ids}"
    at = {UNPRUNED: 0}
    for place, each in enumerate(ways):
        if (each.method, each.budget, each.config.ids) == (way.method, way.budget, "compacted"):
            at[COMPACTED] = place
    at[label] = 1

    def gain(question: int, other: int) -> float:
        return (records[1][question].iou or 0.0) - (records[other][question].iou or 0.0)

    def cases(chosen: Sequence[int]) -> list[Case]:
        return [
            Case(
                questions[i].load(),
                questions[i].text,
                {**{label: records[place][i].box for label, place in at.items()}, TRUTH: questions[i].box},
                "\n".join(f"{label}: {_iou(records[place][i])}" for label, place in at.items()),
            )
            for i in chosen
        ]

    compacted = at.get(COMPACTED, 1)
    other, other_name = (0, "unpruned") if compacted == 1 else (compacted, COMPACTED)
    everything = range(len(questions))
    worst = sorted(everything, key=lambda i: gain(i, 0))[:SHOWN]
    best = sorted(everything, key=lambda i: gain(i, other), reverse=True)[:SHOWN]
    return [
        ("Worst: the largest loss of IoU against unpruned", cases(worst)),
        (f"Best: the largest gain of IoU against {other_name}", cases(best)),
    ]


def _iou(record: Record) -> str:
    return "no box" if record.failed else f"IoU {record.iou:.2f}"


def save_cases(lines: Sequence[tuple[str, Sequence[Case]]], title: str, path: Path) -> None:
    """Write lines of cases, each under its heading, with one legend below.

    Args:
        lines: Headings, and up to `SHOWN` cases for each.
        title: Of the picture.
        path: The file, PNG.
    """
    figure = plt.figure(figsize=(COLUMN * SHOWN, 3.5 * len(lines) + 0.7), layout="constrained")
    parts = figure.subfigures(len(lines), 1, squeeze=False)[:, 0]
    for part, (heading, cases) in zip(parts, lines, strict=True):
        part.suptitle(heading, x=0.01, ha="left", fontsize=10, weight="bold")
        grid = part.subplots(1, SHOWN)
        for axes in grid:
            axes.set_axis_off()
        for axes, case in zip(grid, cases, strict=False):
            _draw(axes, case)
    labels = list(dict.fromkeys(label for _, cases in lines for case in cases for label in case.boxes))
    handles = [
        Patch(
            fill=False,
            # White on paper would be invisible.
            edgecolor="#777777" if label == TRUTH else STYLES.get(label, OTHER_IDS)[0],
            linestyle=STYLES.get(label, OTHER_IDS)[1],
            linewidth=2,
            label=label,
        )
        for label in labels
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _draw(axes: Axes, case: Case) -> None:
    axes.imshow(case.image, interpolation="nearest")
    for label, box in case.boxes.items():
        if box is None:
            continue
        draw_box(axes, box, *STYLES.get(label, OTHER_IDS))
    shown = case.text if len(case.text) <= 40 else case.text[:37] + "..."
    axes.set_title(f"\n{shown}\n{case.words}", fontsize=8)  # an empty line for the heading
