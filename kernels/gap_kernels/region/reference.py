"""Region-wise top-k in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import torch
from torch import Tensor

from ..select.reference import best_first, first_ascending


def topk_per_region(
    scores: Tensor, neighbours: Tensor, per_region: int, k: int, counts: Tensor | None, length: int
) -> Tensor:
    """Select the best ``counts[b]`` (or ``k``) candidates of each sample, and the best others where they are fewer.

    Args:
        scores: [B, N] float32.
        neighbours: [B, N, R] or [1, N, R] int32; what is outside 0..N-1 is none.
        per_region: An entry that fewer than this many of its neighbours beat is a candidate.
        k: How many to select in every sample; unused where ``counts`` is given.
        counts: [B] int64 or None.
        length: Columns of the result.

    Returns:
        [B, length] int64, ascending in each row, filled with -1 on the left.
    """
    batch, num_entries = scores.shape
    place = best_first(scores).argsort(-1)  # [B, N], 0 = the best entry
    neighbours = neighbours.expand(batch, -1, -1)
    real = (neighbours >= 0) & (neighbours < num_entries)
    source = torch.where(real, neighbours, 0).flatten(1).long()
    beats = place.gather(1, source).view_as(neighbours) < place[:, :, None]
    candidate = (real & beats).sum(-1) < per_region
    # All candidates come before all others.
    order = torch.where(candidate, place, place + num_entries).argsort(-1)
    return first_ascending(order, k, counts, length)
