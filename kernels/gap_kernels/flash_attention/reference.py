"""Attention with log-sum-exp and importance in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import nested_blocks
from ..importance.reference import visual_importance


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    attention_mask: Tensor | None,
    scale: float | None,
    importance_rows: Tensor | None,
    importance_columns: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `gap_kernels.attention`; float64 inputs make it the oracle of the other paths.

    Args:
        query: [B, Hq, Q, D].
        key: [B, Hkv, S, D].
        value: [B, Hkv, S, D].
        causal: Whether a row sees no key after its own.
        attention_mask: [B, S] bool or None.
        scale: None = ``D ** -0.5``.
        importance_rows: [B, R] int64, -1 = filler; None = the last row.
        importance_columns: [B, V] int64, -1 = filler; None = no importance.

    Returns:
        Output [B, Hq, Q, D] in the dtype of ``query``, lse [B, Hq, Q], importance [B, V] (V = 0 for none); the
        last two are float64 for float64 queries, else float32.
    """
    batch, query_heads, num_query, head_dim = query.shape
    key_heads, num_keys = key.shape[1], key.shape[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query_heads // key_heads
    grouped = query.unflatten(1, (key_heads, group))  # [B, Hkv, G, Q, D]
    key_columns = key.to(dtype).transpose(-1, -2)  # [B, Hkv, D, S]
    values = value.to(dtype)
    if attention_mask is not None:
        # A weight of 0 doesn't hide a NaN, and what the mask hides may be anything.
        values = values.masked_fill(~attention_mask[:, None, :, None], 0.0)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=dtype, device=query.device)
    output_of, lse_of = output.unflatten(1, (key_heads, group)), lse.unflatten(1, (key_heads, group))
    column = torch.arange(num_keys, device=query.device)
    offset = (
        num_keys - num_query
    )  # a row's own column, counted from the end of the keys, is the last that it sees
    for samples, heads, rows in nested_blocks((batch, key_heads, num_query), group * num_keys):
        seen = slice(0, offset + rows.stop if causal else num_keys)
        scaled = grouped[samples, heads, :, rows].to(dtype) * (head_dim**-0.5 if scale is None else scale)
        # The rows of a group as those of one matrix, or keys and values would be copied for each of its heads.
        logits = scaled.flatten(2, 3) @ key_columns[samples, heads, :, seen]
        logits = logits.unflatten(2, scaled.shape[2:4])  # [b, hkv, G, rows, columns]
        hidden = (
            column[seen] > (column[offset:][rows] if causal else column[-1:])[:, None]
        )  # [rows or 1, columns]
        if attention_mask is not None:
            hidden = hidden | ~attention_mask[samples, None, None, None, seen]
        row_lse = logits.masked_fill_(hidden, float("-inf")).logsumexp(-1)
        # Filled, not left to the logits: a row that sees nothing has an lse of -inf.
        probability = logits.sub_(row_lse[..., None]).exp_().masked_fill_(hidden, 0.0)
        collected = probability.flatten(2, 3) @ values[samples, heads, seen]
        output_of[samples, heads, :, rows] = collected.unflatten(2, scaled.shape[2:4]).to(query.dtype)
        lse_of[samples, heads, :, rows] = row_lse
    if importance_columns is None:
        return output, lse, lse.new_empty((batch, 0))
    row_lse = lse_at(lse, importance_rows)
    importance = visual_importance(
        query, key, importance_columns, importance_rows, attention_mask, row_lse, scale, causal
    )
    return output, lse, importance


def lse_at(lse: Tensor, rows: Tensor | None) -> Tensor:
    """Return the entries [B, Hq, R] of ``lse`` [B, Hq, Q] at [B, R] int64; None = the last row.

    What stands in no row (-1 = filler; on a GPU also what is out of range) gets the entry of another row, which
    importance ignores.
    """
    if rows is None:
        return lse[:, :, -1:]
    index = rows.clamp(0, lse.shape[2] - 1)[:, None]
    return lse.gather(2, index.expand(-1, lse.shape[1], -1))
