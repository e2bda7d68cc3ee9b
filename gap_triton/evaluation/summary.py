"""What answers come to: a row for each way, the differences with their paired intervals, and all of it as tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from ..demo.intervals import paired_difference, wilson_interval
from ..demo.report import budget_name, empty_table, markdown
from .costs import Cost
from .records import Record
from .reported import Reported
from .ways import UNPRUNED, Way


@dataclass(frozen=True)
class Row:
    """One way to run the model, over all questions.

    Attributes:
        way: Its name.
        method: A preset's name, or score and layer.
        budget: Visual tokens to keep, a share or a count; None = all.
        ids: Position ids of the survivors.
        config: The whole configuration, field by field.
        questions: How many were asked.
        accuracy: Share of right answers: IoU of the box >= 0.5, or words that are right.
        accuracy_low: Lower end of its 95% interval (Wilson).
        accuracy_high: Upper end.
        mean_iou: Mean IoU of the boxes with the true ones, 0 where none could be read; None where words were asked for.
        failures: Answers in which no box could be read; they count as wrong.
        visual_tokens: Of a prompt, mean over questions.
        kept_tokens: Of these, those that a decoder layer has, mean over layers and questions.
        ttft_s: Seconds to the first token, one question at a time.
        ttft_ratio: The same relative to unpruned.
        kv_bytes: KV cache of one prompt, all layers.
        reported: Accuracy of this method and budget in a paper, in percent; None = none is known.
        source: The paper.
    """

    way: str
    method: str
    budget: float | int | None
    ids: str
    config: dict[str, Any]
    questions: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    mean_iou: float | None
    failures: int
    visual_tokens: float
    kept_tokens: float
    ttft_s: float
    ttft_ratio: float
    kv_bytes: int
    reported: float | None = None
    source: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the row as it stands in ``results.json``."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """Accuracy of one way minus that of another, on the same questions.

    Attributes:
        way: The one.
        against: The other.
        value: The difference.
        low: Lower end of its 95% interval (Newcombe, paired).
        high: Upper end.
        first_only: Questions that only the one answers right.
        second_only: Questions that only the other answers right.
    """

    way: str
    against: str
    value: float
    low: float
    high: float
    first_only: int
    second_only: int

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as it stands in ``results.json``."""
        return asdict(self)


def row_of(way: Way, records: Sequence[Record], cost: Cost, reported: Sequence[Reported]) -> Row:
    """Return the row of a way from its answers and costs."""
    hits = sum(record.right for record in records)
    low, high = wilson_interval(hits, len(records))
    ious = [record.iou for record in records if record.iou is not None]
    figure = next(
        (
            each
            for each in reported
            if (each.method, each.budget, each.ids) == (way.method, way.budget, way.config.ids)
        ),
        None,
    )
    return Row(
        way=way.name,
        method=way.method,
        budget=way.budget,
        ids=way.config.ids,
        config=asdict(way.config),
        questions=len(records),
        accuracy=hits / len(records),
        accuracy_low=low,
        accuracy_high=high,
        mean_iou=statistics.fmean(ious) if ious else None,
        failures=sum(record.failed for record in records),
        visual_tokens=statistics.fmean(record.visual_tokens for record in records),
        kept_tokens=statistics.fmean(record.kept_tokens for record in records),
        reported=figure.accuracy if figure else None,
        source=figure.source if figure else None,
        **asdict(cost),
    )


def compare(ways: Sequence[Way], records: Sequence[Sequence[Record]]) -> list[Comparison]:
    """Compare every pruned way with unpruned, and that with ids kept with the same with ids compacted.

    Args:
        ways: Unpruned first.
        records: Their answers, to the same questions in the same order.
    """
    right = {
        way.name: torch.tensor([record.right for record in of_way])
        for way, of_way in zip(ways, records, strict=True)
    }
    compacted = {(way.method, way.budget): way for way in ways if way.config.ids == "compacted"}
    comparisons = []
    for way in ways[1:]:
        others = [ways[0]]
        if way.config.ids == "kept" and (way.method, way.budget) in compacted:
            others.append(compacted[way.method, way.budget])
        for other in others:
            found = paired_difference(right[way.name], right[other.name])
            comparisons.append(Comparison(way.name, other.name, **asdict(found)))
    return comparisons


