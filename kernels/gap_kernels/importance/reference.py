"""Attention-based importance in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

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
    batch, query_heads, num_rows, head_dim = query.shape
    key_heads, num_keys = key.shape[1], key.shape[2]
    group = query_heads // key_heads
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    offset = num_keys - num_rows  # key column of query row 0
    if rows is None:
        rows = torch.full((batch, 1), num_rows - 1, dtype=torch.int64, device=query.device)

    def grouped(tensor: Tensor) -> Tensor:  # [B, Hq, ...] into [B, Hkv, G, ...]
        return tensor.to(dtype).unflatten(1, (key_heads, group))

    wanted = grouped(_take(query, rows)) * (head_dim**-0.5 if scale is None else scale)  # [B, Hkv, G, R, D]
    given_lse = None if lse is None else grouped(lse)  # [B, Hkv, G, R]
    every_column = torch.arange(num_keys, device=query.device).expand(batch, num_keys)
    every_key = key.to(dtype).transpose(-1, -2) if lse is None else None
    columns = visual_index.clamp(min=0) + offset
    visual_key = _take(key, columns).to(dtype).transpose(-1, -2)  # [B, Hkv, D, V]
    norm = None if value is None else _take(value, columns).to(dtype).abs().sum(-1)[:, :, None, None]
    over, shape = ((3,), (batch, key_heads, group)) if head_reduction == "max" else ((1, 2, 3), (batch,))
    mass = torch.zeros((*shape, columns.shape[1]), dtype=dtype, device=query.device)
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
        weight = (logits - row_lse[..., None]).exp()
        if norm is not None:
            weight = weight * norm
        # `where`, not a product: what isn't counted may be NaN (a row that sees nothing has an lse of -inf).
        mass += torch.where(counted, weight, 0.0).sum(over)
    valid_rows = (rows >= 0).sum(-1, keepdim=True).clamp(min=1)
    if head_reduction == "max":
        return mass.amax((1, 2)) / valid_rows
    return mass / (query_heads * valid_rows)


def _take(tensor: Tensor, position: Tensor) -> Tensor:
    """Gather [B, H, S, D] at [B, P] int64 into [B, H, P, D]; filler (-1) reads position 0."""
    index = position.clamp(min=0)[:, None, :, None]
    return tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def _visible(columns: Tensor, row_columns: Tensor, attention_mask: Tensor | None, causal: bool) -> Tensor:
    """Return [B, 1, 1, R, P] bool: which of ``columns`` [B, P] the rows at ``row_columns`` [B, R] see."""
    visible = (columns[:, None, :] <= row_columns[:, :, None]) | (not causal)
    if attention_mask is not None:
        visible = visible & attention_mask.gather(1, columns)[:, None, :]
    return visible[:, None, None]
