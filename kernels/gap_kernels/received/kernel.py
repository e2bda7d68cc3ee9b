# mypy: disable-error-code="no-untyped-def"
"""Attention received per key in Triton: two sweeps over the tiles of q k^T, neither of which stores one.

1. ``token_lse_kernel``: the log-sum-exp of each row; rows stay, keys go by (skipped where it is given);
2. ``received_mass_kernel``: the probability mass that each key receives; keys stay, rows go by, so that nothing has
   to be added across programs but key heads;
3. ``received_mean_kernel``: the mean over heads and rows, heads in a fixed order.

Runs agree bit for bit.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..backends import triton_is_interpreted
from ..flash_attention.kernel import load_vectors, scores_of
from ..importance.kernel import allowed_columns, over_heads
from ..launch import cdiv, launch, next_power_of_2
from .reference import rows_of_sequence, spans

MEAN_BLOCK = 128


@triton.jit
def span_of_tile(begin_of, end_of, token, usable, num_tokens):
    """Return the spans of a tile's tokens, and the span that covers them all.

    Without packing every token's span is the same, and a number rather than a tile.
    """
    if begin_of is None:
        first = 0
        last = num_tokens
        begin = 0
        end = num_tokens
    else:
        first = tl.load(begin_of + token, mask=usable, other=0)
        last = tl.load(end_of + token, mask=usable, other=0)
        begin = tl.min(tl.where(usable, first, num_tokens), 0)
        end = tl.max(last, 0)
    return first, last, begin, end


@triton.jit
def seen_by(row, row_usable, column, column_usable, CAUSAL: tl.constexpr):
    """Return which of the usable columns the usable rows see, but for sequences; the arguments broadcast."""
    seen = row_usable & column_usable
    if CAUSAL:
        seen = seen & (column <= row)
    return seen


# What changes from image to image isn't specialised on, or every new value could mean a new compilation.
@triton.jit(do_not_specialize=["mask_stride_b", "mask_stride_s", "num_tokens"])
def token_lse_kernel(
    query,
    key,
    mask,
    begin_of,
    end_of,
    lse,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    mask_stride_b,
    mask_stride_s,
    num_tokens,
    scale_log2,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_LEFT: tl.constexpr,
    BLOCK_RIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Log-sum-exp of one tile of rows of one head, in base 2: lse [B, H, S] float32. Grid (B * H * row tiles)."""
    tiles = tl.cdiv(num_tokens, BLOCK_LEFT)
    tile = tl.program_id(0) % tiles
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch = batch_head // HEADS
    head = batch_head % HEADS
    row = (tile * BLOCK_LEFT + tl.arange(0, BLOCK_LEFT)).to(tl.int64)
    row_usable = allowed_columns(mask, batch, row, row < num_tokens, mask_stride_b, mask_stride_s)
    row_pointer = query + batch * query_stride_b + head * query_stride_h + row * query_stride_s
    key += batch * key_stride_b + (head // GROUP) * key_stride_h
    vectors = load_vectors(row_pointer, row_usable, 0, D, BLOCK_K, UPCAST)
    first, last, begin, end = span_of_tile(begin_of, end_of, row, row_usable, num_tokens)
    if CAUSAL:
        end = tl.minimum(end, (tile + 1) * BLOCK_LEFT)

    running_max = tl.full((BLOCK_LEFT,), -float("inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_LEFT,), tl.float32)
    for start in range(begin, end, BLOCK_RIGHT):
        column = (start + tl.arange(0, BLOCK_RIGHT)).to(tl.int64)
        usable = allowed_columns(mask, batch, column, column < num_tokens, mask_stride_b, mask_stride_s)
        scores = scores_of(
            vectors, row_pointer, row_usable, key + column * key_stride_s, usable,
            BLOCK_LEFT, BLOCK_RIGHT, D, BLOCK_K, UPCAST,
        )  # fmt: skip
        seen = seen_by(row[:, None], row_usable[:, None], column[None, :], usable[None, :], CAUSAL)
        if begin_of is not None:
            seen = seen & (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None])
        logits = tl.where(seen, scores * scale_log2, -float("inf"))
        new_max = tl.maximum(running_max, tl.max(logits, 1))
        base = tl.where(new_max == -float("inf"), 0.0, new_max)  # nothing seen yet: avoids inf - inf
        running_sum = running_sum * tl.exp2(running_max - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        running_max = new_max
    total = tl.where(running_sum == 0.0, 1.0, running_sum)  # padding: never used
    tl.store(lse + batch_head * num_tokens + row, running_max + tl.log2(total), mask=row < num_tokens)


@triton.jit(do_not_specialize=["mask_stride_b", "mask_stride_s", "num_tokens"])
def received_mass_kernel(
    query,
    key,
    mask,
    begin_of,
    end_of,
    lse,
    mass,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    mask_stride_b,
    mask_stride_s,
    num_tokens,
    scale_log2,
    lse_factor,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_LEFT: tl.constexpr,
    BLOCK_RIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Probability mass that one tile of keys receives from the rows of all query heads that share them.

    Grid (B * Hkv * key tiles); mass [B, Hkv, S] float32. ``lse_factor`` turns ``lse`` [B, H, S] into base 2.
    """
    tiles = tl.cdiv(num_tokens, BLOCK_LEFT)
    tile = tl.program_id(0) % tiles
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch = batch_head // KEY_HEADS
    key_head = batch_head % KEY_HEADS
    column = (tile * BLOCK_LEFT + tl.arange(0, BLOCK_LEFT)).to(tl.int64)
    column_usable = allowed_columns(mask, batch, column, column < num_tokens, mask_stride_b, mask_stride_s)
    column_pointer = key + batch * key_stride_b + key_head * key_stride_h + column * key_stride_s
    vectors = load_vectors(column_pointer, column_usable, 0, D, BLOCK_K, UPCAST)
    # A column is seen by rows of its own sequence, so the span of its rows is its own.
    first, last, begin, end = span_of_tile(begin_of, end_of, column, column_usable, num_tokens)
    if CAUSAL:
        begin = tl.maximum(begin, tile * BLOCK_LEFT)

    received = tl.zeros((BLOCK_LEFT, BLOCK_RIGHT), tl.float32)
    for member in range(GROUP):
        head = key_head * GROUP + member
        head_query = query + batch * query_stride_b + head * query_stride_h
        head_lse = lse + (batch * KEY_HEADS * GROUP + head) * num_tokens
        for start in range(begin, end, BLOCK_RIGHT):
            row = (start + tl.arange(0, BLOCK_RIGHT)).to(tl.int64)
            usable = allowed_columns(mask, batch, row, row < num_tokens, mask_stride_b, mask_stride_s)
            scores = scores_of(
                vectors, column_pointer, column_usable, head_query + row * query_stride_s, usable,
                BLOCK_LEFT, BLOCK_RIGHT, D, BLOCK_K, UPCAST,
            )  # fmt: skip
            row_lse = tl.load(head_lse + row, mask=usable, other=0.0) * lse_factor
            seen = seen_by(row[None, :], usable[None, :], column[:, None], column_usable[:, None], CAUSAL)
            if begin_of is not None:
                seen = seen & (row[None, :] >= first[:, None]) & (row[None, :] < last[:, None])
            # What isn't seen may be anything: a log-sum-exp of padding is arbitrary.
            received += tl.where(seen, tl.exp2(scores * scale_log2 - row_lse[None, :]), 0.0)
    tl.store(mass + batch_head * num_tokens + column, tl.sum(received, 1), mask=column < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def received_mean_kernel(
    mass, rows, received, num_tokens, KEY_HEADS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    """Mean over heads and valid rows: mass [B, Hkv, S] -> received [B, S]. Grid (token tiles, B).

    ``rows`` [B, S] says how many rows the sequence of each token has; None = S.
    """
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    total = over_heads(
        mass + batch * KEY_HEADS * num_tokens, num_tokens, token, inside, KEY_HEADS, BLOCK, False
    )
    if rows is None:
        count = tl.full((BLOCK,), num_tokens, tl.float32)
    else:
        count = tl.load(rows + batch * num_tokens + token, mask=inside, other=0).to(tl.float32)
    tl.store(received + batch * num_tokens + token, total / (HEADS * tl.maximum(count, 1.0)), mask=inside)


def attention_received(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    scale: float | None,
    lse: Tensor | None,
) -> Tensor:
    """Launch the three kernels; arguments and result as in ``reference.py``, for any dtype but float64."""
    batch, heads, num_tokens, head_dim = query.shape
    key_heads = key.shape[1]
    received = torch.empty((batch, num_tokens), dtype=torch.float32, device=query.device)
    if received.numel() == 0:
        return received

    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    mask = None if attention_mask is None else attention_mask.view(torch.uint8)
    begin = end = rows = None
    if mask is not None or cu_seqlens is not None:
        begin, end = spans(num_tokens, cu_seqlens, query.device)
        rows = rows_of_sequence(attention_mask, begin, end)
        if cu_seqlens is None:
            begin = end = None
    strides = (*query.stride()[:3], *key.stride()[:3])
    sizes = (*((0, 0) if mask is None else mask.stride()), num_tokens)
    scale_log2 = (head_dim**-0.5 if scale is None else scale) * math.log2(math.e)
    chosen = tiles.received(head_dim, query.dtype, query.device)
    constants = {
        "GROUP": heads // key_heads,
        "CAUSAL": causal,
        "D": head_dim,
        "BLOCK_LEFT": chosen.rows,
        "BLOCK_RIGHT": chosen.columns,
        "BLOCK_K": min(max(16, next_power_of_2(head_dim)), chosen.part),
        "UPCAST": triton_is_interpreted(),
    }
    options = chosen.options()

    mass = torch.empty((batch, key_heads, num_tokens), dtype=torch.float32, device=query.device)
    lse_factor = math.log2(math.e)
    if lse is None:
        lse_factor = 1.0
        lse = torch.empty((batch, heads, num_tokens), dtype=torch.float32, device=query.device)
        launch(
            token_lse_kernel,
            (batch * heads * cdiv(num_tokens, chosen.rows),),
            (query, key, mask, begin, end, lse),
            strides,
            sizes,
            (scale_log2,),
            {"HEADS": heads, **constants},
            **options,
        )
    else:
        lse = lse.float().contiguous()
    launch(
        received_mass_kernel,
        (batch * key_heads * cdiv(num_tokens, chosen.rows),),
        (query, key, mask, begin, end, lse, mass),
        strides,
        sizes,
        (scale_log2, lse_factor),
        {"KEY_HEADS": key_heads, **constants},
        **options,
    )
    launch(
        received_mean_kernel,
        (cdiv(num_tokens, MEAN_BLOCK), batch),
        (mass, rows, received),
        (),
        (num_tokens,),
        (),
        {"KEY_HEADS": key_heads, "HEADS": heads, "BLOCK": MEAN_BLOCK},
    )
    return received
