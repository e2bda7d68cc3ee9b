"""How the visual tokens that a sample keeps are shared by its images, and by the tokens that are in none of their grids.

The latter are newline tokens, which LLaVA-NeXT and similar models put after each row of an image. They mark where a row
ends and show nothing of the image, so what they take of a budget is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Stage
from ..strategies import outlier_count, spatial_order
from ..strategies.rows import positions_first
from .layout import View

NEWLINES_OF = 2  # newlines take at most one in so many of the tokens kept
ADDS_ONE = ("nearest", "average")  # merges that keep one token more, made of all that are dropped


@dataclass(frozen=True)
class Budget:
    """How many tokens survive.

    Attributes:
        views: Of each view.
        newlines: Of the tokens of each sample that are in no view.
        unplaced: How many tokens of each sample are in no view.
    """

    views: tuple[int, ...]
    newlines: tuple[int, ...]
    unplaced: tuple[int, ...]


def budget_of(views: Sequence[View], scores: Sequence[Tensor], stage: Stage, counts: Sequence[int]) -> Budget:
    """Return what ``stage`` keeps of samples with ``counts`` visual tokens, of which those in ``views`` have ``scores``."""
    in_views = [0] * len(counts)
    for view in views:
        in_views[view.sample] += len(view.rows)
    unplaced = tuple(count - inside for count, inside in zip(counts, in_views, strict=True))
    if stage.keep == "outliers":
        more = int(stage.merge in ADDS_ONE)
        # One read for all.
        outliers = torch.cat([outlier_count(score[None]) for score in scores]).tolist() if scores else []
        kept = (min(count + more, len(score)) for count, score in zip(outliers, scores, strict=True))
        return Budget(tuple(kept), unplaced, unplaced)
    totals = list(map(stage.count, counts))
    newlines = tuple(
        min(count, max(total // NEWLINES_OF, total - inside))
        for count, total, inside in zip(unplaced, totals, in_views, strict=True)
    )
    shares, before = [], [0] * len(counts)
    for view in views:
        size, start = in_views[view.sample], before[view.sample]
        end = before[view.sample] = start + len(view.rows)
        total = totals[view.sample] - newlines[view.sample]
        shares.append(total * end // size - total * start // size)
    return Budget(tuple(shares), newlines, unplaced)


def newlines_that_stay(unplaced: Tensor, budget: Budget) -> Tensor:
    """Return [B, Q] bool, which of ``unplaced`` [B, Q] bool, the tokens in no view, ``budget`` keeps: evenly spread ones."""
    if budget.newlines == budget.unplaced:
        return unplaced.clone()
    stays = torch.zeros(len(budget.unplaced), max(budget.unplaced), dtype=torch.bool)
    for sample, (count, kept) in enumerate(zip(budget.unplaced, budget.newlines, strict=True)):
        if count:
            stays[sample, :count] = spatial_order((count, 1), device="cpu") < kept
    rows = positions_first(unplaced, stays.shape[1])
    # One more row at the end takes the filler.
    length = unplaced.shape[1]
    row_stays = unplaced.new_zeros(unplaced.shape[0], length + 1)
    return row_stays.scatter(1, torch.where(rows < 0, length, rows), stays.to(rows.device))[:, :-1]
