# mypy: disable-error-code="no-untyped-def"
"""Attention in Triton: a FlashAttention forward pass, with importance as a second sweep over few rows and columns.

A program of ``attention_kernel`` has one tile of query rows of one head and walks over the key tiles that its rows
see, first those that all rows see whole, then those on the diagonal. Importance is what ``visual_mass_kernel`` and
``mean_kernel`` of ``importance/kernel.py`` make of the log-sum-exp. Sums have a fixed order: runs agree bit for bit.

Dot products have their operands in the dtype of the inputs and add up in float32, as do the softmax statistics.
Float32 is multiplied in float32, never in TF32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..backends import triton_is_interpreted
from ..importance import kernel as importance_kernel
from ..importance.kernel import allowed_columns
from ..launch import cdiv, launch, next_power_of_2
from .reference import lse_at


@triton.jit
def load_vectors(pointer, usable, start, D: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """Return elements ``start .. start + BLOCK`` of the usable vectors, 0 elsewhere; [vectors, BLOCK]."""
    d = start + tl.arange(0, BLOCK)
    part = tl.load(pointer[:, None] + d[None, :], mask=usable[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:  # the interpreter gets bfloat16 wrong
        part = part.to(tl.float32)
    return part


@triton.jit
def scores_of(
    vectors,
    left_pointer,
    left_usable,
    right_pointer,
    right_usable,
    BLOCK_LEFT: tl.constexpr,
    BLOCK_RIGHT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the products [BLOCK_LEFT, BLOCK_RIGHT] of two tiles of vectors, 0 where one isn't usable.

    The left tile stays the same while the caller walks over right ones: ``vectors`` is the whole of it, if BLOCK_K
    covers vectors of length D. Longer ones are read BLOCK_K elements at a time, the left ones anew for every tile.
    """
    scores = tl.zeros((BLOCK_LEFT, BLOCK_RIGHT), tl.float32)
    for start in tl.static_range(0, D, BLOCK_K):
        left = vectors
        if BLOCK_K < D:
            left = load_vectors(left_pointer, left_usable, start, D, BLOCK_K, UPCAST)
        right = load_vectors(right_pointer, right_usable, start, D, BLOCK_K, UPCAST)
        scores = tl.dot(left, tl.trans(right), scores, input_precision="ieee")
    return scores


