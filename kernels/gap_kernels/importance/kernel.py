# mypy: disable-error-code="no-untyped-def"
"""Attention-based importance in Triton: only the wanted rows are scored.

For many rows, and where the log-sum-exp is given, the keys are swept twice, and no logit is ever stored:

1. ``row_lse_kernel``: maximum and sum of each wanted row's exponentials, over a split of the keys (skipped where the
   log-sum-exp is given);
2. ``visual_mass_kernel``: per key head and visual tile, the sum of the probabilities over the rows of that head, times
   the norm of the value vectors where they are given;
3. ``mean_kernel``: the mean over heads and valid rows.

For few rows, ``stores_logits``, their logits are fewer bytes than the keys:

1. ``row_lse_kernel`` also stores the logits that it computes;
2. ``stored_mean_kernel``: the mean over heads and valid rows of the probabilities that follow from them.

The wanted rows of all query heads that share a key head form one axis, M = G * R (group, row), so that a key tile is
loaded once for the group. For the maximum over heads, 2 keeps the query heads apart instead (PER_HEAD), and 3 takes the
largest of their means. Partial results go to plain stores and are added in a fixed order: runs agree bit for bit.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..backends import triton_is_interpreted
from ..handover import wait
from ..launch import cdiv, launch, next_power_of_2
from ..tiles import Tiles

# How the keys are split among programs: a guess that was never measured, and the same on every device, so that the
# sums are too.
MIN_SPLIT_KEYS = 128
ENOUGH_PROGRAMS = 512
MAX_SPLITS = 64
MEAN_BLOCK = 128
MAX_BLOCK_HEADS = tl.constexpr(32)
WARPS = 4  # of stored_mean_kernel
# What the tiles of a loop may take of shared memory, so that two programs of eight warps fit every multiprocessor.
BUFFER_BYTES = 40 << 10
# What a program of stored_mean_kernel has at a time: logits of this many rows at this many visual tokens, and this many
# statistics of the rows.
STORED_TOKENS = 32
STORED_ROWS = 128
STORED_STATISTICS = 4096
# Of a thread of visual_mass_kernel, so that three programs fit a multiprocessor. Told so, NVIDIA's compiler uses them; left
# alone it spills a few values to fit one more.
MAX_REGISTERS = 168


@triton.jit
def locate_rows(
    query,
    rows,
    batch,
    key_head,
    start,
    stride_b,
    stride_h,
    stride_s,
    num_query,
    num_keys,
    num_rows,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Locate BLOCK_M of the (group, row) pairs of a key head.

    Returns:
        Pointers to the query vectors and the last key column that each row sees, -1 for filler; both [BLOCK_M].
    """
    m = start + tl.arange(0, BLOCK_M)
    row = tl.full((BLOCK_M,), num_query - 1, tl.int64)
    if rows is not None:
        row = tl.load(rows + batch * num_rows + m % num_rows, mask=m < GROUP * num_rows, other=-1)
    valid = (m < GROUP * num_rows) & (row >= 0) & (row < num_query)
    head = key_head * GROUP + m // num_rows
    pointer = query + batch * stride_b + head * stride_h + row * stride_s
    last = row + (num_keys - num_query) if CAUSAL else num_keys - 1
    return pointer, tl.where(valid, last, -1)


@triton.jit
def allowed_columns(mask, batch, column, usable, stride_b, stride_s):
    """Return which of the usable columns the attention mask allows."""
    if mask is not None:
        usable = usable & (tl.load(mask + batch * stride_b + column * stride_s, mask=usable, other=0) != 0)
    return usable


