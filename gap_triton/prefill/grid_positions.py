"""Where visual rows stand in their images, for stages in the decoder that spread their choice over the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import Stage
from ..state import ForwardState, Prompt
from ..strategies import choose, spatial_order
from ..vision.layout import View, layout_of

REGION = 2  # rows and columns of a region: Nüwa's separation, arXiv 2602.02951, section 3.1
CELLS = REGION * REGION
LATE = 2**30  # `Places.order` of a row that an even spread comes to last, or never


@dataclass(frozen=True)
class Places:
    """What each row of a prompt is in its image.

    Attributes:
        region: [B, Q] int64, number of its region of 2 x 2 visual tokens within the sample; -1 = in no grid.
        cell: [B, Q] int64, which of the region's cells it is, 0..3.
        order: [B, Q] int64 in 0..2**30, how early an even spread over the image comes to it.
        regions: Number of regions, in the sample with the most.
    """

    region: torch.Tensor
    cell: torch.Tensor
    order: torch.Tensor
    regions: int

    def order_of(self, rows: torch.Tensor) -> torch.Tensor:
        """`order` of ``rows`` [B, V] int64; filler comes last."""
        order = self.order.to(rows.device).gather(1, rows.clamp(min=0))
        return torch.where(rows < 0, LATE, order)

    def neighbours_of(self, rows: torch.Tensor) -> torch.Tensor:
        """For each of ``rows`` [B, V] which others of them are in its region: [B, V, 3] int32, -1 = none."""
        batch, count = rows.shape
        region, cell = (x.to(rows.device).gather(1, rows.clamp(min=0)) for x in (self.region, self.cell))
        placed = (rows >= 0) & (region >= 0)
        # One more column takes what stands nowhere.
        by_place = torch.full((batch, self.regions * CELLS + 1), -1, device=rows.device)
        place = torch.where(placed, region * CELLS + cell, self.regions * CELLS)
        by_place = by_place.scatter(1, place, torch.arange(count, device=rows.device).expand(batch, -1))
        by_place[:, -1] = -1
        others = []
        for step in range(1, CELLS):
            other = torch.where(placed, region * CELLS + (cell + step) % CELLS, self.regions * CELLS)
            others.append(by_place.gather(1, other))
        return torch.stack(others, dim=2).int()

    def choose(
        self,
        scores: torch.Tensor,
        candidates: torch.Tensor,
        rows: torch.Tensor,
        keep: torch.Tensor,
        stage: Stage,
        length: int,
    ) -> torch.Tensor:
        """[B, V] float32, 1 at the candidates that ``stage.coverage`` chooses, else 0.

        Args:
            scores: [B, V] float32.
            candidates: [B, V] int64, any number >= 0 for a candidate, -1 = filler.
            rows: [B, V] int64, their rows in the prompt.
            keep: [B] int64, how many to choose.
            stage: The stage.
            length: The largest of ``keep``.
        """
        scores = torch.where(candidates < 0, -torch.inf, scores)
        index = choose(
            scores,
            keep,
            stage.coverage,
            neighbours=self.neighbours_of(rows) if stage.coverage == "region" else None,
            order=self.order_of(rows) if stage.coverage == "stride" else None,
            length=length,
        )
        chosen = scores.new_zeros(scores.shape[0], scores.shape[1] + 1)
        return chosen.scatter(1, torch.where(index < 0, scores.shape[1], index), 1.0)[:, :-1]


def places_of(state: ForwardState, prompt: Prompt) -> Places:
    """Places of the prompt's visual rows.

    Raises:
        ValueError: Where they stand is not known.
    """
    layout = layout_of(
        state.attachment.owner, state.owner_kwargs, prompt.visual, prompt.visual_index, prompt.visual_counts
    )
    return place(layout.views, prompt.visual)


def place(views: Sequence[View], visual: torch.Tensor) -> Places:
    """Places of the rows of ``visual`` [B, Q] that stand in ``views``."""
    region = torch.full(visual.shape, -1, device=visual.device)
    cell = torch.zeros_like(region)
    order = torch.full_like(region, LATE)
    regions = [0] * visual.shape[0]
    for view in views:
        height, width = view.grid
        number = torch.arange(height * width, device=visual.device)
        down, right = number // width, number % width
        wide = -(-width // REGION)
        rows = view.rows.to(visual.device)
        region[view.sample, rows] = regions[view.sample] + down // REGION * wide + right // REGION
        cell[view.sample, rows] = down % REGION * REGION + right % REGION
        spread = spatial_order(view.grid).to(visual.device)
        order[view.sample, rows] = spread * LATE // (height * width)
        regions[view.sample] += -(-height // REGION) * wide
    return Places(region, cell, order, max(regions))
