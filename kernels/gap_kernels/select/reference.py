"""Exact ordered top-k in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def topk_indices(scores: Tensor, k: int, counts: Tensor | None, length: int) -> Tensor:
    """Select the best ``counts[b]`` (or ``k``) scores of each sample.

    Args:
        scores: [B, N] float32.
        k: How many to select in every sample; unused where ``counts`` is given.
        counts: [B] int64 or None.
        length: Columns of the result, at least the largest count.

    Returns:
        [B, length] int64, ascending in each row, filled with -1 on the left.
    """
    return first_ascending(best_first(scores), k, counts, length)


def best_first(scores: Tensor) -> Tensor:
    """Return the entries [B, N] of each sample from the best to the worst."""
    # `0.0 - x` turns the order around and makes one value of -0.0 and 0.0. An ascending sort puts NaN behind
    # everything else, and a stable one leaves ties in index order.
    return torch.sort(0.0 - scores, dim=-1, stable=True).indices


def first_ascending(order: Tensor, k: int, counts: Tensor | None, length: int) -> Tensor:
    """Return the first ``counts[b]`` (or ``k``) of ``order`` [B, N], sorted; arguments and result as above."""
    order = order[:, :length]  # [B, min(N, length)]
    rank = torch.arange(order.shape[1], device=order.device)
    limit = k if counts is None else counts[:, None]
    # Sorting the indices moves the -1 of what isn't selected to the left, where the filler belongs.
    selected = torch.where(rank < limit, order, -1).sort(dim=-1).values
    return F.pad(selected, (length - selected.shape[1], 0), value=-1)
