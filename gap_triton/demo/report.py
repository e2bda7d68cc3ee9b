"""Results as text: tables for the terminal and for Markdown, and the JSON that both can be made from again."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..environment import device_name, installed_versions
from .compare import Comparison
from .scenes import Split, seeds_of
from .table import IOU_THRESHOLD, NO_PRUNING, Row


def empty_table(title: str) -> Table:
    """Return a table for the terminal without columns, as narrow as can be."""
    return Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def table_of(rows: Sequence[Row], title: str) -> Table:
    """Return the rows as a table for the terminal, with a line before each new method and share."""
    table = empty_table(title)
    for name in ("tokens", "position ids"):
        table.add_column(name, no_wrap=True)
    for name in ("accuracy (95% CI)", "mean IoU", "prefill", "KV cache"):
        table.add_column(name, justify="right", no_wrap=True)
    methods = {row.method for row in rows[1:]}
    previous = rows[0]
    for row in rows:
        if (row.method, row.keep) != (previous.method, previous.keep):
            table.add_section()
        if row.method != previous.method and len(methods) > 1:
            table.add_row(f"[bold]{row.method}[/bold]")
        previous = row
        table.add_row(
            f"{row.tokens_kept} ({row.keep:.3g})" if row.keep < 1 else str(row.tokens_kept),
            NO_PRUNING if row.method == NO_PRUNING else {"kept": "kept (GAP)"}.get(row.ids, row.ids),
            f"{row.accuracy:.3f} ({row.accuracy_low:.3f}-{row.accuracy_high:.3f})",
            f"{row.mean_iou:.3f}",
            *cost_cells(row),
        )
    table.caption = (
        f"tokens: visual tokens kept, of {rows[0].tokens_kept}; accuracy: IoU >= {IOU_THRESHOLD} of the answered box; "
        "prefill: its time, vision tower included, relative to no pruning; KV cache: of one prompt"
    )
    return table


def can_draw(console: Console, *pictures: str) -> bool:
    """Return whether ``pictures`` can be drawn; where they can't, print that on ``console``, with what to install."""
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    if not has_matplotlib:
        console.print(
            f"left out {' and '.join(pictures)}: matplotlib is not installed: pip install matplotlib",
            highlight=False,
            soft_wrap=True,
        )
    return has_matplotlib


def write_results(
    path: Path, samples: int, split: Split, device: torch.device, **parts: Sequence[Any]
) -> None:
    """Write results with all that is needed to place them; ``parts``: by name, things with ``as_dict()``."""
    seeds = seeds_of(samples, split)
    results = {
        **{name: [each.as_dict() for each in part] for name, part in parts.items()},
        "samples": samples,
        "split": split,
        "seeds": [seeds.start, seeds.stop],
        "iou_threshold": IOU_THRESHOLD,
        "versions": installed_versions(),
        "device": device_name(device),
    }
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def markdown_of(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown, one table for each model; with one id rule, one line for each method."""
    models = list(dict.fromkeys(row.model for row in rows))
    parts = []
    for model in models:
        model_rows = [row for row in rows if row.model == model]
        one_rule = len({row.ids for row in model_rows if row.method != NO_PRUNING}) == 1
        table = _by_method(model_rows) if one_rule else _by_row(model_rows)
        parts.append(f"**{model}**\n\n{table}" if len(models) > 1 else table)
    return "\n".join(parts)


def _by_row(rows: Sequence[Row]) -> str:
    return markdown(
        (
            *("method", "keep", "visual tokens", "ids", "accuracy (95% interval)", "mean IoU"),
            *("prefill time", "KV cache"),
        ),
        [
            (
                row.method,
                budget_name(row.keep),
                str(row.tokens_kept),
                "" if row.method == NO_PRUNING else row.ids,
                accuracy(row),
                f"{row.mean_iou:.3f}",
                *cost_cells(row),
            )
            for row in rows
        ],
    )


def _by_method(rows: Sequence[Row]) -> str:
    keeps = list(dict.fromkeys(row.keep for row in rows if row.method != NO_PRUNING))
    by = {(row.method, row.keep): row for row in rows}
    unpruned = next(row for row in rows if row.method == NO_PRUNING)
    lines = []
    for method in dict.fromkeys(row.method for row in rows if row.method != NO_PRUNING):
        method_rows = [by[method, keep] for keep in keeps]
        costs = zip(*map(cost_cells, method_rows), strict=True)
        lines.append((method, *map(accuracy, method_rows), *map(" / ".join, costs)))
    ids = next(row.ids for row in rows if row.method != NO_PRUNING)
    header = ("method", *(f"accuracy at {budget_name(keep)}" for keep in keeps), "prefill time", "KV cache")
    return f"Ids {ids}; no pruning: accuracy {accuracy(unpruned)}, {cost_cells(unpruned)[1]}.\n\n" + markdown(
        header, lines
    )


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rule = "|" + "---|" * len(header) + "\n"
    first, *others = (f"| {' | '.join(row)} |\n" for row in (header, *lines))
    return first + rule + "".join(others)


def budget_name(keep: float | int) -> str:
    """Return a share in percent, or a count of tokens."""
    return f"{100 * keep:.3g}%" if isinstance(keep, float) else f"{keep} tokens"


def accuracy(row: Row) -> str:
    """Return the accuracy with its interval."""
    return f"{row.accuracy:.3f} ({row.accuracy_low:.3f} to {row.accuracy_high:.3f})"


def difference(comparison: Comparison) -> str:
    """Return the difference of two accuracies with its interval."""
    return f"{comparison.value:+.3f} ({comparison.low:+.3f} to {comparison.high:+.3f})"


def cost_cells(row: Row) -> tuple[str, str]:
    """Return the prefill time and size of the cache."""
    return f"{row.prefill_ratio:.2f}x", f"{row.kv_bytes / 1024:.0f} KiB"
