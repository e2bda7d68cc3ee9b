"""Attention over what RoPE makes of it, in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import torch
from torch import Tensor

from ..importance.reference import accumulation_dtype, attended, last_row


def corrected_importance(
    query: Tensor,
    key: Tensor,
    visual_index: Tensor,
    cos: Tensor,
    sin: Tensor,
    turns: Tensor,
    heads: int,
    rows: Tensor | None,
    attention_mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Compute `gap_kernels.corrected_importance`; float64 inputs make it the oracle of the other paths.

    Args:
        query: [B, Hq, Q, D].
        key: [B, Hkv, S, D].
        visual_index: [B, V] int64, -1 = filler.
        cos: [B, Q, E].
        sin: [B, Q, E].
        turns: [D] int64, -E..E.
        heads: 1 to Hq.
        rows: [B, R] int64, -1 = filler; None = the last row.
        attention_mask: [B, S] bool or None.
        scale: None = ``D ** -0.5``.

    Returns:
        [B, V], float64 for float64 queries, else float32.
    """
    batch, query_heads, _, head_dim = query.shape
    rows = last_row(query) if rows is None else rows
    ones = turned_ones(cos, sin, turns, accumulation_dtype(query))

    def ones_at(index: Tensor) -> Tensor:
        return ones.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, head_dim))

    of_tokens = ones_at(visual_index).transpose(1, 2)  # [B, D, V]
    size = (batch, key.shape[1], query_heads // key.shape[1], visual_index.shape[1])
    total = torch.zeros(size, dtype=ones.dtype, device=query.device)
    for block, weight, counted in attended(query, key, visual_index, rows, attention_mask, None, scale, True):
        by_rope = ones_at(rows[:, block]) @ of_tokens * head_dim**-0.5  # [B, r, V]
        # Nothing over what RoPE makes 0 of is nothing, too.
        total += torch.where(counted & (weight != 0), weight / by_rope[:, None, None], 0.0).sum(3)
    return mean_of_best(total.flatten(1, 2), heads) / (rows >= 0).sum(1, keepdim=True).clamp(min=1)


def turned_ones(cos: Tensor, sin: Tensor, turns: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [B, Q, D], what RoPE makes of ones in each row; arguments as above."""
    if cos.shape[2] == 0:
        return torch.ones(*cos.shape[:2], len(turns), dtype=dtype, device=cos.device)
    channel = (turns.abs() - 1).clamp(min=0)
    ones = cos.to(dtype).index_select(2, channel) + sin.to(dtype).index_select(2, channel) * turns.sign()
    return torch.where(turns == 0, 1.0, ones)


def mean_of_best(total: Tensor, heads: int) -> Tensor:
    """Return [B, V], the mean of ``total`` [B, H, V] over the ``heads`` heads that have the most of it."""
    best = total.sum(2).argsort(dim=1, descending=True, stable=True)[:, :heads]
    return total.gather(1, best[..., None].expand(-1, -1, total.shape[2])).mean(1)
