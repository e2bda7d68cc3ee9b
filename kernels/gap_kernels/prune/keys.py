# mypy: disable-error-code="no-untyped-def"
"""The keys by which the rows of a prompt are selected, in Triton: how scores choose is decided by what is written here."""

from __future__ import annotations

import triton
import triton.language as tl

from ..region.kernel import write_region_keys
from ..select.kernel import ALWAYS, DROPPED, score_keys, select_threshold

# A visual row of the uniform sample: it comes before every score, and counts as what is kept.
SAMPLED = tl.constexpr(ALWAYS.value - 1)


@triton.jit
def is_real(mask, position, inside, mask_stride_q):
    """Return which positions of one sample are no padding; ``mask`` [Q] isn't None."""
    return tl.load(mask + position * mask_stride_q, mask=inside, other=0) != 0


@triton.jit
def write_row_keys(keys, mask, num_rows, mask_stride_q, BLOCK: tl.constexpr):
    """Write a key for every row of one sample to ``keys`` [Q]: text is selected ALWAYS, padding is DROPPED."""
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        code = tl.full((BLOCK,), ALWAYS, tl.int32)
        if mask is not None:
            code = tl.where(is_real(mask, row, row < num_rows, mask_stride_q), code, DROPPED)
        tl.store(keys + row, code, mask=row < num_rows)
    tl.debug_barrier()  # other threads of this program overwrite and then read these keys


@triton.jit
def visual_places(visual_index, start, num_visual, num_rows, BLOCK: tl.constexpr):
    """Return the slots of a tile of ``visual_index`` [V], their positions, and which of them are no filler."""
    slot = start + tl.arange(0, BLOCK)
    position = tl.load(visual_index + slot, mask=slot < num_visual, other=-1)
    return slot, position, (position >= 0) & (position < num_rows)


@triton.jit
def write_score_keys(
    scores, visual_index, keys, mask, num_visual, num_rows, mask_stride_q, BLOCK: tl.constexpr
):
    """Write the keys of the scores [V] of one sample to its visual rows; padding is DROPPED, whatever it scores."""
    for start in range(0, num_visual, BLOCK):
        slot, position, inside = visual_places(visual_index, start, num_visual, num_rows, BLOCK)
        score = tl.load(scores + slot, mask=inside, other=0.0, cache_modifier=".cg")
        code = score_keys(score)
        if mask is not None:
            code = tl.where(is_real(mask, position, inside, mask_stride_q), code, DROPPED)
        tl.store(keys + position, code, mask=inside)
    tl.debug_barrier()


@triton.jit
def write_places(visual_index, places, keys, num_visual, num_rows, BLOCK: tl.constexpr):
    """Write the positions of the visual tokens of one sample that are no padding to ``places`` [V] int32, else -1."""
    for start in range(0, num_visual, BLOCK):
        slot, position, inside = visual_places(visual_index, start, num_visual, num_rows, BLOCK)
        real = tl.load(keys + position, mask=inside, other=DROPPED) != DROPPED
        tl.store(places + slot, tl.where(real, position, -1).to(tl.int32), mask=slot < num_visual)
    tl.debug_barrier()


@triton.jit
def write_keys_by_region(
    scores,
    visual_index,
    neighbours,
    keys,
    places,
    mask,
    per_region,
    budget,
    num_visual,
    num_rows,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the keys of visual rows of one sample by region, and return what is left of the budget for them."""
    positions = visual_index
    if mask is not None:
        write_places(visual_index, places, keys, num_visual, num_rows, BLOCK)
        positions = places
    return write_region_keys(
        scores, neighbours, positions, keys, per_region, budget, num_visual, num_rows, NEIGHBOURS, BLOCK, ".cg"
    )  # fmt: skip


@triton.jit
def take_sample(keys, others, threshold, ties, num_rows, BLOCK: tl.constexpr):
    """Write SAMPLED in place of the keys of visual rows that are selected, and in place of the other ones ``others`` [Q]."""
    ties_before = tl.full((), 0, tl.int32)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        code = tl.load(keys + row, mask=row < num_rows, other=DROPPED)
        visual = (code != ALWAYS) & (code != DROPPED)
        tied = ((code == threshold) & (row < num_rows)).to(tl.int32)
        chosen = (code > threshold) | ((tied > 0) & (ties_before + tl.cumsum(tied, 0) <= ties))
        other = tl.load(others + row, mask=visual & (row < num_rows), other=DROPPED)
        tl.store(keys + row, tl.where(chosen, SAMPLED, other), mask=visual & (row < num_rows))
        ties_before += tl.sum(tied, 0)
    tl.debug_barrier()


@triton.jit
def select_by_stride(
    scores,
    visual_index,
    order,
    keys,
    others,
    budget,
    share,
    of_shares,
    num_visual,
    num_rows,
    BLOCK_SELECT: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Select twice in one sample: the uniform sample, the first by ``order`` [V]; then the best of the others.

    The sample is ``share`` in ``of_shares`` of the budget, in int64 where these aren't constants of the kernel.
    Both are one loop, and it needs nothing but two rows of keys: those in registers are most of what a thread has.
    ``others`` [Q] is a workspace.

    Returns:
        As ``select_threshold``.
    """
    for start in range(0, num_visual, BLOCK):
        slot, position, inside = visual_places(visual_index, start, num_visual, num_rows, BLOCK)
        rank = tl.load(order + slot, mask=inside, other=0)
        spread = tl.where(rank < 0, float("nan"), 0.0 - rank.to(tl.float32))
        score = tl.load(scores + slot, mask=inside, other=0.0, cache_modifier=".cg")
        real = tl.load(keys + position, mask=inside, other=DROPPED) != DROPPED
        tl.store(keys + position, score_keys(spread), mask=real)
        tl.store(others + position, score_keys(score), mask=inside)
    tl.debug_barrier()
    threshold = tl.full((), 0, tl.int32)
    ties = tl.full((), 0, tl.int32)
    tied = tl.full((), 0, tl.int32)
    total = tl.full((), 0, tl.int32)
    for number in range(0, 2):
        if number > 0:
            take_sample(keys, others, threshold, ties, num_rows, BLOCK)
        wanted = tl.where(number > 0, budget, (budget * share // of_shares).to(tl.int32))
        threshold, ties, tied, total = select_threshold(keys, num_rows, wanted, BLOCK_SELECT, RESIDENT, False)
    return threshold, ties, tied, total