@triton.jit
def load_queries(pointer, inside, start, D: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load ``BLOCK_K`` elements of the query vectors at ``pointer`` [BLOCK_M], of those ``inside``: [BLOCK_M, BLOCK_K]."""
    d = start + tl.arange(0, BLOCK_K)
    return tl.load(pointer[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_keys(pointer, inside, start, D: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load ``BLOCK_K`` elements of the key vectors at ``pointer`` [BLOCK_N], of those ``inside``: [BLOCK_K, BLOCK_N]."""
    d = start + tl.arange(0, BLOCK_K)
    return tl.load(pointer[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)


@triton.jit
def visible_logits(
    queries,
    keys,
    row_pointer,
    last_column,
    column_pointer,
    column,
    inside,
    usable,
    scale_log2,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return base-2 logits [BLOCK_M, BLOCK_N], -inf where a row doesn't see a column.

    ``queries`` and ``keys`` are the vectors where they have been read whole, or None: those are read here, BLOCK_K
    elements at a time. Nothing is read for filler rows and columns that aren't ``inside``. Those of ``inside`` that
    aren't ``usable`` are read for nothing, as that is known only when the mask has been read.
    """
    logits = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.static_range(0, D, BLOCK_K):
        q = load_queries(row_pointer, last_column >= 0, start, D, BLOCK_K) if queries is None else queries
        k = load_keys(column_pointer, inside, start, D, BLOCK_K) if keys is None else keys
        if UPCAST:
            q = q.to(tl.float32)
            k = k.to(tl.float32)
        logits = tl.dot(q, k, logits, input_precision="ieee")
    visible = usable[None, :] & (column[None, :] <= last_column[:, None])
    return tl.where(visible, logits * scale_log2, -float("inf"))


@triton.jit
def row_lse_tile(
    query,
    key,
    rows,
    mask,
    partial_max,
    partial_sum,
    stored,
    batch_head,
    row_tile,
    split,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    mask_stride_b,
    mask_stride_s,
    num_query,
    num_keys,
    num_rows,
    split_keys,
    splits,
    scale_log2,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Store the online softmax statistics of one row tile over one split of the keys, in base 2.

    With ``stored`` [B, Hkv, M, S] also the logits, -inf where a row doesn't see a column.
    """
    batch = batch_head // KEY_HEADS
    key_head = batch_head % KEY_HEADS
    start_m = row_tile * BLOCK_M
    row_pointer, last_column = locate_rows(
        query, rows, batch, key_head, start_m, query_stride_b, query_stride_h, query_stride_s,
        num_query, num_keys, num_rows, GROUP, BLOCK_M, CAUSAL,
    )  # fmt: skip
    queries = None
    # With the logits stored they come with each tile of keys instead, and are on their way at the same time: few rows
    # are few bytes, and the stores keep the compiler from doing that by itself.
    if D <= BLOCK_K and stored is None:
        queries = load_queries(row_pointer, last_column >= 0, 0, D, BLOCK_K)
    m = start_m + tl.arange(0, BLOCK_M)
    row_of_head = batch_head * (GROUP * num_rows) + m
    running_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    running_sum = tl.zeros((BLOCK_M,), tl.float32)
    begin = split * split_keys
    end = tl.minimum(begin + split_keys, num_keys)
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    following = allowed_columns(mask, batch, begin + n, begin + n < end, mask_stride_b, mask_stride_s)
    for start in range(begin, end, BLOCK_N):
        column = start + n
        inside = column < end
        usable = following
        ahead = column + BLOCK_N  # the compiler loads keys ahead, but no single bytes
        following = allowed_columns(mask, batch, ahead, ahead < end, mask_stride_b, mask_stride_s)
        column_pointer = key + batch * key_stride_b + key_head * key_stride_h + column * key_stride_s
        logits = visible_logits(
            queries, None, row_pointer, last_column, column_pointer, column, inside, usable, scale_log2,
            D, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST,
        )  # fmt: skip
        if stored is not None:
            place = stored + row_of_head[:, None] * num_keys + column[None, :]
            tl.store(place, logits, mask=(m < GROUP * num_rows)[:, None] & inside[None, :])
        new_max = tl.maximum(running_max, tl.max(logits, 1))
        base = tl.where(new_max == -float("inf"), 0.0, new_max)  # nothing seen yet: avoids inf - inf
        running_sum = running_sum * tl.exp2(running_max - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        running_max = new_max
    position = row_of_head * splits + split
    tl.store(partial_max + position, running_max, mask=m < GROUP * num_rows)
    tl.store(partial_sum + position, running_sum, mask=m < GROUP * num_rows)


# What changes from prompt to prompt isn't specialised on, or every new value could mean a new compilation.
@triton.jit(
    do_not_specialize=["mask_stride_b", "mask_stride_s", "num_query", "num_keys", "num_rows", "split_keys"]
)
def row_lse_kernel(
    query,
    key,
    rows,
    mask,
    partial_max,
    partial_sum,
    stored,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    mask_stride_b,
    mask_stride_s,
    num_query,
    num_keys,
    num_rows,
    split_keys,
    scale_log2,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Grid (B * Hkv, row tiles, splits); partial_max and partial_sum [B, Hkv, M, splits] float32."""
    row_lse_tile(
        query, key, rows, mask, partial_max, partial_sum, stored,
        tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2),
        query_stride_b, query_stride_h, query_stride_s, key_stride_b, key_stride_h, key_stride_s,
        mask_stride_b, mask_stride_s, num_query, num_keys, num_rows, split_keys, tl.num_programs(2), scale_log2,
        KEY_HEADS, GROUP, D, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST, CAUSAL,
    )  # fmt: skip


@triton.jit
def value_norms(pointer, usable, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Return the sums of absolute values [BLOCK_N] of vectors of length DV; nothing is read for unusable ones."""
    norm = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.static_range(0, DV, BLOCK_DV):
        d = start + tl.arange(0, BLOCK_DV)
        part = tl.load(pointer[:, None] + d[None, :], mask=usable[:, None] & (d < DV)[None, :], other=0.0)
        norm += tl.sum(tl.abs(part.to(tl.float32)), 1)
    return norm


@triton.jit
def load_statistics(partial_max, partial_sum, row_of_head, inside, splits, BLOCK_SPLITS: tl.constexpr):
    """Load the statistics that ``row_lse_tile`` stored for rows, over the splits: two of [rows, BLOCK_SPLITS]."""
    split = tl.arange(0, BLOCK_SPLITS)
    inside = inside[:, None] & (split < splits)[None, :]
    offset = row_of_head[:, None] * splits + split[None, :]
    maximum = tl.load(partial_max + offset, mask=inside, other=-float("inf"), cache_modifier=".cg")
    part = tl.load(partial_sum + offset, mask=inside, other=0.0, cache_modifier=".cg")
    return maximum, part


@triton.jit
def combine_statistics(maximum, part):
    """Return the base-2 log-sum-exp of rows from their statistics; anything finite where nothing was seen."""
    highest = tl.max(maximum, 1)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    weight = tl.sum(part * tl.exp2(maximum - base[:, None]), 1)
    return base + tl.log2(tl.where(weight == 0.0, 1.0, weight))


@triton.jit
def probabilities(logits, row_lse, norm):
    """Return probabilities from base-2 logits, times ``norm`` [BLOCK_N] unless that is None; 0 where logits are -inf.

    A row that doesn't see a column adds nothing, even if its log-sum-exp is NaN (a given one of filler) or -inf (it
    sees nothing). NaN logits are seen: like the reference, they make NaN scores.
    """
    probability = tl.exp2(logits - row_lse[:, None])
    if norm is not None:
        probability *= norm[None, :]
    return tl.where(logits != -float("inf"), probability, 0.0)


@triton.jit
def visual_mass_tile(
    query,
    key,
    visual_index,
    rows,
    mask,
    lse,
    partial_max,
    partial_sum,
    mass,
    batch_head,
    tile,
    query_stride_b,
    query_stride_h,
    query_stride_s,
    key_stride_b,
    key_stride_h,
    key_stride_s,
    mask_stride_b,
    mask_stride_s,
    num_query,
    num_keys,
    num_rows,
    num_visual,
    splits,
    scale_log2,
    value,
    value_stride_b,
    value_stride_h,
    value_stride_s,
    ready,
    parts,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
    CAUSAL: tl.constexpr,
    PER_HEAD: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Store the probability mass that the rows of one key head give to one tile of visual tokens.

    Rows come with their natural log-sum-exp ``lse`` [B, Hkv, M], or with the partial statistics of ``row_lse_tile`` if
    that is None. With PER_HEAD ``batch_head`` counts query heads, and the rows are those of one of them: the same
    memory, as [B, Hkv, M] is [B, Hq, R]. With ``value`` [B, Hkv, S, DV] each probability is multiplied by the L1 norm of
    its key's value vector. With ``ready``, a counter, the statistics are there once it has reached ``parts``. That is
    waited for before the loop over the rows, with the keys on their way: in it, loads that the compiler moves ahead of
    the products could be moved ahead of the waiting, too.
    """
    HEADS: tl.constexpr = KEY_HEADS * GROUP if PER_HEAD else KEY_HEADS
    SHARING: tl.constexpr = 1 if PER_HEAD else GROUP  # query heads whose rows this program has
    batch = batch_head // HEADS
    head = batch_head % HEADS
    key_head = head // GROUP if PER_HEAD else head
    slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    position = tl.load(visual_index + batch * num_visual + slot, mask=slot < num_visual, other=-1)
    column = position + (num_keys - num_query)
    inside = (position >= 0) & (position < num_query)
    usable = allowed_columns(mask, batch, column, inside, mask_stride_b, mask_stride_s)
    column_pointer = key + batch * key_stride_b + key_head * key_stride_h + column * key_stride_s
    norm = None
    if value is not None:
        value_pointer = value + batch * value_stride_b + key_head * value_stride_h + column * value_stride_s
        norm = value_norms(value_pointer, usable, DV, BLOCK_N, BLOCK_DV)
    keys = None
    if D <= BLOCK_K:
        keys = load_keys(column_pointer, inside, 0, D, BLOCK_K)
    if ready is not None:
        wait(ready, parts)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, SHARING * num_rows, BLOCK_M):
        row_pointer, last_column = locate_rows(
            query, rows, batch, head, start, query_stride_b, query_stride_h, query_stride_s,
            num_query, num_keys, num_rows, SHARING, BLOCK_M, CAUSAL,
        )  # fmt: skip
        m = start + tl.arange(0, BLOCK_M)
        row_of_head = batch_head * (SHARING * num_rows) + m
        real = m < SHARING * num_rows
        if lse is not None:
            row_lse = tl.load(lse + row_of_head, mask=real, other=0.0) * 1.4426950408889634
        else:
            maximum, part = load_statistics(partial_max, partial_sum, row_of_head, real, splits, BLOCK_SPLITS)
        logits = visible_logits(
            None, keys, row_pointer, last_column, column_pointer, column, inside, usable, scale_log2,
            D, BLOCK_M, BLOCK_N, BLOCK_K, UPCAST,
        )  # fmt: skip
        if lse is None:
            row_lse = combine_statistics(maximum, part)
        total += tl.sum(probabilities(logits, row_lse, norm), 0)
    tl.store(mass + batch_head * num_visual + slot, total, mask=slot < num_visual)


@triton.jit(
    do_not_specialize=[
        "mask_stride_b", "mask_stride_s", "num_query", "num_keys", "num_rows", "num_visual", "splits",
    ]
)  # fmt: skip
def visual_mass_kernel(
    query,
    key,
    visual_index,
    rows,
    mask,
    lse,
    partial_max,
    partial_sum,
    mass,
    value,
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
    num_rows,
    num_visual,
    splits,
    scale_log2,
    KEY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
    CAUSAL: tl.constexpr,
    PER_HEAD: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Grid (visual tiles, B * H); mass [B, H, V] float32: H = Hq with PER_HEAD, else Hkv."""
    visual_mass_tile(
        query, key, visual_index, rows, mask, lse, partial_max, partial_sum, mass,
        tl.program_id(1).to(tl.int64), tl.program_id(0),
        query_stride_b, query_stride_h, query_stride_s, key_stride_b, key_stride_h, key_stride_s,
        mask_stride_b, mask_stride_s, num_query, num_keys, num_rows, num_visual, splits, scale_log2,
        value, value_stride_b, value_stride_h, value_stride_s, None, 0,
        KEY_HEADS, GROUP, D, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_SPLITS, UPCAST, CAUSAL, PER_HEAD, DV, BLOCK_DV,
    )  # fmt: skip


@triton.jit
def over_heads(
    mass, num_tokens, token, inside, HEADS: tl.constexpr, BLOCK: tl.constexpr, MAXIMUM: tl.constexpr
):
    """Return the sum, or the maximum, over heads of mass [HEADS, num_tokens] at tokens [BLOCK].

    All heads of a block are loaded before the first is used: one after another each would cost the latency of memory.
    """
    BLOCK_HEADS: tl.constexpr = min(triton.next_power_of_2(HEADS), MAX_BLOCK_HEADS)
    total = tl.zeros((BLOCK,), tl.float32)
    nans = tl.zeros((BLOCK,), tl.int32)
    for start in tl.static_range(0, HEADS, BLOCK_HEADS):
        head = start + tl.arange(0, BLOCK_HEADS)
        part = tl.load(
            mass + head[:, None] * num_tokens.to(tl.int64) + token[None, :],
            mask=(head < HEADS)[:, None] & inside[None, :],
            other=0.0,
            cache_modifier=".cg",
        )  # [BLOCK_HEADS, BLOCK]
        if MAXIMUM:
            total = tl.maximum(total, tl.max(part, 0))
            nans += tl.sum((part != part).to(tl.int32), 0)  # a maximum may hide them
        else:
            total += tl.sum(part, 0)
    if MAXIMUM:
        total = tl.where(nans > 0, float("nan"), total)
    return total


@triton.jit
def count_valid(rows, batch, num_query, num_rows, BLOCK: tl.constexpr):
    """Return how many of a sample's rows are no filler, 1 if there are none: what sums over them are divided by."""
    valid = tl.full((), 1, tl.int32)
    if rows is not None:
        valid = tl.full((), 0, tl.int32)
        for start in range(0, num_rows, BLOCK):
            r = start + tl.arange(0, BLOCK)
            row = tl.load(rows + batch * num_rows + r, mask=r < num_rows, other=-1)
            valid += tl.sum(((row >= 0) & (row < num_query)).to(tl.int32), 0)
    return tl.maximum(valid, 1)


@triton.jit
def mean_tile(
    mass,
    rows,
    scores,
    batch,
    tile,
    num_query,
    num_rows,
    num_visual,
    KEY_HEADS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_HEAD: tl.constexpr,
):
    """Store the mean over heads and valid rows for one tile of visual tokens.

    With PER_HEAD ``mass`` is [B, Hq, V], and the result is the maximum over heads of the mean over valid rows.
    """
    HEADS: tl.constexpr = QUERY_HEADS if PER_HEAD else KEY_HEADS
    AVERAGED: tl.constexpr = 1 if PER_HEAD else QUERY_HEADS
    slot = tile * BLOCK + tl.arange(0, BLOCK)
    total = over_heads(
        mass + batch * HEADS * num_visual, num_visual, slot, slot < num_visual, HEADS, BLOCK, PER_HEAD
    )
    mean = total / (AVERAGED * count_valid(rows, batch, num_query, num_rows, BLOCK).to(tl.float32))
    tl.store(scores + batch * num_visual + slot, mean, mask=slot < num_visual)


@triton.jit(do_not_specialize=["num_query", "num_rows", "num_visual"])
def mean_kernel(
    mass,
    rows,
    scores,
    num_query,
    num_rows,
    num_visual,
    KEY_HEADS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_HEAD: tl.constexpr,
):
    """Mean over valid rows, mean or maximum over heads: mass [B, H, V] -> scores [B, V]. Grid (visual tiles, B)."""
    mean_tile(
        mass, rows, scores, tl.program_id(1).to(tl.int64), tl.program_id(0), num_query, num_rows, num_visual,
        KEY_HEADS, QUERY_HEADS, BLOCK, PER_HEAD,
    )  # fmt: skip


@triton.jit
def stored_mean_tile(
    stored,
    visual_index,
    rows,
    partial_max,
    partial_sum,
    scores,
    batch,
    tile,
    num_query,
    num_keys,
    num_rows,
    num_visual,
    splits,
    ready,
    parts,
    QUERY_HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Store the mean over heads and valid rows for one tile of visual tokens, from logits that ``row_lse_tile`` stored.

    With ``ready``, a counter, logits and statistics are there once it has reached ``parts``.
    """
    slot = tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    position = tl.load(visual_index + batch * num_visual + slot, mask=slot < num_visual, other=-1)
    column = position + (num_keys - num_query)
    inside = (position >= 0) & (position < num_query)
    valid = count_valid(rows, batch, num_query, num_rows, BLOCK_ROWS)
    if ready is not None:
        wait(ready, parts)
    total = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for start in range(0, QUERY_HEADS * num_rows, BLOCK_ROWS):
        m = start + tl.arange(0, BLOCK_ROWS)
        real = m < QUERY_HEADS * num_rows
        row_of_head = batch * (QUERY_HEADS * num_rows) + m
        logits = tl.load(
            stored + row_of_head[:, None] * num_keys + column[None, :],
            mask=real[:, None] & inside[None, :],
            other=-float("inf"),
            cache_modifier=".cg",
        )  # [BLOCK_ROWS, BLOCK_TOKENS]
        maximum, part = load_statistics(partial_max, partial_sum, row_of_head, real, splits, BLOCK_SPLITS)
        total += tl.sum(probabilities(logits, combine_statistics(maximum, part), None), 0)
    mean = total / (QUERY_HEADS * valid.to(tl.float32))
    tl.store(scores + batch * num_visual + slot, mean, mask=slot < num_visual)


@triton.jit(do_not_specialize=["num_query", "num_keys", "num_rows", "num_visual", "splits"])
def stored_mean_kernel(
    stored,
    visual_index,
    rows,
    partial_max,
    partial_sum,
    scores,
    num_query,
    num_keys,
    num_rows,
    num_visual,
    splits,
    QUERY_HEADS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Logits [B, Hq, R, S] to scores [B, V]. Grid (visual tiles, B)."""
    stored_mean_tile(
        stored, visual_index, rows, partial_max, partial_sum, scores, tl.program_id(1).to(tl.int64), tl.program_id(0),
        num_query, num_keys, num_rows, num_visual, splits, None, 0,
        QUERY_HEADS, BLOCK_ROWS, BLOCK_TOKENS, BLOCK_SPLITS,
    )  # fmt: skip


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
    """Launch the kernels; arguments and result as in ``reference.py``, for any dtype but float64."""
    batch, query_heads, num_query, head_dim = query.shape
    key_heads, num_keys = key.shape[1], key.shape[2]
    num_visual = visual_index.shape[1]
    num_rows = 1 if rows is None else rows.shape[1]
    group = query_heads // key_heads
    scores = torch.empty((batch, num_visual), dtype=torch.float32, device=query.device)
    if num_rows == 0:
        return scores.zero_()
    if scores.numel() == 0:
        return scores

    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    value = value if value is None or value.stride(-1) == 1 else value.contiguous()
    visual_index = visual_index.contiguous()
    rows = None if rows is None else rows.contiguous()
    mask = None if attention_mask is None else attention_mask.view(torch.uint8)
    strides = (*query.stride()[:3], *key.stride()[:3])
    mask_strides = (0, 0) if mask is None else mask.stride()
    scale_log2 = (head_dim**-0.5 if scale is None else scale) * math.log2(math.e)
    heads = {"KEY_HEADS": key_heads, "GROUP": group, "D": head_dim}
    flags = {"UPCAST": triton_is_interpreted(), "CAUSAL": causal}
    per_head, device_class = head_reduction == "max", tiles.architecture(query.device)
    mass_heads, mass_rows = (query_heads, num_rows) if per_head else (key_heads, group * num_rows)

    partial_max = partial_sum = stored = None
    splits = 0
    if lse is None:
        stores = value is None and not per_head
        stores = stores and stores_logits(group * num_rows, num_keys, num_visual, head_dim, query.dtype)
        partial_max, partial_sum, stored = row_statistics(
            query, key, rows, mask, scale_log2, causal=causal, stores=stores
        )
        splits = partial_max.shape[3]
    else:
        lse = lse.float().contiguous()
    if stored is not None:
        of_mean = stored_options(query_heads * num_rows, splits)
        launch(
            stored_mean_kernel,
            (cdiv(num_visual, of_mean["BLOCK_TOKENS"]), batch),
            (stored, visual_index, rows, partial_max, partial_sum, scores),
            (),
            (num_query, num_keys, num_rows, num_visual, splits),
            (),
            {"QUERY_HEADS": query_heads, **of_mean, "BLOCK_SPLITS": next_power_of_2(splits)},
            num_warps=WARPS,
        )
        return scores
    mass = torch.empty((batch, mass_heads, num_visual), dtype=torch.float32, device=query.device)
    chosen = tiles.importance(head_dim, mass_rows, query.dtype, device_class)
    launch(
        visual_mass_kernel,
        (cdiv(num_visual, chosen.columns), batch * mass_heads),
        (query, key, visual_index, rows, mask, lse, partial_max, partial_sum, mass, value),
        (*strides, *((0, 0, 0) if value is None else value.stride()[:3])),
        (*mask_strides, num_query, num_keys, num_rows, num_visual, splits),
        (scale_log2,),
        {
            **heads,
            **block_sizes(chosen, head_dim),
            "BLOCK_SPLITS": next_power_of_2(max(splits, 1)),
            **flags,
            "PER_HEAD": per_head,
        }
        | value_options(value),
        num_warps=chosen.warps,
        # A single tile of rows leaves nothing to load ahead.
        num_stages=1 if mass_rows <= chosen.rows else stages_of(chosen, head_dim, query.dtype, False),
        maxnreg=MAX_REGISTERS,
    )
    launch(
        mean_kernel,
        (cdiv(num_visual, MEAN_BLOCK), batch),
        (mass, rows, scores),
        (),
        (num_query, num_rows, num_visual),
        (),
        {"KEY_HEADS": key_heads, "QUERY_HEADS": query_heads, "BLOCK": MEAN_BLOCK, "PER_HEAD": per_head},
    )
    return scores


def row_statistics(
    query: Tensor,
    key: Tensor,
    rows: Tensor | None,
    mask: Tensor | None,
    scale_log2: float,
    *,
    causal: bool,
    stores: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch ``row_lse_kernel``.

    Args:
        query: [B, Hq, Q, D], dense in its last dimension, as ``key`` [B, Hkv, S, D] is.
        key: See ``query``.
        rows: [B, R] int64, contiguous; None = the last row.
        mask: [B, S] uint8, or None.
        scale_log2: Factor of ``q k^T`` for logits in base 2.
        causal: Whether a row sees no key after its own.
        stores: Whether the logits are stored.

    Returns:
        Maximum and sum [B, Hkv, M, splits] float32, and the logits [B, Hq, R, S] float32 or None.
    """
    batch, query_heads, num_query, head_dim = query.shape
    key_heads, num_keys = key.shape[1], key.shape[2]
    num_rows = 1 if rows is None else rows.shape[1]
    group = query_heads // key_heads
    chosen = tiles.importance(head_dim, group * num_rows, query.dtype, tiles.architecture(query.device))
    row_tiles = cdiv(group * num_rows, chosen.rows)
    split_keys, splits = split_of(num_keys, batch * key_heads * row_tiles, chosen.columns)
    shape = (batch, key_heads, group * num_rows, splits)
    partial_max = torch.empty(shape, dtype=torch.float32, device=query.device)
    partial_sum = torch.empty_like(partial_max)
    stored = None
    if stores:
        shape = (batch, query_heads, num_rows, num_keys)
        stored = torch.empty(shape, dtype=torch.float32, device=query.device)
    launch(
        row_lse_kernel,
        (batch * key_heads, row_tiles, splits),
        (query, key, rows, mask, partial_max, partial_sum, stored),
        (*query.stride()[:3], *key.stride()[:3]),
        (*((0, 0) if mask is None else mask.stride()), num_query, num_keys, num_rows, split_keys),
        (scale_log2,),
        {
            "KEY_HEADS": key_heads,
            "GROUP": group,
            "D": head_dim,
            **block_sizes(chosen, head_dim),
            "UPCAST": triton_is_interpreted(),
            "CAUSAL": causal,
        },
        num_warps=chosen.warps,
        num_stages=stages_of(chosen, head_dim, query.dtype, stores),
    )
    return partial_max, partial_sum, stored


def block_sizes(chosen: Tiles, head_dim: int) -> dict[str, int]:
    """Return tile sizes as the kernels take them."""
    block_d = max(16, next_power_of_2(head_dim))
    return {
        "BLOCK_M": chosen.rows,
        "BLOCK_N": chosen.columns,
        "BLOCK_K": part_of(head_dim, min(block_d, chosen.part)),
    }


def stores_logits(num_rows: int, num_keys: int, num_visual: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Return whether M = ``num_rows`` rows of a key head have their logits stored, in place of a second sweep of its keys.

    That is a matter of bytes: writing a logit of each row and key, and reading it at each visual token, against reading
    the key of each visual token. Half of them at most, so that a sweep, which has more programs, isn't given up for
    nothing: at head_dim 128 and two bytes an element, some 16 rows.
    """
    of_logits = 4 * num_rows * (num_keys + num_visual)
    of_keys = num_visual * head_dim * dtype.itemsize
    return 0 < 2 * of_logits <= of_keys


def stored_options(num_rows: int, splits: int) -> dict[str, int]:
    """Return tile sizes of ``stored_mean_tile`` for the ``num_rows`` rows of all heads: few blocks, one after another."""
    most = max(16, STORED_STATISTICS // next_power_of_2(splits))
    return {
        "BLOCK_ROWS": min(max(next_power_of_2(num_rows), 16), STORED_ROWS, most),
        "BLOCK_TOKENS": STORED_TOKENS,
    }


def stages_of(chosen: Tiles, head_dim: int, dtype: torch.dtype, stored: bool) -> int:
    """Return the stages of the loops over tiles: 3 where shared memory has room for two of them, and 3 may be, else 2.

    With two stages there is one buffer, and the next tile is asked for only when this one has been used. Queries come with
    the keys where logits are stored, or vectors are read in parts.
    """
    queries = chosen.rows if stored or block_sizes(chosen, head_dim)["BLOCK_K"] < head_dim else 0
    vectors = chosen.columns + queries
    fits = 2 * vectors * next_power_of_2(head_dim) * dtype.itemsize <= BUFFER_BYTES
    return min(chosen.stages, 3 if fits else 2)


def value_options(value: Tensor | None) -> dict[str, int]:
    """Return the length of the value vectors, and how many elements of each are read at a time: 128 bytes at most."""
    if value is None:
        return {"DV": 0, "BLOCK_DV": 16}
    length = value.shape[3]
    block = max(16, next_power_of_2(max(1, length)))
    return {"DV": length, "BLOCK_DV": part_of(length, min(block, 128 // value.element_size()))}


def part_of(length: int, block: int) -> int:
    """Return how much of each vector is read at a time: ``block`` elements, or 16 if vectors start at odd addresses.

    Every element is then loaded by itself and keeps a pointer of its own in registers.
    """
    return 16 if length % 16 else block


def split_of(num_keys: int, programs: int, block_n: int) -> tuple[int, int]:
    """Return ``(keys per split, splits)`` so that few programs get more, whatever the device."""
    wanted = min(cdiv(num_keys, MIN_SPLIT_KEYS), max(1, ENOUGH_PROGRAMS // programs), MAX_SPLITS)
    split_keys = cdiv(cdiv(num_keys, wanted), block_n) * block_n
    return split_keys, cdiv(num_keys, split_keys)
