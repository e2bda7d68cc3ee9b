"""How the visual tokens that a sample keeps are shared by its images, and by the tokens that are in none of their grids.

The latter are newline tokens, which LLaVA-NeXT and similar models put after each row of an image. They mark where a row
ends and show nothing of the image, so what they take of a budget is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config import Stage
from ..strategies import spatial_order
from .layout import Layout

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


def budget_of(layout: Layout, stage: Stage, outliers: Sequence[int] | None) -> Budget:
    """Return what ``stage`` keeps of the views of ``layout`` and of the tokens in none of them.

    Args:
        layout: Where the visual tokens stand.
        stage: The stage.
        outliers: How many tokens stand out in each view, for ``keep="outliers"``; else None.
    """
    in_views = [0] * len(layout.counts)
    for view in layout.views:
        in_views[view.sample] += view.size
    unplaced = tuple(count - inside for count, inside in zip(layout.counts, in_views, strict=True))
    if outliers is not None:
        more = int(stage.merge in ADDS_ONE)
        kept = (min(count + more, view.size) for count, view in zip(outliers, layout.views, strict=True))
        return Budget(tuple(kept), unplaced, unplaced)
    if stage.budget_by == "tiles":
        return Budget(_by_tiles(layout, stage, in_views), unplaced, unplaced)
    totals = list(map(stage.count, layout.counts))
    newlines = tuple(
        min(count, max(total // NEWLINES_OF, total - inside))
        for count, total, inside in zip(unplaced, totals, in_views, strict=True)
    )
    shares, before = [], [0] * len(layout.counts)
    for view in layout.views:
        size, start = in_views[view.sample], before[view.sample]
        end = before[view.sample] = start + view.size
        total = totals[view.sample] - newlines[view.sample]
        shares.append(total * end // size - total * start // size)
    return Budget(tuple(shares), newlines, unplaced)


def _by_tiles(layout: Layout, stage: Stage, in_views: Sequence[int]) -> tuple[int, ...]:
    """How many tokens of each view survive if every tile keeps equally many, at least one; ``in_views``: tokens of a sample.

    An image's first view is its overview, one tile; the others are of as many tiles as it takes to cover them, for what
    belongs to no pixel was cut off at the rim.
    """
    overviews: dict[tuple[int, int], tuple[int, int]] = {}
    tiles = []
    for view in layout.views:
        height, width = overviews.setdefault((view.sample, view.image), view.grid)
        tiles.append(-(-view.grid[0] // height) * -(-view.grid[1] // width))
    of_sample = [0] * len(layout.counts)
    for view, number in zip(layout.views, tiles, strict=True):
        of_sample[view.sample] += number
    keeps = [stage.keep if isinstance(stage.keep, int) else stage.count(count) for count in in_views]
    return tuple(
        min(max(keeps[view.sample] // of_sample[view.sample], 1) * number, view.size)
        for view, number in zip(layout.views, tiles, strict=True)
    )


def newlines_that_stay(unplaced: np.ndarray, budget: Budget) -> np.ndarray:
    """Return [B, V] bool, which of ``unplaced`` [B, V] bool, the tokens in no view, ``budget`` keeps: evenly spread ones."""
    if budget.newlines == budget.unplaced:
        return unplaced
    stays = np.zeros_like(unplaced)
    for sample, (count, kept) in enumerate(zip(budget.unplaced, budget.newlines, strict=True)):
        if count:
            spread = (spatial_order((count, 1), device="cpu") < kept).numpy()
            stays[sample, np.flatnonzero(unplaced[sample])[spread]] = True
    return stays
