"""Attention-based importance in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..blocks import row_blocks


def visual_importance(
    query: Tensor,
    key: Tensor,
    visual_index: Tensor,
    rows: Tensor | None,
    attention_mask: Tensor | None,
    lse: Tensor | None,
    scale: float | None,
    causal: bool = True,
    value: Tensor | None = None,
    head_reduction: str = "mean",
) -> Tensor:
    """Compute `gap_kernels.visual_importance`; float64 inputs make it the oracle of the other paths.

    Only the wanted rows are scored, a block of them at a time, and query heads are grouped by the key head that they
    share, so neither an R x S matrix nor repeated keys are ever built.

    Args:
        query: [B, Hq, Q, D].
        key: [B, Hkv, S, D].
        visual_index: [B, V] int64, -1 = filler.
        rows: [B, R] int64, -1 = filler; None = the last row.
        attention_mask: [B, S] bool or None.
        lse: [B, Hq, R] or None.
        scale: None = ``D ** -0.5``.
        causal: Whether a row sees no key after its own.
        value: [B, Hkv, S, Dv] or None.
        head_reduction: "mean" or "max".

    Returns:
        [B, V], float64 for float64 queries, else float32.
    """
    query_heads, key_heads = query.shape[1], key.shape[1]
    rows = last_row(query) if rows is None else rows
    norm = None
    if value is not None:
        columns = visual_index.clamp(min=0) + key.shape[2] - query.shape[2]
        norm = take(value, columns).to(accumulation_dtype(query)).abs().sum(-1)[:, :, None, None]
    per_head = head_reduction == "max"
    over, shape = ((3,), (key_heads, query_heads // key_heads)) if per_head else ((1, 2, 3), ())
    size = (query.shape[0], *shape, visual_index.shape[1])
    mass = torch.zeros(size, dtype=accumulation_dtype(query), device=query.device)
    for _, weight, counted in attended(query, key, visual_index, rows, attention_mask, lse, scale, causal):
        if norm is not None:
            weight = weight * norm
        # `where`, not a product: what isn't counted may be NaN (a row that sees nothing has an lse of -inf).
        mass += torch.where(counted, weight, 0.0).sum(over)
    valid_rows = (rows >= 0).sum(-1, keepdim=True).clamp(min=1)
    if per_head:
        return mass.amax((1, 2)) / valid_rows
    return mass / (query_heads * valid_rows)


def attended(
    query: Tensor,
    key: Tensor,
    visual_index: Tensor,
    rows: Tensor,
    attention_mask: Tensor | None,
    lse: Tensor | None,
    scale: float | None,
    causal: bool,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield what rows attend to visual tokens with, some rows at a time; arguments as in `visual_importance`.

    Yields:
        Which of ``rows`` [B, R] these are, r of them; their weights [B, Hkv, G, r, V]; and which of these count, bool of
        a shape that broadcasts to theirs. Others may be NaN.
    """
    batch, query_heads, num_rows, head_dim = query.shape
    key_heads, num_keys = key.shape[1], key.shape[2]
    group = query_heads // key_heads
    dtype = accumulation_dtype(query)
    offset = num_keys - num_rows  # key column of query row 0

    def grouped(tensor: Tensor) -> Tensor:  # [B, Hq, ...] into [B, Hkv, G, ...]
        return tensor.to(dtype).unflatten(1, (key_heads, group))

    wanted = grouped(take(query, rows)) * (head_dim**-0.5 if scale is None else scale)  # [B, Hkv, G, R, D]
    given_lse = None if lse is None else grouped(lse)  # [B, Hkv, G, R]
    every_column = torch.arange(num_keys, device=query.device).expand(batch, num_keys)
    every_key = key.to(dtype).transpose(-1, -2) if lse is None else None
    columns = visual_index.clamp(min=0) + offset
    visual_key = take(key, columns).to(dtype).transpose(-1, -2)  # [B, Hkv, D, V]
    widest = max(columns.shape[1], num_keys if lse is None else 0)
    for block in row_blocks(rows.shape[1], batch * query_heads * widest):
        row = rows[:, block]  # [B, r]
        asking = wanted[:, :, :, block].flatten(2, 3)  # [B, Hkv, G * r, D]
        if every_key is None:
            assert given_lse is not None
            row_lse = given_lse[..., block]
        else:
            logits = (asking @ every_key).unflatten(2, (group, row.shape[1]))  # [B, Hkv, G, r, S]
            hidden = ~_visible(every_column, row + offset, attention_mask, causal)
            row_lse = logits.masked_fill_(hidden, float("-inf")).logsumexp(-1)
        logits = (asking @ visual_key).unflatten(2, (group, row.shape[1]))  # [B, Hkv, G, r, V]
        real = (visual_index >= 0)[:, None, :] & (row >= 0)[:, :, None]  # [B, r, V]
        counted = _visible(columns, row + offset, attention_mask, causal) & real[:, None, None]
        yield block, (logits - row_lse[..., None]).exp(), counted


def accumulation_dtype(query: Tensor) -> torch.dtype:
    """Return float64 for float64 queries, else float32."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def last_row(query: Tensor) -> Tensor:
    """Return [B, 1] int64, the row that scores where none are named."""
    return torch.full((query.shape[0], 1), query.shape[2] - 1, dtype=torch.int64, device=query.device)


def take(tensor: Tensor, position: Tensor) -> Tensor:
    """Gather [B, H, S, D] at [B, P] int64 into [B, H, P, D]; filler (-1) reads position 0."""
    index = position.clamp(min=0)[:, None, :, None]
    return tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def _visible(columns: Tensor, row_columns: Tensor, attention_mask: Tensor | None, causal: bool) -> Tensor:
    """Return [B, 1, 1, R, P] bool: which of ``columns`` [B, P] the rows at ``row_columns`` [B, R] see."""
    visible = (columns[:, None, :] <= row_columns[:, :, None]) | (not causal)
    if attention_mask is not None:
        visible = visible & attention_mask.gather(1, columns)[:, None, :]
    return visible[:, None, None]
