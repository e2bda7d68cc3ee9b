"""The pictures of the evaluation: every method with both id rules, and coverage crossed with ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files; needs no screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .coverage import coverage_of, place_of
from .pictures import COLOURS, DPI, LABELS
from .report import budget_name
from .table import NO_PRUNING, Row


def save_methods(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write accuracy of each method with ids compacted and kept, joined by a line; a panel for each model and budget."""
    models = list(dict.fromkeys(row.model for row in rows))
    pruned = [row for row in rows if row.method != NO_PRUNING]
    keeps = list(dict.fromkeys(row.keep for row in pruned))
    figure, grid = plt.subplots(
        len(models),
        len(keeps),
        figsize=(1.6 + 2.9 * len(keeps), sum(_height(pruned, model) for model in models) + 0.9),
        height_ratios=[_height(pruned, model) for model in models],
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for model, line in zip(models, grid, strict=True):
        methods = _best_first(pruned, model)
        for keep, axes in zip(keeps, line, strict=True):
            _draw_pairs(axes, [row for row in pruned if (row.model, row.keep) == (model, keep)], methods)
            _draw_baseline(axes, next(row for row in rows if row.model == model), vertical=True)
            axes.set_title(f"{model}, budget {budget_name(keep)}", fontsize=9)
            axes.set_yticks(range(len(methods)), methods if axes is line[0] else [""] * len(methods))
            axes.set_ylim(len(methods) - 0.4, -0.6)
            axes.set_xlim(-0.03, 1.03)
    for axes in grid[-1]:
        axes.set_xlabel("accuracy at IoU 0.5", fontsize=9)
    _finish(figure, grid[0][0], title, path)


def save_coverage(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write accuracy as bars, coverage by ids; a panel for each model, place and budget."""
    pruned = [row for row in rows if row.method != NO_PRUNING]
    keeps = list(dict.fromkeys(row.keep for row in pruned))
    locations = list(dict.fromkeys((row.model, place_of(row, pruned)) for row in pruned))
    coverages = list(dict.fromkeys(map(coverage_of, pruned)))
    figure, grid = plt.subplots(
        len(locations),
        len(keeps),
        figsize=(1.2 + 3.0 * len(keeps), 1.0 + 1.9 * len(locations)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    width = 0.26
    for (model, location), line in zip(locations, grid, strict=True):
        for keep, axes in zip(keeps, line, strict=True):
            for row in pruned:
                if (row.model, place_of(row, pruned), row.keep) != (model, location, keep):
                    continue
                offset = (list(LABELS).index(row.ids) - 1) * width
                at = coverages.index(coverage_of(row)) + offset
                axes.bar(at, row.accuracy, width * 0.92, color=COLOURS[row.ids], label=LABELS[row.ids])
                spread = [[row.accuracy - row.accuracy_low], [row.accuracy_high - row.accuracy]]
                axes.errorbar(at, row.accuracy, yerr=spread, color="#333333", linewidth=0.9, capsize=1.5)
                if row.ids == "kept":
                    axes.text(
                        at,
                        row.accuracy_high + 0.03,
                        f"{row.accuracy:.2f}",
                        ha="center",
                        fontsize=7,
                        bbox={"facecolor": "white", "linewidth": 0, "pad": 0.5},
                    )
            _draw_baseline(axes, next(row for row in rows if row.model == model), vertical=False)
            axes.set_xticks(range(len(coverages)), coverages)
            axes.set_ylim(0, 1.16)
            axes.set_title(f"{model}, {location}, {budget_name(keep)}", fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("accuracy at IoU 0.5", fontsize=8)
    _finish(figure, grid[0][0], title, path)


def _height(rows: Sequence[Row], model: str) -> float:
    return 0.6 + 0.24 * len({row.method for row in rows if row.model == model})


def _best_first(rows: Sequence[Row], model: str) -> list[str]:
    """Methods of ``model`` by their mean accuracy with ids kept."""
    accuracies: dict[str, list[float]] = {}
    for row in rows:
        if row.model == model and row.ids == "kept":
            accuracies.setdefault(row.method, []).append(row.accuracy)
    return sorted(
        accuracies, key=lambda method: sum(accuracies[method]) / len(accuracies[method]), reverse=True
    )


def _draw_pairs(axes: Axes, rows: Sequence[Row], methods: Sequence[str]) -> None:
    by = {(row.method, row.ids): row for row in rows}
    for at, method in enumerate(methods):
        if (method, "kept") not in by:
            axes.text(
                0.5, at, "refused: see the table", ha="center", va="center", fontsize=7, color="#777777"
            )
            continue
        ends = [by[method, ids].accuracy for ids in ("compacted", "kept")]
        axes.plot(ends, [at, at], color="#BBBBBB", linewidth=2, zorder=1)
        for ids in ("compacted", "kept"):
            row = by[method, ids]
            spread = [[row.accuracy - row.accuracy_low], [row.accuracy_high - row.accuracy]]
            axes.errorbar(
                row.accuracy,
                at,
                xerr=spread,
                color=COLOURS[ids],
                marker="o",
                markersize=5,
                linewidth=1,
                label=LABELS[ids],
            )
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_baseline(axes: Axes, row: Row, *, vertical: bool) -> None:
    line = axes.axvline if vertical else axes.axhline
    line(row.accuracy, color="#333333", linestyle="--", linewidth=1, zorder=0, label=NO_PRUNING)


def _finish(figure: Figure, labelled: Axes, title: str, path: Path) -> None:
    """One legend for all panels, taken from one of them, then the file."""
    handles = dict(zip(*reversed(labelled.get_legend_handles_labels()), strict=True))
    order = [label for label in (*LABELS.values(), NO_PRUNING) if label in handles]
    figure.legend(
        [handles[label] for label in order],
        order,
        loc="outside lower center",
        ncols=len(order),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
