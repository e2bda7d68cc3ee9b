"""Attention-based importance in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Compute :func:`gap_kernels.visual_importance`; float64 inputs make it the oracle of the other paths.

    Only the wanted rows are scored, and query heads are grouped by the key head that they share, so neither a
    Q x S matrix nor repeated keys are ever built.

    Args:
        query: [B, Hq, Q, D].
        key: [B, Hkv, S, D].
        visual_index: int64 [B, V], -1 = filler.
        rows: int64 [B, R], -1 = filler; None = the last row.
        attention_mask: bool [B, S] or None.
        lse: [B, Hq, R] or None.
        scale: None = ``D ** -0.5``.
        causal: whether a row sees no key after its own.
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

    wanted = _take(query, rows).to(dtype) * (head_dim**-0.5 if scale is None else scale)  # [B, Hq, R, D]
    wanted = wanted.reshape(batch, key_heads, group * rows.shape[1], head_dim)
    if lse is None:
        columns = torch.arange(num_keys, device=query.device).expand(batch, num_keys)
        logits = wanted @ key.to(dtype).transpose(-1, -2)
        logits = logits.unflatten(2, (group, rows.shape[1]))  # [B, Hkv, G, R, S]
        hidden = ~_visible(columns, rows + offset, attention_mask, causal)
        lse = logits.masked_fill(hidden, float("-inf")).logsumexp(-1)
    else:
        lse = lse.to(dtype).unflatten(1, (key_heads, group))  # [B, Hkv, G, R]

    columns = visual_index.clamp(min=0) + offset
    logits = wanted @ _take(key, columns).to(dtype).transpose(-1, -2)
    logits = logits.unflatten(2, (group, rows.shape[1]))  # [B, Hkv, G, R, V]
    real = (visual_index >= 0)[:, None, :] & (rows >= 0)[:, :, None]  # [B, R, V]
    counted = _visible(columns, rows + offset, attention_mask, causal) & real[:, None, None]
    weight = (logits - lse[..., None]).exp()
    if value is not None:
        weight = weight * _take(value, columns).to(dtype).abs().sum(-1)[:, :, None, None]
    # `where`, not a product: what isn't counted may be NaN (a row that sees nothing has an lse of -inf).
    weight = torch.where(counted, weight, 0.0)
    valid_rows = (rows >= 0).sum(-1, keepdim=True).clamp(min=1)
    if head_reduction == "max":
        return weight.sum(3).amax((1, 2)) / valid_rows
    return weight.sum((1, 2, 3)) / (query_heads * valid_rows)


def _take(tensor: Tensor, position: Tensor) -> Tensor:
    """Gather [B, H, S, D] at int64 [B, P] into [B, H, P, D]; filler (-1) reads position 0."""
    index = position.clamp(min=0)[:, None, :, None]
    return tensor.gather(2, index.expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def _visible(columns: Tensor, row_columns: Tensor, attention_mask: Tensor | None, causal: bool) -> Tensor:
    """Return bool [B, 1, 1, R, P]: which of ``columns`` [B, P] the rows at ``row_columns`` [B, R] see."""
    visible = (columns[:, None, :] <= row_columns[:, :, None]) | (not causal)
    if attention_mask is not None:
        visible = visible & attention_mask.gather(1, columns)[:, None, :]
    return visible[:, None, None]
