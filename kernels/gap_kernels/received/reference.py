"""Attention received per key in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import row_blocks


def attention_received(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    scale: float | None,
    lse: Tensor | None,
) -> Tensor:
    """Compute `gap_kernels.attention_received`; float64 inputs make it the oracle of the other paths.

    Args:
        query: [B, H, S, D].
        key: [B, Hkv, S, D].
        attention_mask: [B, S] bool or None.
        cu_seqlens: [N+1] int32 or None.
        causal: Whether a row sees no key after its own.
        scale: None = ``D ** -0.5``.
        lse: [B, H, S] or None.

    Returns:
        [B, S], float64 for float64 queries, else float32.
    """
    batch, heads, num_tokens, head_dim = query.shape
    key_heads = key.shape[1]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.unflatten(1, (key_heads, heads // key_heads))  # [B, Hkv, G, S, D]
    key_columns = key.to(dtype).transpose(-1, -2)[:, :, None]  # [B, Hkv, 1, D, S]
    column = torch.arange(num_tokens, device=query.device)
    begin, end = spans(num_tokens, cu_seqlens, query.device)
    mass = torch.zeros((batch, num_tokens), dtype=dtype, device=query.device)
    for block in row_blocks(num_tokens, batch * heads * num_tokens):
        scaled = grouped[:, :, :, block].to(dtype) * (head_dim**-0.5 if scale is None else scale)
        logits = scaled @ key_columns  # [B, Hkv, G, rows, S]
        visible = (column >= begin[block, None]) & (column < end[block, None])  # [rows, S]
        if causal:
            visible = visible & (column <= column[block, None])
        if attention_mask is not None:
            real = attention_mask[:, None, None]
            visible = visible & real[..., None, :] & real[..., block, None]
        if lse is None:
            row_lse = logits.masked_fill(~visible, float("-inf")).logsumexp(-1)
        else:
            row_lse = lse[:, :, block].to(dtype).unflatten(1, (key_heads, heads // key_heads))
        # `where`, not a product: the log-sum-exp of padding is -inf, or arbitrary if given.
        probability = torch.where(visible, (logits - row_lse[..., None]).exp(), 0.0)
        mass += probability.sum((1, 2, 3))
    return mass / (heads * rows_of_sequence(attention_mask, begin, end).clamp(min=1))


def spans(num_tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first token, and the one after the last, of each token's own sequence; both [S] int32.

    The span of a token that is in no sequence is empty.
    """
    token = torch.arange(num_tokens, dtype=torch.int32, device=device)
    if cu_seqlens is None:
        return torch.zeros_like(token), torch.full_like(token, num_tokens)
    after = torch.searchsorted(cu_seqlens, token, right=True)
    # Nothing on a GPU checks the values, and a kernel must not read what isn't there.
    bounds = cu_seqlens.clamp(0, num_tokens)
    return bounds[(after - 1).clamp(min=0)], bounds[after.clamp(max=len(bounds) - 1)]


def rows_of_sequence(attention_mask: Tensor | None, begin: Tensor, end: Tensor) -> Tensor:
    """Return how many valid query rows the sequence of each token has, [B, S] or [1, S]."""
    if attention_mask is None:
        return (end - begin)[None]
    before = torch.nn.functional.pad(attention_mask.cumsum(-1), (1, 0))  # [B, S+1]
    return before[:, end] - before[:, begin]
