# mypy: disable-error-code="no-untyped-def"
"""Attention over what RoPE makes of it, in Triton: neither is stored for a row and a token.

1. ``row_lse_kernel`` of importance: maximum and sum of each wanted row's exponentials;
2. ``corrected_mass_kernel``: per query head and tile of visual tokens, the sum over the rows of probabilities divided by
   what RoPE makes of them, and the sum of that over the tile;
3. ``best_heads_kernel``: which heads have the most, and their mean.

Partial results go to plain stores and are added in a fixed order: runs agree bit for bit.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..backends import triton_is_interpreted
from ..importance.kernel import (
    allowed_columns,
    combine_statistics,
    count_valid,
    load_statistics,
    locate_rows,
    part_of,
    probabilities,
    row_statistics,
    visible_logits,
)
from ..launch import cdiv, launch, next_power_of_2

ROPE_PART = 16
"""Channels of turned vectors at a time: they are in float32, which is not for tensor cores."""
HEAD_TOKENS = 32
"""Visual tokens of a program of ``best_heads_kernel``."""
HEAD_TILES = 16
"""Tiles whose sums it adds at a time."""


@triton.jit
def turned_ones(cos, sin, inside, turn, E: tl.constexpr):
    """Return what RoPE makes of ones in some channels, of rows at the pointers ``cos`` and ``sin``, in float32.

    ``turn`` broadcasts with the pointers. Nothing is read of rows that aren't ``inside``.
    """
    channel = tl.abs(turn) - 1
    is_turned = (channel >= 0) & (channel < E)
    c = tl.load(cos + channel, mask=inside & is_turned, other=0.0).to(tl.float32)
    s = tl.load(sin + channel, mask=inside & is_turned, other=0.0).to(tl.float32)
    return tl.where(is_turned, tl.where(turn < 0, c - s, c + s), 1.0)


# What changes from prompt to prompt isn't specialised on, or every new value could mean a new compilation.
@triton.jit(
    do_not_specialize=[
        "mask_stride_b", "mask_stride_s", "num_query", "num_keys", "num_rows", "num_visual", "splits",
    ]
)  # fmt: skip
def corrected_mass_kernel(
    query,
    key,
    visual_index,
    rows,
    mask,
    cos,
    sin,
    turns,
    partial_max,
    partial_sum,
    mass,
    sums,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    cos_stride_b,
    cos_stride_s,
    sin_stride_b,
    sin_stride_s,
    mask_stride_b,
    mask_stride_s,
    num_query,
    num_keys,
    num_rows,
    num_visual,
    splits,
    scale_log2,
    rope_scale,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (visual tiles, B * Hq); mass [B, Hq, V] and sums [B, Hq, visual tiles] float32."""
    HEADS: tl.constexpr = KEY_HEADS * GROUP
    tile, batch_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = batch_head // HEADS, batch_head % HEADS
    slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    position = tl.load(visual_index + batch * num_visual + slot, mask=slot < num_visual, other=-1)
    column = position + (num_keys - num_query)
    inside = (position >= 0) & (position < num_query)
    usable = allowed_columns(mask, batch, column, inside, mask_stride_b, mask_stride_s)
    keys = key + batch * key_stride_b + (head // GROUP) * key_stride_h + column * key_stride_s
    cos += batch * cos_stride_b
    sin += batch * sin_stride_b
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, num_rows, BLOCK_M):
        queries, last_column = locate_rows(
            query, rows, batch, head, start, query_stride_b, query_stride_h, query_stride_s,
            num_query, num_keys, num_rows, 1, BLOCK_M, True,
        )  # fmt: skip
        m = start + tl.arange(0, BLOCK_M)
        maximum, part = load_statistics(
            partial_max, partial_sum, batch_head * num_rows + m, m < num_rows, splits, BLOCK_SPLITS
        )
        is_row, row = last_column >= 0, last_column - (num_keys - num_query)
        by_rope = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for part_start in range(0, D, BLOCK_E):
            d = part_start + tl.arange(0, BLOCK_E)
            turn = tl.load(turns + d, mask=d < D, other=0)
            of_row = turned_ones(
                (cos + row * cos_stride_s)[:, None],
                (sin + row * sin_stride_s)[:, None],
                is_row[:, None],
                turn[None, :],
                E,
            )
            of_row = tl.where((d < D)[None, :], of_row, 0.0)
            of_token = turned_ones(
                (cos + position * cos_stride_s)[None, :], (sin + position * sin_stride_s)[None, :], inside[None, :],
                turn[:, None], E,
            )  # fmt: skip
            by_rope = tl.dot(of_row, of_token, by_rope, input_precision="ieee")
        logits = visible_logits(
            None, None, queries, last_column, keys, column, inside, usable, scale_log2,
            D, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST,
        )  # fmt: skip
        probability = probabilities(logits, combine_statistics(maximum, part), None)
        # Nothing over what RoPE makes 0 of is nothing, too.
        total += tl.sum(probability / tl.where(probability == 0.0, 1.0, by_rope * rope_scale), 0)
    tl.store(mass + batch_head * num_visual + slot, total, mask=slot < num_visual)
    tl.store(sums + batch_head * tl.num_programs(0) + tile, tl.sum(total, 0))


