"""What a pruned prefill kept, for users to look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Selection:
    """The tokens that survived the last pruned prefill.

    Rows count within the input of that forward, in its original order. With several stages this is what the last one
    kept, and ``before`` what the one before it did.

    Attributes:
        index: [B, L] int64, every surviving row, text and visual, ascending; -1 = filler, on the left.
        position_ids: [B, L] (or [A, B, L] where the model has several axes) int64, the ids that the survivors carry
            in the later layers. Entries at filler mean nothing.
        score: [B, V] float32, the score of each candidate. After the vision encoder rows that stand in no grid,
            such as newline tokens, have the score inf where they stay and -inf where they don't.
        visual: [B, Q] bool, the visual rows of the input.
        before: What the stage before kept; None in the first.
    """

    index: torch.Tensor
    position_ids: torch.Tensor
    score: torch.Tensor
    visual: torch.Tensor
    _candidates: torch.Tensor
    """The candidates by row among those that the stage before left."""
    before: Selection | None = None

    @property
    def candidates(self) -> torch.Tensor:
        """[B, V] int64, the visual rows that the stage chose from, ascending; -1 = filler."""
        rows = self._candidates
        if self.before is None:
            return rows
        index = self.before.index.to(rows.device)
        return torch.where(rows < 0, -1, index.gather(1, rows.clamp(min=0)))

    @property
    def visual_index(self) -> torch.Tensor:
        """[B, k] int64, the surviving visual rows, ascending; -1 = filler, on the left."""
        survives = (self.index >= 0) & self.visual.gather(1, self.index.clamp(min=0))
        rows = torch.where(survives, self.index, -1).sort(dim=1).values
        return rows[:, rows.shape[1] - int(survives.sum(dim=1).amax()) :] if rows.numel() else rows
