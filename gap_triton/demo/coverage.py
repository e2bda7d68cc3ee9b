"""How a budget is spread over the image, crossed with position ids: which of the two decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from .. import GapConfig
from ..config import BEFORE_THE_DECODER, Coverage, Ids, Score
from .compare import Comparison
from .methods import score_without_cls
from .report import accuracy, budget_name, difference, markdown
from .table import NO_PRUNING, Case, Row, place_name

LAYER = 1  # in the decoder, as the demo does
SCORE: Score = "text"
COVERAGES: tuple[Coverage, ...] = ("topk", "region", "stride")
RANDOM: Score = "random"  # what the score makes of the same budget: none
IDS: tuple[Ids, ...] = ("kept", "compacted", "permuted")


def coverage_cases(model: Any, budgets: Sequence[float | int]) -> list[Case]:
    """Return the cases of coverage x ids x budgets, at one decoder layer and after the vision encoder.

    Args:
        model: An embedded model, under ``"gap_triton"``. After its vision encoder the score is ``"cls"``, or
            ``"received"`` where there is no CLS token.
        budgets: Shares or counts.
    """
    in_vision: Score = "received" if score_without_cls(model) else "cls"
    cases = []
    for layer, score in ((LAYER, SCORE), (BEFORE_THE_DECODER, in_vision)):
        config = GapConfig(layer=layer, score=score)
        ways = [replace(config, coverage=coverage) for coverage in COVERAGES] + [
            replace(config, score=RANDOM)
        ]
        cases += [Case.of(replace(way, keep=keep, ids=ids)) for keep, way, ids in product(budgets, ways, IDS)]
    return cases


def coverage_of(row: Row) -> str:
    """Return ``"topk"``, ``"region"``, ``"stride"`` or ``"random"``."""
    return RANDOM if row.config["score"] == RANDOM else row.config["coverage"]


def plain_of(row: Row, rows: Sequence[Row]) -> Row:
    """Return the row of plain top-k with the model, place, budget and ids of ``row``; of no pruning, itself."""
    if row.method == NO_PRUNING:
        return row

    def key(each: Row) -> tuple[Any, ...]:
        return each.model, each.config["layer"], each.keep, each.ids

    return next(each for each in rows if key(each) == key(row) and coverage_of(each) == COVERAGES[0])


def place_of(row: Row, rows: Sequence[Row]) -> str:
    """Return where ``row`` prunes and what ranks there, such as ``"layer 1, by text"``, also for the random score."""
    return f"{place_name(row.config['layer'])}, by {plain_of(row, rows).config['score']}"


def coverage_markdown(rows: Sequence[Row], comparisons: Sequence[Comparison]) -> str:
    """Return the table of coverage x ids: one line for each place, budget and coverage."""
    gains = {(each.model, each.method, each.keep, each.against_ids): difference(each) for each in comparisons}
    parts = []
    for model in dict.fromkeys(row.model for row in rows):
        pruned = [row for row in rows if row.model == model and row.method != NO_PRUNING]
        by = {(row.method, row.keep, row.ids): row for row in pruned}
        lines = []
        for row in pruned:
            if row.ids != IDS[0]:
                continue
            lines.append(
                (
                    place_of(row, pruned),
                    budget_name(row.keep),
                    coverage_of(row),
                    *(accuracy(by[row.method, row.keep, ids]) for ids in IDS),
                    gains[model, row.method, row.keep, "compacted"],
                    gains.get((model, row.method, row.keep, "kept"), ""),
                )
            )
        unpruned = next(row for row in rows if row.model == model and row.method == NO_PRUNING)
        header = (
            *("place", "budget", "coverage", "kept", "compacted", "permuted"),
            *("kept - compacted", "kept: minus topk"),
        )
        parts.append(f"**{model}**, no pruning: accuracy {accuracy(unpruned)}.\n\n" + markdown(header, lines))
    return "\n".join(parts)
