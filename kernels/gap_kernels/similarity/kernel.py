# mypy: disable-error-code="no-untyped-def"
"""Selection by similarity in Triton; no features are copied, and cosines are those of ``merge/kernel.py``.

`distinct_indices`, in three launches whatever the number of tokens:

1. ``rest_kernel``: which tokens are not among the best, in order of their scores, each counting those before it;
2. ``cosines_kernel`` of ``merge``: from each of these to all tokens; and which tokens are the best;
3. ``remove_kernel``: one program per sample. Step after step, each token of the first half looks up the largest cosine to
   the second, then counts which of its half are more alike, which is its place in the next step.

Each step deals the tokens anew and looks at all pairs between two halves: about ``M^3 / 12 r`` pairs where M tokens are
thinned out to few, r at a time. For 2,560 tokens, thinned out to 320 by eight in 280 steps, that is 26 times ``M^2``. So
cosines are computed once and stored, in float32: ``4 M N`` bytes a sample, 1.2 MB for 128 of LLaVA-1.5's 576 tokens, 30 MB
for 640 of 2,880. Step 3 reads 4 bytes a pair, from the L2 cache where they fit. Without that matrix each pair would take
``2 C`` operations, and each step a wait of all programs for all. The floor is to read the features once, ``N C e`` bytes of
e a value. Of a batch, samples come in blocks of at most 4 million cosines, or of one.

`least_similar_indices`, in two launches:

1. ``cosines_kernel`` of ``merge``: from each pivot to all tokens; and which tokens are no pivots. It reads all features
   once, ``N C e`` bytes a sample, which is the floor, and those of the pivots again for each tile of tokens. Written and
   read again are ``4 P N`` bytes of cosines, 9 KB for LLaVA-1.5 and four pivots;
2. ``least_similar_kernel``: one program per sample, for each pivot in turn the selection of ``select/kernel.py``.

Nothing of this was measured. Everything has a fixed order: runs agree bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import row_blocks
from ..launch import cdiv, launch
from ..merge.kernel import launch_cosines
from ..prune.kernel import with_whole_rows
from ..select import kernel as select
from ..select.kernel import DROPPED, load_keys, score_keys, select_threshold, write_selected

NEVER, CANDIDATE, CHOSEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""States of a token."""
REST_TILE, REST_BLOCK = 32, 64
"""Tokens of a program of ``rest_kernel``, and those that it compares them with at a time."""
FIRST_BLOCK, SECOND_BLOCK, REMOVE_WARPS = 64, 64, 16
"""Of ``remove_kernel``: tokens of the first half at a time, and of those that they are compared with. At twice as many the
compiler spills registers; speed was not measured."""