@triton.jit
def attend(
    accumulator,
    running_max,
    running_sum,
    vectors,
    row_pointer,
    row_usable,
    row_column,
    key,
    value,
    mask,
    batch,
    begin,
    end,
    key_stride_s,
    value_stride_s,
    mask_stride_b,
    mask_stride_s,
    num_keys,
    scale_log2,
    DIAGONAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Walk over the key tiles from ``begin`` to ``end`` and return what the first three arguments become.

    DIAGONAL says whether rows see only the columns up to their own here.
    """
    for start in range(begin, end, BLOCK_N):
        column = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        usable = allowed_columns(mask, batch, column, column < num_keys, mask_stride_b, mask_stride_s)
        logits = scores_of(
            vectors, row_pointer, row_usable, key + column * key_stride_s, usable,
            BLOCK_M, BLOCK_N, D, BLOCK_K, UPCAST,
        )  # fmt: skip
        visible = usable[None, :]
        if DIAGONAL:
            visible = visible & (column[None, :] <= row_column[:, None])
        logits = tl.where(visible, logits * scale_log2, -float("inf"))
        new_max = tl.maximum(running_max, tl.max(logits, 1))
        base = tl.where(new_max == -float("inf"), 0.0, new_max)  # nothing seen yet: avoids inf - inf
        weight = tl.exp2(logits - base[:, None])  # [BLOCK_M, BLOCK_N]
        shrink = tl.exp2(running_max - base)
        running_sum = running_sum * shrink + tl.sum(weight, 1)
        running_max = new_max
        # Hidden values aren't read: a weight of 0 doesn't hide a NaN.
        values = load_vectors(value + column * value_stride_s, usable, 0, D, BLOCK_D, UPCAST)
        accumulator = tl.dot(
            weight.to(values.dtype), values, accumulator * shrink[:, None], input_precision="ieee"
        )
    return accumulator, running_max, running_sum


# What changes from prompt to prompt isn't specialised on, or every new value could mean a new compilation.
@triton.jit(do_not_specialize=["mask_stride_b", "mask_stride_s", "num_query", "num_keys"])
def attention_kernel(
    query,
    key,
    value,
    mask,
    output,
    lse,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    value_stride_b,
    value_stride_h,
    value_stride_s,
    mask_stride_b,
    mask_stride_s,
    num_query,
    num_keys,
    scale_log2,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Output [B, Hq, Q, D] and natural log-sum-exp [B, Hq, Q] of one tile of rows of one head.

    Grid (B * Hq * row tiles): one axis, as the others end at 65535. A head's tiles follow one another, so that
    programs that run at the same time share keys, and the last rows come first: they see the most.
    """
    tiles = tl.cdiv(num_query, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch = batch_head // HEADS
    head = batch_head % HEADS
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_usable = row < num_query
    row_column = row + (num_keys - num_query)
    row_pointer = query + batch * query_stride_b + head * query_stride_h + row.to(tl.int64) * query_stride_s
    key += batch * key_stride_b + (head // GROUP) * key_stride_h
    value += batch * value_stride_b + (head // GROUP) * value_stride_h
    vectors = load_vectors(row_pointer, row_usable, 0, D, BLOCK_K, UPCAST)

    accumulator = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    running_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    whole = num_keys
    if CAUSAL:
        # Key tiles that even the tile's first row sees to their end.
        whole = (tile * BLOCK_M + (num_keys - num_query) + 1) // BLOCK_N * BLOCK_N
    accumulator, running_max, running_sum = attend(
        accumulator, running_max, running_sum, vectors, row_pointer, row_usable, row_column, key, value, mask,
        batch, 0, whole, key_stride_s, value_stride_s, mask_stride_b, mask_stride_s, num_keys, scale_log2,
        False, D, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_D, UPCAST,
    )  # fmt: skip
    if CAUSAL:
        seen = tl.minimum((tile + 1) * BLOCK_M + (num_keys - num_query), num_keys)
        accumulator, running_max, running_sum = attend(
            accumulator, running_max, running_sum, vectors, row_pointer, row_usable, row_column, key, value, mask,
            batch, whole, seen, key_stride_s, value_stride_s, mask_stride_b, mask_stride_s, num_keys, scale_log2,
            True, D, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_D, UPCAST,
        )  # fmt: skip

    nothing = running_sum == 0.0
    total = tl.where(nothing, 1.0, running_sum)
    position = batch_head * num_query + row
    row_lse = tl.where(nothing, -float("inf"), (running_max + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse + position, row_lse, mask=row_usable)
    d = tl.arange(0, BLOCK_D)
    tl.store(
        output + position[:, None] * D + d[None, :],
        (accumulator / total[:, None]).to(output.dtype.element_ty),
        mask=row_usable[:, None] & (d < D)[None, :],
    )


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
    """Launch the kernels; arguments and results as in ``reference.py``, for any dtype but float64."""
    batch, query_heads, num_query, head_dim = query.shape
    key_heads, num_keys = key.shape[1], key.shape[2]
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if batch:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        mask = None if attention_mask is None else attention_mask.view(torch.uint8)
        block_d = max(16, next_power_of_2(head_dim))
        chosen = tiles.attention(head_dim, query.dtype, query.device)
        launch(
            attention_kernel,
            (batch * query_heads * cdiv(num_query, chosen.rows),),
            (query, key, value, mask, output, lse),
            (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
            (*((0, 0) if mask is None else mask.stride()), num_query, num_keys),
            ((head_dim**-0.5 if scale is None else scale) * math.log2(math.e),),
            {
                "HEADS": query_heads,
                "GROUP": query_heads // key_heads,
                "CAUSAL": causal,
                "D": head_dim,
                "BLOCK_M": chosen.rows,
                "BLOCK_N": chosen.columns,
                "BLOCK_K": min(block_d, chosen.part),
                "BLOCK_D": block_d,
                "UPCAST": triton_is_interpreted(),
            },
            **chosen.options(),
        )
    if importance_columns is None:
        return output, lse, lse.new_empty((batch, 0))
    row_lse = lse_at(lse, importance_rows)
    importance = importance_kernel.visual_importance(
        query, key, importance_columns, importance_rows, attention_mask, row_lse, scale, causal
    )
    return output, lse, importance