@triton.jit
def ranks(total, head, HEADS: tl.constexpr):
    """Return how many of the HEADS heads come before each: those with more, and lower ones with as much. NaN is the most."""
    left, right = total[:, None], total[None, :]
    left_is_nan, right_is_nan = left != left, right != right
    more = (right > left) | (right_is_nan & (left == left))
    as_much = (right == left) | (right_is_nan & left_is_nan)
    before = (more | (as_much & (head[None, :] < head[:, None]))) & (head < HEADS)[None, :]
    return tl.sum(before.to(tl.int32), 1)


@triton.jit(do_not_specialize=["num_query", "num_rows", "num_visual", "num_tiles", "count"])
def best_heads_kernel(
    mass,
    sums,
    rows,
    scores,
    num_query,
    num_rows,
    num_visual,
    num_tiles,
    count,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean over the best heads and the valid rows: mass [B, Hq, V], sums [B, Hq, tiles] to scores [B, V].

    Grid (visual tiles of its own, B).
    """
    batch = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)
    of_head = batch * HEADS + head
    total = tl.zeros((BLOCK_HEADS,), tl.float32)
    for start in range(0, num_tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        inside = (head < HEADS)[:, None] & (tile < num_tiles)[None, :]
        part = tl.load(sums + of_head[:, None] * num_tiles + tile[None, :], mask=inside, other=0.0)
        total += tl.sum(part, 1)
    chosen = (head < HEADS) & (ranks(total, head, HEADS) < count)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.load(
        mass + of_head[:, None] * num_visual + slot[None, :],
        mask=chosen[:, None] & (slot < num_visual)[None, :],
        other=0.0,
    )
    valid = count_valid(rows, batch, num_query, num_rows, BLOCK)
    mean = tl.sum(part, 0) / (count * valid).to(tl.float32)
    tl.store(scores + batch * num_visual + slot, mean, mask=slot < num_visual)


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
    """Launch the three kernels; arguments and result as in ``reference.py``, for any dtypes but float64."""
    batch, query_heads, num_query, head_dim = query.shape
    key_heads, num_keys = key.shape[1], key.shape[2]
    num_visual = visual_index.shape[1]
    num_rows = 1 if rows is None else rows.shape[1]
    scores = torch.empty((batch, num_visual), dtype=torch.float32, device=query.device)
    if num_rows == 0:
        return scores.zero_()
    if scores.numel() == 0:
        return scores

    query, key, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, cos, sin))
    visual_index, turns = visual_index.contiguous(), turns.contiguous()
    rows = None if rows is None else rows.contiguous()
    mask = None if attention_mask is None else attention_mask.view(torch.uint8)
    scale_log2 = (head_dim**-0.5 if scale is None else scale) * math.log2(math.e)
    partial_max, partial_sum, _ = row_statistics(
        query, key, rows, mask, scale_log2, causal=True, stores=False
    )
    splits = partial_max.shape[3]
    chosen = tiles.corrected(num_rows, query.dtype)
    visual_tiles = cdiv(num_visual, chosen.columns)
    mass = torch.empty((batch, query_heads, num_visual), dtype=torch.float32, device=query.device)
    sums = torch.empty((batch, query_heads, visual_tiles), dtype=torch.float32, device=query.device)
    launch(
        corrected_mass_kernel,
        (visual_tiles, batch * query_heads),
        (query, key, visual_index, rows, mask, cos, sin, turns, partial_max, partial_sum, mass, sums),
        (*query.stride()[:3], *key.stride()[:3], *cos.stride()[:2], *sin.stride()[:2]),
        (*((0, 0) if mask is None else mask.stride()), num_query, num_keys, num_rows, num_visual, splits),
        (scale_log2, head_dim**-0.5),
        {
            "KEY_HEADS": key_heads,
            "GROUP": query_heads // key_heads,
            "D": head_dim,
            "E": cos.shape[2],
            "BLOCK_M": chosen.rows,
            "BLOCK_N": chosen.columns,
            "BLOCK_K": part_of(head_dim, min(max(16, next_power_of_2(head_dim)), chosen.part)),
            "BLOCK_E": ROPE_PART,
            "BLOCK_SPLITS": next_power_of_2(splits),
            "UPCAST": triton_is_interpreted(),
        },
        **chosen.options(),
    )
    launch(
        best_heads_kernel,
        (cdiv(num_visual, HEAD_TOKENS), batch),
        (mass, sums, rows, scores),
        (),
        (num_query, num_rows, num_visual, visual_tiles, heads),
        (),
        {
            "HEADS": query_heads,
            "BLOCK_HEADS": next_power_of_2(query_heads),
            "BLOCK_TILES": HEAD_TILES,
            "BLOCK": HEAD_TOKENS,
        },
        num_warps=4,
    )
    return scores