# What changes from image to image isn't specialised on, or every new value could mean a new compilation.
@triton.jit(do_not_specialize=["n", "best"])
def rest_kernel(scores, rest, n, best, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Put the tokens behind the ``best`` ones in order of their scores: rest [B, N - best] int64. Grid (B * token tiles)."""
    tiles = tl.cdiv(n, BLOCK_M)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_M
    scores += sample * n
    token = first + tl.arange(0, BLOCK_M)
    own = load_keys(scores, first, n, BLOCK_M, True)
    rank = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, n, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        key = load_keys(scores, start, n, BLOCK_N, True)[None, :]
        before = (key > own[:, None]) | ((key == own[:, None]) & (other[None, :] < token[:, None]))
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(rest + sample * (n - best) + rank - best, token.to(tl.int64), mask=(token < n) & (rank >= best))


@triton.jit
def most_alike(cosine, tokens, places, first, count, others, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the keys of the largest cosine of tokens ``first..first + BLOCK_M`` of one half to ``others`` of the other.

    ``places`` alternates between the halves; ``tokens`` are those at each place.
    """
    own = first + tl.arange(0, BLOCK_M)
    row = tl.load(places + 2 * own, mask=own < count, other=0)
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    for start in range(0, others, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        place = tl.load(places + 2 * other + 1, mask=other < others, other=0)
        column = tl.load(tokens + place, mask=other < others, other=0)
        usable = (own < count)[:, None] & (other < others)[None, :]
        pointer = cosine + row.to(tl.int64)[:, None] * n + column[None, :]
        found = tl.load(pointer, mask=usable, other=-float("inf"))
        largest = tl.maximum(largest, tl.max(tl.where(found == found, found, -float("inf")), 1))
    # What is like nothing is spoiled, and goes first.
    return score_keys(tl.where(largest > -float("inf"), largest, float("inf")))


@triton.jit(do_not_specialize=["n", "m", "wanted", "at_once", "length"])
def remove_kernel(
    cosine,
    rest,
    is_best,
    places,
    alike,
    state,
    index,
    n,
    m,
    wanted,
    at_once,
    length,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):
    """Remove duplicates in one sample until ``wanted`` of ``rest`` [B, M] are left: index [B, length]. Grid (B).

    ``cosine`` is [B, M, N], ``is_best`` [B, N] uint8; workspaces are ``places`` [B, 2, M] int32, what is left before and
    after a step, ``alike`` [B, M] int32 and ``state`` [B, N] int32.
    """
    sample = tl.program_id(0).to(tl.int64)
    cosine += sample * m * n
    rest += sample * m
    places += sample * 2 * m
    alike += sample * m
    state += sample * n
    for start in range(0, m, BLOCK_SCAN):
        place = start + tl.arange(0, BLOCK_SCAN)
        tl.store(places + place, place, mask=place < m)
    for start in range(0, n, BLOCK_SCAN):
        token = start + tl.arange(0, BLOCK_SCAN)
        best = tl.load(is_best + sample * n + token, mask=token < n, other=0) != 0
        tl.store(state + token, tl.where(best, CHOSEN, NEVER), mask=token < n)
    tl.debug_barrier()  # other threads read what was stored

    left = m
    now = 0  # where in `places`
    while left > wanted:
        first = (left + 1) // 2
        second = left // 2
        removed = tl.minimum(tl.minimum(at_once, left - wanted), first)
        before, after = places + now, places + m - now
        for start in range(0, first, BLOCK_M):
            own = start + tl.arange(0, BLOCK_M)
            key = most_alike(cosine, rest, before, start, first, second, n, BLOCK_M, BLOCK_N)
            tl.store(alike + own, key, mask=own < first)
        tl.debug_barrier()
        for start in range(0, first, BLOCK_M):
            own = start + tl.arange(0, BLOCK_M)
            key = tl.load(alike + own, mask=own < first, other=DROPPED)
            rank = tl.zeros((BLOCK_M,), tl.int32)
            for start_n in range(0, first, BLOCK_N):
                other = start_n + tl.arange(0, BLOCK_N)
                theirs = tl.load(alike + other, mask=other < first, other=DROPPED)[None, :]
                is_before = (theirs > key[:, None]) | (
                    (theirs == key[:, None]) & (other[None, :] < own[:, None])
                )
                rank += tl.sum(is_before.to(tl.int32), 1)
            place = tl.load(before + 2 * own, mask=own < first, other=0)
            tl.store(after + rank - removed, place, mask=(own < first) & (rank >= removed))
        for start in range(0, second, BLOCK_SCAN):
            own = start + tl.arange(0, BLOCK_SCAN)
            place = tl.load(before + 2 * own + 1, mask=own < second, other=0)
            tl.store(after + first - removed + own, place, mask=own < second)
        tl.debug_barrier()
        left -= removed
        now = m - now

    for start in range(0, wanted, BLOCK_SCAN):
        own = start + tl.arange(0, BLOCK_SCAN)
        place = tl.load(places + now + own, mask=own < wanted, other=0)
        token = tl.load(rest + place, mask=own < wanted, other=0)
        tl.store(state + token, tl.full((BLOCK_SCAN,), CHOSEN, tl.int32), mask=own < wanted)
    tl.debug_barrier()
    write_selected(index + sample * length, state, n, length, CANDIDATE, 0, length, BLOCK_SCAN, False, False)


@triton.jit
def is_usable(mask, pivot):
    """Return whether a pivot is neither filler nor hidden."""
    usable = pivot >= 0
    if mask is not None:
        usable = usable & (tl.load(mask + tl.maximum(pivot, 0)) != 0)
    return usable


@triton.jit
def take_selected(state, keys, n, threshold, ties, BLOCK: tl.constexpr):
    """Set the state of what a threshold selects."""
    equal_before = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        token = start + tl.arange(0, BLOCK)
        key = load_keys(keys, start, n, BLOCK, False)
        equal = ((key == threshold) & (token < n)).to(tl.int32)
        rank = equal_before + tl.cumsum(equal, 0)
        selected = (key > threshold) | ((equal > 0) & (rank <= ties))
        tl.store(state + token, tl.full((BLOCK,), CHOSEN, tl.int32), mask=selected)
        equal_before += tl.sum(equal, 0)


@triton.jit(do_not_specialize=["n", "num_pivots", "k", "length"])
def least_similar_kernel(
    cosine,
    pivots,
    is_other,
    mask,
    counts,
    state,
    keys,
    index,
    n,
    num_pivots,
    k,
    length,
    BLOCK: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Choose in one sample: cosine [B, P, N], pivots [B, P] -> index [B, length]. Grid (B).

    ``is_other`` [B, N] uint8 says what is no pivot; ``counts`` [B] or None takes precedence over k; ``state`` and ``keys``
    [B, N] int32 are workspaces.
    """
    sample = tl.program_id(0).to(tl.int64)
    if counts is not None:
        k = tl.load(counts + sample)
    if mask is not None:
        mask += sample * n
    cosine += sample * num_pivots * n
    pivots += sample * num_pivots
    state += sample * n
    keys += sample * n
    real = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK_SCAN):
        token = start + tl.arange(0, BLOCK_SCAN)
        inside = token < n
        if mask is not None:
            inside = inside & (tl.load(mask + token, mask=inside, other=0) != 0)
        real += tl.sum(inside.to(tl.int32), 0)
        other = tl.load(is_other + sample * n + token, mask=inside, other=0) != 0
        tl.store(state + token, tl.where(other, CANDIDATE, NEVER), mask=token < n)
    tl.debug_barrier()  # other threads read and write what was stored
    wanted = tl.minimum(tl.maximum(tl.minimum(k, length), 0).to(tl.int32), real)
    total = tl.full((), 0, tl.int32)
    for slot in range(0, num_pivots):
        pivot = tl.load(pivots + slot)
        if is_usable(mask, pivot) & (total < wanted):
            tl.store(state + pivot, CHOSEN)
            total += 1

    rest = wanted - total
    least = rest // tl.maximum(total, 1)  # each has that many, and some have one more
    over = rest - least * total
    carried = tl.full((), 0, tl.int32)
    for slot in range(0, num_pivots):
        if is_usable(mask, tl.load(pivots + slot)) & (rest > 0):
            carried += over
            share = tl.where(carried >= total, least + 1, least)
            carried = tl.where(carried >= total, carried - total, carried)
            tl.debug_barrier()
            for start in range(0, n, BLOCK_SCAN):
                token = start + tl.arange(0, BLOCK_SCAN)
                is_candidate = tl.load(state + token, mask=token < n, other=NEVER) == CANDIDATE
                found = tl.load(cosine + tl.cast(slot, tl.int64) * n + token, mask=token < n, other=0.0)
                # NaN comes behind all of them.
                tl.store(keys + token, tl.where(is_candidate, score_keys(-found), DROPPED), mask=token < n)
            tl.debug_barrier()
            threshold, ties, _, _ = select_threshold(keys, n, share, BLOCK, RESIDENT, False)
            take_selected(state, keys, n, threshold, ties, BLOCK_SCAN)
    tl.debug_barrier()
    chosen = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK_SCAN):
        token = start + tl.arange(0, BLOCK_SCAN)
        chosen += tl.sum((tl.load(state + token, mask=token < n, other=NEVER) == CHOSEN).to(tl.int32), 0)
    write_selected(index + sample * length, state, n, length, CANDIDATE, 0, chosen, BLOCK_SCAN, False, False)


def distinct_indices(
    features: Tensor, scores: Tensor, k: int, important: int, removed_at_once: int
) -> Tensor:
    """Launch the kernels; arguments and result as in ``reference.py``, for any dtype but float64."""
    batch, n, _ = features.shape
    wanted = k - important
    if not features.shape[0] or not k or not wanted or k == n:
        return select.topk_indices(scores, k, None, k)
    features, m, device = with_whole_rows(features), n - important, features.device
    index = torch.empty((batch, k), dtype=torch.int64, device=device)
    rest = torch.empty((batch, m), dtype=torch.int64, device=device)
    launch(
        rest_kernel,
        (batch * cdiv(n, REST_TILE),),
        (scores.contiguous(), rest),
        (),
        (n, important),
        (),
        {"BLOCK_M": REST_TILE, "BLOCK_N": REST_BLOCK},
        num_warps=4,
    )
    for block in row_blocks(batch, m * n):
        number = len(rest[block])
        cosine = torch.empty((number, m, n), dtype=torch.float32, device=device)
        is_best = torch.empty((number, n), dtype=torch.uint8, device=device)
        launch_cosines(features[block], rest[block], slice(0, m), cosine, is_best)
        launch(
            remove_kernel,
            (number,),
            (
                cosine,
                rest[block],
                is_best,
                torch.empty((number, 2, m), dtype=torch.int32, device=device),
                torch.empty((number, m), dtype=torch.int32, device=device),
                torch.empty((number, n), dtype=torch.int32, device=device),
                index[block],
            ),
            (),
            (n, m, wanted, removed_at_once, k),
            (),
            {"BLOCK_M": FIRST_BLOCK, "BLOCK_N": SECOND_BLOCK, "BLOCK_SCAN": select.WRITE_BLOCK},
            num_warps=REMOVE_WARPS,
            maxnreg=select.MAX_REGISTERS,
        )
    return index


def least_similar_indices(
    features: Tensor, pivots: Tensor, mask: Tensor | None, k: int, counts: Tensor | None, length: int
) -> Tensor:
    """Launch the kernels; arguments and result as in ``reference.py``, for any dtype but float64."""
    batch, n, _ = features.shape
    num_pivots, device = pivots.shape[1], features.device
    features, pivots = with_whole_rows(features), pivots.contiguous()
    cosine = torch.empty((batch, num_pivots, n), dtype=torch.float32, device=device)
    is_other = torch.empty((batch, n), dtype=torch.uint8, device=device)
    launch_cosines(features, pivots, slice(0, num_pivots), cosine, is_other)
    state, keys = torch.empty((2, batch, n), dtype=torch.int32, device=device)
    index = torch.empty((batch, length), dtype=torch.int64, device=device)
    tiles = select.tile_options(n)
    launch(
        least_similar_kernel,
        (batch,),
        (
            cosine,
            pivots,
            is_other,
            None if mask is None else mask.contiguous(),
            None if counts is None else counts.contiguous(),
            state,
            keys,
            index,
        ),
        (),
        (n, num_pivots, k, length),
        (),
        {"BLOCK": tiles["BLOCK"], "BLOCK_SCAN": select.WRITE_BLOCK, "RESIDENT": tiles["RESIDENT"]},
        num_warps=tiles["num_warps"],
        maxnreg=select.MAX_REGISTERS,
    )
    return index
