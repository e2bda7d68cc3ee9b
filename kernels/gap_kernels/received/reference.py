"""Attention received per key in plain PyTorch: the definition that every other path must reproduce."""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor

from ..blocks import nested_blocks


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
    groups = (key_heads, heads // key_heads)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    factor = head_dim**-0.5 if scale is None else scale
    grouped = query.unflatten(1, groups)  # [B, Hkv, G, S, D]
    key_columns = key.to(dtype).transpose(-1, -2)  # [B, Hkv, D, S]
    row_lse = None if lse is None else lse.to(dtype).unflatten(1, groups)[..., None]
    begin, end = spans(num_tokens, cu_seqlens, query.device)
    bounds = None if cu_seqlens is None else (begin, end)
    mass = torch.zeros((batch, num_tokens), dtype=dtype, device=query.device)
    for first, after in _separate_spans(num_tokens, cu_seqlens):
        length = after - first
        for samples, some_heads, block in nested_blocks((batch, key_heads, length), groups[1] * length):
            rows = slice(first + block.start, first + block.stop)
            columns = slice(first, rows.stop if causal else after)
            scaled = grouped[samples, some_heads, :, rows].to(dtype) * factor  # [b, hkv, G, rows, D]
            # The rows of a group are those of one matrix, or the keys would be copied for each of its heads.
            logits = scaled.flatten(2, 3) @ key_columns[samples, some_heads, :, columns]
            logits = logits.unflatten(2, scaled.shape[2:4])  # [b, hkv, G, rows, columns]
            real = None if attention_mask is None else attention_mask[samples]
            hidden = _hidden(rows, columns, bounds, causal, real, query.device)
            if hidden is not None:
                logits.masked_fill_(hidden, float("-inf"))
            if row_lse is None:
                probability = logits.softmax(-1)
            else:
                probability = logits.sub_(row_lse[samples, some_heads, :, rows]).exp_()
            if hidden is not None:
                # A row of padding sees nothing, which makes a softmax NaN; its log-sum-exp may be anything if given.
                probability.masked_fill_(hidden, 0.0)
            mass[samples, columns] += probability.sum((1, 2, 3))
    return mass / (heads * rows_of_sequence(attention_mask, begin, end).clamp(min=1))


def _separate_spans(num_tokens: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    """Return spans of tokens that see nothing beyond their own: each sequence, where to read them waits for no GPU."""
    if cu_seqlens is None or not cu_seqlens.is_cpu:
        return [(0, num_tokens)]
    # The operator checks the values; the definition itself, which kernels are held against, takes any, as they do.
    bounds = [min(max(bound, 0), num_tokens) for bound in cu_seqlens.tolist()]
    return [(first, after) for first, after in pairwise(bounds) if first < after]


def _hidden(
    rows: slice,
    columns: slice,
    bounds: tuple[Tensor, Tensor] | None,
    causal: bool,
    real: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Return what rows don't see of columns, [b or 1, 1, 1, rows, columns]; None: nothing.

    ``bounds`` are those of packed sequences, from `spans`; ``real`` [b, S] bool is False for padding.
    """
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    column = torch.arange(columns.start, columns.stop, device=device)
    hidden = []
    if bounds is not None:
        begin, end = bounds
        hidden.append((column < begin[rows, None]) | (column >= end[rows, None]))
    if causal:
        hidden.append(column > row)
    if real is not None:
        hidden.append(~(real[:, rows, None] & real[:, None, columns])[:, None, None])
    return functools.reduce(torch.bitwise_or, hidden) if hidden else None


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
