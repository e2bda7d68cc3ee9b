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
        per_region: An entry that fewer than this many of its neighbours beat is a candidate; 0 = as many as are needed.
        k: How many to select in every sample; unused where ``counts`` is given.
        counts: [B] int64 or None.
        length: Columns of the result.

    Returns:
        [B, length] int64, ascending in each row, filled with -1 on the left.
    """
    budget = scores.new_full((len(scores),), k, dtype=torch.int64) if counts is None else counts
    order = candidates_first(
        scores, neighbours, per_region, budget, torch.ones_like(scores, dtype=torch.bool)
    )
    return first_ascending(order, k, counts, length)


def candidates_first(
    scores: Tensor, neighbours: Tensor, per_region: int, budget: Tensor, real: Tensor
) -> Tensor:
    """Return the entries of each sample in the order in which they are selected.

    Args:
        scores: [B, N] float32.
        neighbours: [B, N, R] or [1, N, R], ints.
        per_region: As above.
        budget: [B] int64, how many are selected.
        real: [B, N] bool, False at filler, which beats nothing and comes last.

    Returns:
        [B, N] int64: all candidates before all others, and each from the best to the worst.
    """
    batch, num_entries = scores.shape
    place = best_first(scores).argsort(-1)  # [B, N], 0 = the best entry
    neighbours = neighbours.expand(batch, -1, -1)
    inside = (neighbours >= 0) & (neighbours < num_entries)
    source = torch.where(inside, neighbours, 0).flatten(1).long()
    inside = inside & real.gather(1, source).view_as(inside)
    beats = inside & (place.gather(1, source).view_as(neighbours) < place[:, :, None])
    wanted: int | Tensor = per_region
    if per_region == 0:
        entry = torch.arange(num_entries, device=scores.device)[:, None]
        # A region is counted at its first entry.
        regions = ((~inside | (neighbours > entry)).all(-1) & real).sum(-1).clamp(min=1)
        wanted = ((budget + regions - 1) // regions).clamp(min=1)[:, None]
    candidate = beats.sum(-1) < wanted
    return (place + num_entries * (2 * ~real + 1 * ~candidate)).argsort(-1)
