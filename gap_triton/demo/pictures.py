"""The pictures of the demo: what was kept and what was answered, and the table as bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")  # writes files; needs no screen

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from .. import Selection
from .table import Row

# Blue, orange and red of a palette that stays apart for colour-blind readers (Okabe and Ito).
COLOURS = {"kept": "#0072B2", "compacted": "#E69F00", "permuted": "#D55E00"}
LABELS = {"kept": "ids kept (GAP)", "compacted": "ids compacted", "permuted": "ids permuted"}
TRUTH = "#FFFFFF"
DPI = 130


@dataclass(frozen=True)
class Example:
    """One picture of the overlay.

    Attributes:
        image: [3, H, W] uint8.
        title: The question.
        kept: [G, G] bool, the visual tokens that survived, by their place in the image.
        boxes: Label -> box [4], x0 y0 x1 y1 as shares of the image; NaN = no box was answered.
    """

    image: Tensor
    title: str
    kept: Tensor
    boxes: dict[str, Tensor]


def dim_dropped(image: Tensor, kept: Tensor) -> Tensor:
    """Return the image [3, H, W] uint8 with the patches of dropped tokens dimmed; ``kept`` is [rows, columns] bool."""
    rows, columns = kept.shape
    height, width = image.shape[1:]
    at_row = torch.arange(height) * rows // height
    at_column = torch.arange(width) * columns // width
    alive = kept[at_row][:, at_column]
    return torch.where(alive, image, (image.float() * 0.25).to(torch.uint8))


def draw_box(axes: Axes, box: Sequence[float], colour: str, line: Literal["-", "--"], width: float) -> None:
    """Draw the outline of ``box``, left, top, right and bottom in pixels of the image that ``axes`` show."""
    x0, y0, x1, y1 = box
    corner = (x0 - 0.5, y0 - 0.5)
    axes.add_patch(
        Rectangle(corner, x1 - x0, y1 - y0, fill=False, linewidth=width, linestyle=line, edgecolor=colour)
    )


def draw_example(axes: Axes, example: Example) -> None:
    """Draw image, kept tokens and boxes of one example."""
    _, height, width = example.image.shape
    axes.imshow(dim_dropped(example.image, example.kept).permute(1, 2, 0).numpy(), interpolation="nearest")
    for label, box in example.boxes.items():
        if bool(box.isnan().any()):
            continue
        corners = (box * torch.tensor([width, height, width, height])).tolist()
        if label == "truth":
            draw_box(axes, corners, TRUTH, "--", 1.4)
        else:
            draw_box(axes, corners, COLOURS[label], "-", 2.4)
    axes.set_title(example.title, fontsize=9)
    axes.set_axis_off()


def save_overlay(examples: Sequence[Example], title: str, path: Path) -> None:
    """Write the examples side by side, with a legend below."""
    figure, grid = plt.subplots(1, len(examples), figsize=(2.6 * len(examples), 3.4), squeeze=False)
    for axes, example in zip(grid[0], examples, strict=True):
        draw_example(axes, example)
    labels = [label for label in LABELS if any(label in example.boxes for example in examples)]
    handles = [
        Patch(fill=False, edgecolor=COLOURS[label], linewidth=2, label=LABELS[label]) for label in labels
    ]
    if any("truth" in example.boxes for example in examples):
        # White on paper would be invisible.
        handles.append(Patch(fill=False, edgecolor="#777777", linestyle="--", label="true box"))
    if handles:
        figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def save_bars(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write accuracy as bars, one group per share kept, with the unpruned accuracy as a line; bars carry intervals."""
    baseline = rows[0]
    keeps = sorted({row.keep for row in rows[1:]}, reverse=True)
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    width = 0.26
    for offset, ids in enumerate(LABELS):
        group = {row.keep: row for row in rows[1:] if row.ids == ids}
        for position, keep in enumerate(keeps):
            if keep not in group:
                continue
            row = group[keep]
            at = position + (offset - 1) * width
            axes.bar(
                at,
                row.accuracy,
                width * 0.92,
                color=COLOURS[ids],
                label=LABELS[ids] if position == 0 else None,
            )
            spread = [[row.accuracy - row.accuracy_low], [row.accuracy_high - row.accuracy]]
            axes.errorbar(at, row.accuracy, yerr=spread, color="#333333", linewidth=1, capsize=3)
            axes.text(at, row.accuracy_high + 0.015, f"{row.accuracy:.2f}", ha="center", fontsize=8)
    axes.axhline(baseline.accuracy, color="#333333", linestyle="--", linewidth=1, label="no pruning")
    axes.axhspan(baseline.accuracy_low, baseline.accuracy_high, color="#333333", alpha=0.12, linewidth=0)
    axes.set_xticks(range(len(keeps)), [f"keep {keep:.3g}" for keep in keeps])
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("accuracy at IoU 0.5")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def kept_grid(selection: Selection, sample: int, side: int, start: int = 0) -> Tensor:
    """Return [side, side] bool: which of a sample's visual rows from ``start`` on survived."""
    rows = selection.visual[sample].nonzero()[:, 0][start : start + side * side]
    return torch.isin(rows, selection.visual_index[sample]).reshape(side, side).cpu()
