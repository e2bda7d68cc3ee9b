"""The positions of a prompt's rows in their images, as coverages need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .coverage import REGION, Coverage, choose

CELLS = REGION * REGION
LAST = 2**30  # `GridPositions.order` of a row that an even spread reaches last, or never


@dataclass(frozen=True)
class GridPositions:
    """The position of each row of a prompt in its image.

    Attributes:
        region: [B, Q] int64, number of its region of 2 x 2 visual tokens within the sample; -1 = in no grid.
        cell: [B, Q] int64, its cell in that region, 0..3.
        order: [B, Q] int64 in 0..2**30, its rank in an even spread over the image: 0 comes first.
        regions: Number of regions, in the sample with the most.
    """

    region: torch.Tensor
    cell: torch.Tensor
    order: torch.Tensor
    regions: int

    def rank_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return `order` of ``rows`` [B, V] int64; filler comes last."""
        order = self.order.to(rows.device).gather(1, rows.clamp(min=0))
        return torch.where(rows < 0, LAST, order)

    def neighbours_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return which of ``rows`` [B, V] int64 share the region of each of them, by number: [B, V, 3] int32, -1 = none."""
        batch, count = rows.shape
        region, cell = (x.to(rows.device).gather(1, rows.clamp(min=0)) for x in (self.region, self.cell))
        in_grid = (rows >= 0) & (region >= 0)
        # One more column takes the rows that are in no grid.
        row_of = torch.full((batch, self.regions * CELLS + 1), -1, device=rows.device)
        own_cell = torch.where(in_grid, region * CELLS + cell, self.regions * CELLS)
        row_of = row_of.scatter(1, own_cell, torch.arange(count, device=rows.device).expand(batch, -1))
        row_of[:, -1] = -1
        others = []
        for step in range(1, CELLS):
            other = torch.where(in_grid, region * CELLS + (cell + step) % CELLS, self.regions * CELLS)
            others.append(row_of.gather(1, other))
        return torch.stack(others, dim=2).int()

    def mask_of_chosen(
        self,
        scores: torch.Tensor,
        candidates: torch.Tensor,
        rows: torch.Tensor,
        keep: int | torch.Tensor,
        coverage: Coverage,
        length: int,
        *,
        per_region: int | None = None,
        spread: float | None = None,
    ) -> torch.Tensor:
        """Return [B, V] float32: 1 at the candidates that ``coverage`` chooses, else 0.

        Args:
            scores: [B, V] float32.
            candidates: [B, V] int64, >= 0 for a candidate, -1 = filler.
            rows: [B, V] int64, their rows in the prompt.
            keep: How many to choose, as many in all samples or [B] int64.
            coverage: How.
            length: The largest of ``keep``.
            per_region: As in `gap_triton.Stage`.
            spread: Likewise.
        """
        scores = torch.where(candidates < 0, -torch.inf, scores)
        index = choose(
            scores,
            keep,
            coverage,
            neighbours=self.neighbours_of(rows) if coverage == "region" else None,
            order=self.rank_of(rows) if coverage == "stride" else None,
            per_region=per_region,
            spread=spread,
            length=length,
        )
        mask = scores.new_zeros(scores.shape[0], scores.shape[1] + 1)
        return mask.scatter(1, torch.where(index < 0, scores.shape[1], index), 1.0)[:, :-1]
