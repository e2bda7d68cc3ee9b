# mypy: disable-error-code="no-untyped-def"
"""Region-wise top-k in Triton: one launch, one program per sample.

A program ranks each entry among its neighbours and writes the keys of candidates to a workspace, then selects from it as
``select/kernel.py`` does, with its limit on the keys that stay in registers meanwhile. Only a sample with too few
candidates has its keys written once more: candidates are then selected ALWAYS, and the others compete. How many of each
region are candidates is given, or follows from how many are selected, without the host having to know either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..select.kernel import (
    ALWAYS,
    DROPPED,
    MAX_REGISTERS,
    WRITE_BLOCK,
    score_keys,
    select_threshold,
    tile_options,
    write_selected,
)


@triton.jit
def places_of(positions, entry, n, num_keys):
    """Return where the keys of entries stand, and which of them stand anywhere.

    ``positions`` [N], filler outside 0..num_keys-1; None: each at its own number.
    """
    inside = (entry >= 0) & (entry < n)
    place = entry
    if positions is not None:
        place = tl.load(positions + entry, mask=inside, other=-1)
    return place, inside & (place >= 0) & (place < num_keys)


@triton.jit
def rank_in_region(
    scores, neighbours, positions, entry, place, own, n, num_keys, R: tl.constexpr, CACHE: tl.constexpr
):
    """Count the neighbours that beat each entry of a tile; ``own`` are its keys, neighbours is [N, R]."""
    rank = tl.zeros_like(entry)
    for number in tl.static_range(R):
        other = tl.load(neighbours + entry * R + number, mask=entry < n, other=-1)
        other_place, real = places_of(positions, other, n, num_keys)
        # Not behind the load of its place.
        score = tl.load(scores + other, mask=(other >= 0) & (other < n), other=0.0, cache_modifier=CACHE)
        key = score_keys(score)
        rank += (real & ((key > own) | ((key == own) & (other_place < place)))).to(tl.int32)
    return rank


@triton.jit
def count_regions(neighbours, positions, n, num_keys, R: tl.constexpr, BLOCK: tl.constexpr):
    """Count the regions that have an entry which is no filler; each is counted at the first of these."""
    regions = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        place, first = places_of(positions, entry, n, num_keys)
        for number in range(R):  # not unrolled, or all of them would be loaded at once, in as many registers
            other = tl.load(neighbours + entry * R + number, mask=entry < n, other=-1)
            other_place, real = places_of(positions, other, n, num_keys)
            first = first & (~real | (other_place > place))
        regions += tl.sum(first.to(tl.int32), 0)
    return regions


@triton.jit
def write_region_keys(
    scores,
    neighbours,
    positions,
    keys,
    per_region,
    budget,
    n,
    num_keys,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Write the keys by which one sample is selected by region, and return what is left of the budget for them.

    Entries that are no candidates are DROPPED. Where candidates are fewer than the budget, they are selected ALWAYS, and
    the others compete for the rest of it.

    Args:
        scores: [N].
        neighbours: [N, R].
        positions: Where keys stand, see ``places_of``. The keys of filler aren't written, and it beats nothing.
        keys: [num_keys]; what stands at no entry's place is left as it is.
        per_region: How many of a region are candidates; 0 = as many as the budget needs, where regions are of one size.
        budget: How many are selected, int32.
        CACHE: ``".cg"`` where other programs of the same launch have written the scores, else "".
    """
    wanted = tl.minimum(per_region, R + 1).to(tl.int32)
    if wanted <= 0:
        regions = tl.maximum(count_regions(neighbours, positions, n, num_keys, R, BLOCK), 1)
        wanted = tl.maximum((budget + regions - 1) // regions, 1)
    candidates = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        place, real = places_of(positions, entry, n, num_keys)
        own = score_keys(tl.load(scores + entry, mask=entry < n, other=0.0, cache_modifier=CACHE))
        rank = rank_in_region(scores, neighbours, positions, entry, place, own, n, num_keys, R, CACHE)
        candidate = (rank < wanted) & real
        tl.store(keys + place, tl.where(candidate, own, DROPPED), mask=real)
        candidates += tl.sum(candidate.to(tl.int32), 0)
    tl.debug_barrier()  # other threads of this program read these keys
    if candidates < budget:
        for start in range(0, n, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            place, real = places_of(positions, entry, n, num_keys)
            others = tl.load(keys + place, mask=real, other=0) == DROPPED
            own = score_keys(tl.load(scores + entry, mask=entry < n, other=0.0, cache_modifier=CACHE))
            tl.store(keys + place, tl.where(others, own, ALWAYS), mask=real)
        budget -= candidates
        tl.debug_barrier()
    return budget


# What changes from image to image isn't specialised on, or every new value could mean a new compilation.
@triton.jit(do_not_specialize=["scores_stride_b", "neighbours_stride_b", "per_region", "k", "n", "length"])
def topk_per_region_kernel(
    scores,
    neighbours,
    counts,
    keys,
    index,
    scores_stride_b,
    neighbours_stride_b,
    per_region,
    k,
    n,
    length,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WRITE: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Select in one sample: scores [B, N], neighbours [B or 1, N, R] -> index [B, length].

    ``counts`` [B] or None takes precedence over k; ``keys`` [B, N] is a workspace.
    """
    sample = tl.program_id(0).to(tl.int64)
    if counts is not None:
        k = tl.load(counts + sample)
    budget = tl.minimum(k, length).to(tl.int32)
    keys += sample * n
    budget = write_region_keys(
        scores + sample * scores_stride_b, neighbours + sample * neighbours_stride_b, None, keys,
        per_region, budget, n, n, R, BLOCK_WRITE, "",
    )  # fmt: skip
    threshold, ties, _, total = select_threshold(keys, n, budget, BLOCK, RESIDENT, False)
    write_selected(
        index + sample * length, keys, n, length, threshold, ties, total, BLOCK_WRITE, False, False
    )


def topk_per_region(
    scores: Tensor, neighbours: Tensor, per_region: int, k: int, counts: Tensor | None, length: int
) -> Tensor:
    """Launch the selection; arguments and result as in ``reference.py``; a ``per_region`` of 0 is as many as are needed."""
    batch, n = scores.shape
    if n == 0:
        return torch.full((batch, length), -1, dtype=torch.int64, device=scores.device)
    index = torch.empty((batch, length), dtype=torch.int64, device=scores.device)
    if index.numel():
        # Rows may be part of longer ones, such as the attention of a CLS token without its own column.
        scores = scores if scores.stride(1) == 1 else scores.contiguous()
        neighbours_stride_b = 0 if len(neighbours) == 1 else neighbours[0].numel()
        tiles = tile_options(n)
        launch(
            topk_per_region_kernel,
            (batch,),
            (
                scores,
                neighbours.contiguous(),
                None if counts is None else counts.contiguous(),
                torch.empty((batch, n), dtype=torch.int32, device=scores.device),
                index,
            ),
            (),
            (scores.stride(0), neighbours_stride_b, per_region, k, n, length),
            (),
            {
                "R": neighbours.shape[2],
                "BLOCK": tiles["BLOCK"],
                "BLOCK_WRITE": WRITE_BLOCK,
                "RESIDENT": tiles["RESIDENT"],
            },
            num_warps=tiles["num_warps"],
            maxnreg=MAX_REGISTERS,
        )
    return index
