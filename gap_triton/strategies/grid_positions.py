"""The positions of a prompt's visual tokens in their images, as coverages need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LAST = 2**30  # `GridPositions.order` of a token that an even spread reaches last, or never


@dataclass(frozen=True, eq=False)
class GridPositions:
    """The position of each visual token of a prompt in its image; tokens go by their number among those of the sample.

    Attributes:
        neighbours: [B, V, 3] int32, the other tokens of its region of 2 x 2; -1 = none, as for a token that is in no grid.
        order: [B, V] int64 in 0..2**30, its rank in an even spread over the image: 0 comes first, filler last.
        visual_index: [B, V] int64, the rows of the tokens, ascending, then -1.
        queries: Q, number of rows of the prompt.
    """

    neighbours: torch.Tensor
    order: torch.Tensor
    visual_index: torch.Tensor
    queries: int

    def order_of(self, rows: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """Return `order` of the visual ``rows`` [B, W] int64, -1 = filler, which comes last; None = all, in their order."""
        order = self.order.to(device)
        if rows is None:
            return order
        numbers = self._numbers(rows).clamp(max=order.shape[1] - 1)
        return torch.where(rows < 0, LAST, order.gather(1, numbers))

    def neighbours_of(self, rows: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """Return which of the visual ``rows`` [B, W] int64, -1 = filler, share the region of each of them.

        Returns:
            [B, W, 3] int32, by their number in ``rows``, -1 = none. For None, which is all in their order: `neighbours`.
        """
        neighbours = self.neighbours.to(device)
        if rows is None:
            return neighbours
        numbers = self._numbers(rows)
        batch, count = numbers.shape
        filler = neighbours.shape[1]
        # One more column takes the filler, and is what no neighbour is found by.
        place = torch.full((batch, filler + 1), -1, dtype=torch.int32, device=device)
        places = torch.arange(count, dtype=torch.int32, device=device).expand(batch, -1)
        place.scatter_(1, numbers, torch.where(rows < 0, -1, places))
        others = neighbours.gather(1, numbers.clamp(max=filler - 1)[..., None].expand(-1, -1, 3)).long()
        others = torch.where((others < 0) | (rows < 0)[..., None], filler, others)
        return place.gather(1, others.flatten(1)).unflatten(1, (count, 3))

    def _numbers(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, W] int64, the numbers of ``rows`` [B, W]; V at filler."""
        index = self.visual_index.to(rows.device)
        batch, count = index.shape
        # One more row takes the filler.
        number = torch.full((batch, self.queries + 1), count, device=rows.device)
        numbers = torch.arange(count, device=rows.device).expand(batch, -1)
        number.scatter_(1, torch.where(index < 0, self.queries, index), numbers)
        return torch.where(rows < 0, count, number.gather(1, rows.clamp(min=0)))
