"""All presets at several budgets, with ids kept and with ids compacted: the table of methods."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

import gap_triton

from .. import GapConfig
from ..config import Ids
from ..presets import PRESETS
from .compare import Comparison
from .report import accuracy, budget_name, cost_cells, difference, markdown
from .table import NO_PRUNING, Case, Row

PLAIN = "cls"  # plain top-k: what the others are compared with
IDS: tuple[Ids, ...] = ("kept", "compacted")


@dataclass(frozen=True)
class Refusal:
    """A preset that has no row, and why.

    Attributes:
        model: The embedded model.
        method: Name of the preset.
        keep: The budget.
        reason: The sentence of the error.
    """

    model: str
    method: str
    keep: float | int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return the refusal as it stands in the results file."""
        return asdict(self)


def method_cases(
    model: Any, names: Sequence[str], budgets: Sequence[float | int]
) -> tuple[list[Case], list[Refusal]]:
    """Return what to measure of the presets ``names``.

    Args:
        model: An embedded model, under ``"gap_triton"``.
        names: Of `PRESETS`.
        budgets: Shares or counts, handed to each preset in its own sense.

    Returns:
        A case for each id rule; and, instead of both, a refusal where preset or model take no such budget.
    """
    cases, refused = [], []
    for name in names:
        for budget in budgets:
            try:
                config = GapConfig.preset(name, budget=budget, model=model)
                gap_triton.configure(model, config)
            except ValueError as error:
                refused.append(Refusal(model.config.model_type, name, budget, str(error)))
                continue
            cases += [Case(name, budget, replace(config, ids=ids)) for ids in IDS]
    return cases, refused


def score_without_cls(model: Any) -> bool:
    """Return whether methods that rank by the CLS token need ``score="received"`` on ``model``."""
    return GapConfig.preset(PLAIN, model=model).score == "received"


def methods_markdown(
    rows: Sequence[Row], comparisons: Sequence[Comparison], refused: Sequence[Refusal]
) -> str:
    """Return the tables of methods: one line for each pair of kept and compacted ids, and what beats plain top-k."""
    parts = []
    for model in dict.fromkeys(row.model for row in rows):
        model_rows = [row for row in rows if row.model == model]
        parts.append(_pairs(model, model_rows, comparisons))
        against = [each for each in comparisons if each.model == model and each.against_ids == "kept"]
        if against:
            parts.append(_against_plain(against))
    if refused:
        parts.append(
            "No row:\n\n"
            + markdown(
                ("model", "method", "budget", "why"),
                [(each.model, each.method, budget_name(each.keep), each.reason) for each in refused],
            )
        )
    return "\n".join(parts)


def pair_cells(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Return method, budget, mean visual tokens, both accuracies, their difference, prefill time and cache, of one model."""
    by = {(row.method, row.keep, row.ids): row for row in rows}
    gains = {
        (each.method, each.keep): each
        for each in comparisons
        if each.model == rows[0].model and each.against_ids == "compacted"
    }
    cells: list[tuple[str, ...]] = []
    for row in rows:
        if row.method == NO_PRUNING or row.ids != "kept":
            continue
        cells.append(
            (
                row.method,
                budget_name(row.keep),
                f"{row.tokens_mean:.1f}",
                accuracy(row),
                accuracy(by[row.method, row.keep, "compacted"]),
                difference(gains[row.method, row.keep]),
                *cost_cells(row),
            )
        )
    return cells


def methods_table(rows: Sequence[Row], comparisons: Sequence[Comparison], title: str) -> Table:
    """Return `pair_cells` of one model for the terminal."""
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("budget", "tokens", "kept", "compacted", "kept - compacted", "prefill"):
        table.add_column(name, justify="left" if name == "budget" else "right", no_wrap=True)
    previous = None
    # Eighty columns have no room for the intervals of the two accuracies; they stand in the files.
    for method, budget, tokens, kept, compacted, gain, prefill, _ in pair_cells(rows, comparisons):
        if method != previous:
            table.add_section()
            table.add_row(f"[bold]{method}[/bold]")
        previous = method
        table.add_row(budget, tokens, kept.split()[0], compacted.split()[0], gain, prefill)
    table.caption = (
        f"no pruning: {accuracy(rows[0])}; tokens: visual tokens, mean over decoder layers, of {rows[0].tokens_kept}; kept, "
        "compacted: accuracy by position ids; kept - compacted: with its 95% interval, the same scenes"
    )
    return table


PAIR_HEADER = (
    *("method", "budget", "tokens", "accuracy, ids kept", "accuracy, ids compacted", "kept - compacted"),
    *("prefill", "KV cache"),
)


def _may_rank_by_cls(method: str) -> bool:
    """Whether the preset takes another score where there is no CLS token; HiPrune never ranks by one."""
    return method in PRESETS and "score" in inspect.signature(PRESETS[method]).parameters


def _pairs(model: str, rows: Sequence[Row], comparisons: Sequence[Comparison]) -> str:
    unpruned = rows[0]
    note = (
        '; methods that rank by the CLS token use `score="received"` here, for this vision encoder has none'
        if any(row.config["score"] == "received" and _may_rank_by_cls(row.method) for row in rows)
        else ""
    )
    return (
        f"**{model}**, no pruning: accuracy {accuracy(unpruned)}, {unpruned.tokens_mean:.0f} visual tokens, "
        f"{unpruned.kv_bytes / 1024:.0f} KiB{note}.\n\n"
        + markdown(PAIR_HEADER, pair_cells(rows, comparisons))
    )


def _against_plain(comparisons: Sequence[Comparison]) -> str:
    keeps = list(dict.fromkeys(each.keep for each in comparisons))
    by = {(each.method, each.keep): difference(each) for each in comparisons}
    methods = dict.fromkeys(each.method for each in comparisons)
    return f"Ids kept, accuracy minus that of `{PLAIN}` (plain top-k) at the same budget:\n\n" + markdown(
        ("method", *map(budget_name, keeps)),
        [(method, *(by.get((method, keep), "") for keep in keeps)) for method in methods],
    )