# ------------------------------------------------------------------------------------------------ tables
HEADER = (
    *(
        "method",
        "budget",
        "ids",
        "accuracy (95% interval)",
        "of unpruned",
        "mean IoU",
        "no box",
        "visual tokens",
    ),
    *("time to first token", "KV cache", "in a paper"),
)


def cells_of(row: Row, unpruned: Row) -> tuple[str, ...]:
    """Return a row in words."""
    paper = "" if row.reported is None else f"{row.reported:.2f}% ({row.source})"
    return (
        row.method,
        "" if row.budget is None else budget_name(row.budget),
        "" if row.way == UNPRUNED.name else row.ids,
        f"{row.accuracy:.3f} ({row.accuracy_low:.3f} to {row.accuracy_high:.3f})",
        f"{row.accuracy / unpruned.accuracy:.1%}" if unpruned.accuracy else "",
        "" if row.mean_iou is None else f"{row.mean_iou:.3f}",
        "" if row.mean_iou is None else str(row.failures),
        f"{row.kept_tokens:.1f}",
        f"{1000 * row.ttft_s:.1f} ms ({row.ttft_ratio:.2f}x)",
        f"{row.kv_bytes / 1024:,.0f} KiB",
        paper,
    )


def markdown_of(rows: Sequence[Row], comparisons: Sequence[Comparison], reported: Sequence[Reported]) -> str:
    """Return the rows, the differences and the figures of papers that belong to none of the rows, as Markdown."""
    parts = [markdown(HEADER, [cells_of(row, rows[0]) for row in rows])]
    if comparisons:
        parts.append(
            markdown(
                (
                    "accuracy of",
                    "minus that of",
                    "difference (95% interval, paired)",
                    "only the first right",
                    "only the second",
                ),
                [
                    (each.way, each.against, in_words(each), str(each.first_only), str(each.second_only))
                    for each in comparisons
                ],
            )
        )
    notes = notes_of(rows, reported)
    if notes:
        parts.append("".join(f"- {note}\n" for note in notes))
    return "\n".join(parts)


def in_words(comparison: Comparison) -> str:
    """Return a difference with its interval."""
    return f"{comparison.value:+.3f} ({comparison.low:+.3f} to {comparison.high:+.3f})"


def notes_of(rows: Sequence[Row], reported: Sequence[Reported]) -> list[str]:
    """Return a sentence for each figure of a paper that stands in no row."""
    shown = {(row.method, row.budget, row.ids) for row in rows if row.reported is not None}
    return [
        f"{each.source}: {each.model}, {each.data} {each.split or '(split not named)'}, {each.method}"
        f"{'' if each.budget is None else f', {each.budget} tokens'}"
        f"{'' if each.method == 'unpruned' else f', ids {each.ids}'}: {each.accuracy:.2f}% ({each.unpruned:.2f}% unpruned)"
        for each in reported
        if (each.method, each.budget, each.ids) not in shown
    ]


def table_of(rows: Sequence[Row], title: str) -> Table:
    """Return the rows as a table for the terminal, 80 columns wide, with a line for each method and budget."""
    table = empty_table(title)
    for name in ("position ids", "accuracy (95% CI)", "IoU", "no box", "tokens", "TTFT", "KV cache"):
        table.add_column(name, justify="left" if name == "position ids" else "right", no_wrap=True)
    previous = None
    for row in rows:
        if row.budget is not None and (row.method, row.budget) != previous:
            table.add_section()
            table.add_row(f"[bold]{row.method}[/bold]", f"[bold]{budget_name(row.budget)}[/bold]")
        previous = (row.method, row.budget)
        table.add_row(
            row.method if row.way == UNPRUNED.name else {"kept": "kept (GAP)"}.get(row.ids, row.ids),
            f"{row.accuracy:.3f} ({row.accuracy_low:.3f}-{row.accuracy_high:.3f})",
            "" if row.mean_iou is None else f"{row.mean_iou:.3f}",
            "" if row.mean_iou is None else str(row.failures),
            f"{row.kept_tokens:.1f}",
            f"{1000 * row.ttft_s:.1f} ms",
            f"{row.kv_bytes / 1024:,.0f} KiB",
        )
    table.caption = (
        "accuracy: IoU >= 0.5, or right words; IoU: its mean; no box: answers in which none could be read, counted as "
        "wrong; tokens: visual tokens, mean over decoder layers; TTFT: time to the first token, one question at "
        "a time; KV cache: of one prompt"
    )
    return table
