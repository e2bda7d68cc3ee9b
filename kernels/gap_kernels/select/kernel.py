# mypy: disable-error-code="no-untyped-def"
"""Exact ordered top-k in Triton, one program per sample.

Scores become int32 keys of the same order, the smallest selected key is found by bisection, and one scan gives every
selected entry its column. Reductions and scans are over integers: nothing depends on the order of summation.

The bisection works on values between the smallest and the largest key and stops as soon as a threshold separates
exactly k of them, after at most 32 passes. Up to ``RESIDENT_LIMIT`` keys stay in registers meanwhile; more are read
again in every pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, next_power_of_2

RESIDENT_LIMIT = 16384
WRITE_BLOCK = 1024
# By tile size, chosen so that no target's compiler spills registers; speed was not measured.
WARPS = {128: 4, 256: 4, 512: 4, 1024: 4, 2048: 4, 4096: 8, 8192: 16, 16384: 16}
# Of a thread: all that 16 warps can have. Told so, NVIDIA's compiler uses them; left alone it spills a few values to fit
# one more program, though there is but one for each sample.
MAX_REGISTERS = 128

# Keys beyond those of scores: entries that are no candidates, and entries that are selected whatever k is.
DROPPED = tl.constexpr(-(2**31))
ALWAYS = tl.constexpr(2**31 - 1)
NAN_KEY = tl.constexpr(-(2**31) + 1)


@triton.jit
def score_keys(scores):
    """Map float32 to int32 so that a larger score has a larger key, -0.0 equals 0.0, and NaN comes below -inf."""
    bits = scores.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    keys = tl.where(bits < 0, -magnitude, bits)
    return tl.where(magnitude > 0x7F800000, NAN_KEY, keys)


@triton.jit
def load_keys(source, start, n, BLOCK: tl.constexpr, FROM_SCORES: tl.constexpr):
    """Load the keys of entries ``start..start + BLOCK``, from float32 scores or from int32 keys."""
    entry = start + tl.arange(0, BLOCK)
    inside = entry < n
    if FROM_SCORES:
        keys = tl.where(inside, score_keys(tl.load(source + entry, mask=inside, other=0.0)), DROPPED)
    else:
        keys = tl.load(source + entry, mask=inside, other=DROPPED)
    return keys


@triton.jit
def count_at_least(
    keys, source, n, threshold, BLOCK: tl.constexpr, RESIDENT: tl.constexpr, FROM_SCORES: tl.constexpr
):
    """Count the keys >= threshold; ``keys`` holds them all if RESIDENT."""
    if RESIDENT:
        count = tl.sum((keys >= threshold).to(tl.int32), 0)
    else:
        count = 0
        for start in range(0, n, BLOCK):
            tile = load_keys(source, start, n, BLOCK, FROM_SCORES)
            count += tl.sum((tile >= threshold).to(tl.int32), 0)
    return count


@triton.jit
def extent(keys):
    """Return the smallest and the largest candidate of a tile, its ALWAYS entries and its candidates."""
    always = keys == ALWAYS
    candidate = (keys != DROPPED) & (keys != ALWAYS)
    lowest = tl.min(tl.where(candidate, keys, ALWAYS), 0)
    highest = tl.max(tl.where(candidate, keys, DROPPED), 0)
    counts = tl.sum(
        always.to(tl.int32) + (candidate.to(tl.int32) << 16), 0
    )  # a tile has less than 2^15 entries
    return lowest, highest, counts & 0xFFFF, counts >> 16


@triton.jit
def select_threshold(
    source, n, budget, BLOCK: tl.constexpr, RESIDENT: tl.constexpr, FROM_SCORES: tl.constexpr
):
    """Find what separates the ``budget`` best candidates (all, if fewer) and the ALWAYS entries from the rest.

    Returns:
        ``(threshold, ties, tied, total)``: keys above the threshold are selected, and so are the first ``ties`` of
        the ``tied`` keys equal to it; ``total`` entries in all.
    """
    keys = load_keys(source, 0, n, BLOCK, FROM_SCORES)
    lowest, highest, always, candidates = extent(keys)
    for start in range(BLOCK, n, BLOCK):  # no second tile if RESIDENT
        tile = load_keys(source, start, n, BLOCK, FROM_SCORES)
        tile_lowest, tile_highest, tile_always, tile_candidates = extent(tile)
        lowest = tl.minimum(lowest, tile_lowest)
        highest = tl.maximum(highest, tile_highest)
        always += tile_always
        candidates += tile_candidates
    total = always + tl.maximum(tl.minimum(budget, candidates), 0)

    # Invariant: at least `total` keys are >= low, fewer are > high. int64, as high - low may not fit in int32.
    low = lowest.to(tl.int64)
    high = highest.to(tl.int64)
    reached = always + candidates
    while (low < high) & (reached != total):
        middle = low + ((high - low + 1) >> 1)
        count = count_at_least(keys, source, n, middle.to(tl.int32), BLOCK, RESIDENT, FROM_SCORES)
        enough = count >= total
        low = tl.where(enough, middle, low)
        reached = tl.where(enough, count, reached)
        high = tl.where(enough, high, middle - 1)
    threshold = low.to(tl.int32)
    reached = count_at_least(keys, source, n, threshold, BLOCK, RESIDENT, FROM_SCORES)
    following = tl.minimum(threshold, ALWAYS - 1) + 1  # the largest key has no successor
    above = count_at_least(keys, source, n, following, BLOCK, RESIDENT, FROM_SCORES)
    above = tl.where(threshold == ALWAYS, 0, above)
    return threshold, total - above, reached - above, total


@triton.jit
def write_selected(
    output,
    source,
    n,
    length,
    threshold,
    ties,
    total,
    BLOCK: tl.constexpr,
    FROM_SCORES: tl.constexpr,
    KEEP_LAST: tl.constexpr,
):
    """Write the selected entries in ascending order to the right end of ``output`` [length], -1 before them.

    With KEEP_LAST the last entry is one of the ``total``, selected or not.
    """
    first = length - total
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)
        tl.store(output + column, tl.full((BLOCK,), -1, tl.int64), mask=(column < length) & (column < first))
    above_before = tl.full((), 0, tl.int32)
    equal_before = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        keys = load_keys(source, start, n, BLOCK, FROM_SCORES)
        above = (keys > threshold).to(tl.int32)
        equal = ((keys == threshold) & (entry < n)).to(tl.int32)
        # One scan counts both: the tile has less than 2^16 entries.
        counts = tl.cumsum(above + (equal << 16), 0)
        equal_rank = equal_before + (counts >> 16)
        rank = above_before + (counts & 0xFFFF) + tl.minimum(equal_rank, ties)
        selected = (above > 0) | ((equal > 0) & (equal_rank <= ties))
        if KEEP_LAST:
            selected = selected | (entry == n - 1)
            rank = tl.where(entry == n - 1, total, rank)
        column = first + rank - 1
        tl.store(output + column, entry.to(tl.int64), mask=selected & (column >= 0))
        above_before += tl.sum(above, 0)
        equal_before += tl.sum(equal, 0)


@triton.jit(do_not_specialize=["k", "n", "length"])  # they change from prompt to prompt
def topk_indices_kernel(
    scores,
    counts,
    index,
    k,
    n,
    length,
    BLOCK: tl.constexpr,
    BLOCK_WRITE: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Select in one sample: scores [B, N] -> index [B, length]; ``counts`` [B] or None takes precedence over k."""
    sample = tl.program_id(0).to(tl.int64)
    if counts is not None:
        k = tl.load(counts + sample).to(tl.int32)
    budget = tl.minimum(k, length)
    source = scores + sample * n
    threshold, ties, _, total = select_threshold(source, n, budget, BLOCK, RESIDENT, True)
    write_selected(
        index + sample * length, source, n, length, threshold, ties, total, BLOCK_WRITE, True, False
    )


def tile_options(n: int) -> dict[str, int | bool]:
    """Return tile size and number of warps for one program over ``n`` entries."""
    block = min(max(next_power_of_2(n), 128), RESIDENT_LIMIT)
    return {"BLOCK": block, "RESIDENT": n <= block, "num_warps": WARPS[block]}


def topk_indices(scores: Tensor, k: int, counts: Tensor | None, length: int) -> Tensor:
    """Launch the selection; arguments and result as in ``reference.py``."""
    batch, n = scores.shape
    if n == 0:
        return torch.full((batch, length), -1, dtype=torch.int64, device=scores.device)
    index = torch.empty((batch, length), dtype=torch.int64, device=scores.device)
    if index.numel():
        tiles = tile_options(n)
        launch(
            topk_indices_kernel,
            (batch,),
            (scores.contiguous(), None if counts is None else counts.contiguous(), index),
            (),
            (k, n, length),
            (),
            {"BLOCK": tiles["BLOCK"], "BLOCK_WRITE": WRITE_BLOCK, "RESIDENT": tiles["RESIDENT"]},
            num_warps=tiles["num_warps"],
            maxnreg=MAX_REGISTERS,
        )
    return index
