# mypy: disable-error-code="no-untyped-def"
"""Region-wise top-k in Triton: one launch, one program per sample.

A program ranks each entry among its neighbours and writes the keys of candidates to a workspace, then selects from it as
``select/kernel.py`` does, with its limit on the keys that stay in registers meanwhile. Only a sample with too few
candidates has its keys written once more: candidates are then selected ALWAYS, and the others compete.
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
def rank_in_region(scores, neighbours, entry, own, n, R: tl.constexpr):
    """Count the neighbours that beat each entry of a tile; ``own`` are its keys, neighbours is [N, R]."""
    rank = tl.zeros_like(entry)
    for place in tl.static_range(R):
        other = tl.load(neighbours + entry * R + place, mask=entry < n, other=-1)
        real = (other >= 0) & (other < n)
        key = score_keys(tl.load(scores + other, mask=real, other=0.0))
        rank += (real & ((key > own) | ((key == own) & (other < entry)))).to(tl.int32)
    return rank


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
    scores += sample * scores_stride_b
    neighbours += sample * neighbours_stride_b
    keys += sample * n

    candidates = tl.full((), 0, tl.int32)
    for start in range(0, n, BLOCK_WRITE):
        entry = start + tl.arange(0, BLOCK_WRITE)
        own = score_keys(tl.load(scores + entry, mask=entry < n, other=0.0))
        rank = rank_in_region(scores, neighbours, entry, own, n, R)
        candidate = (rank < per_region) & (entry < n)
        tl.store(keys + entry, tl.where(candidate, own, DROPPED), mask=entry < n)
        candidates += tl.sum(candidate.to(tl.int32), 0)
    tl.debug_barrier()  # other threads of this program read these keys
    if candidates < budget:
        for start in range(0, n, BLOCK_WRITE):
            entry = start + tl.arange(0, BLOCK_WRITE)
            others = tl.load(keys + entry, mask=entry < n, other=0) == DROPPED
            own = score_keys(tl.load(scores + entry, mask=entry < n, other=0.0))
            tl.store(keys + entry, tl.where(others, own, ALWAYS), mask=entry < n)
        budget -= candidates
        tl.debug_barrier()

    threshold, ties, _, total = select_threshold(keys, n, budget, BLOCK, RESIDENT, False)
    write_selected(
        index + sample * length, keys, n, length, threshold, ties, total, BLOCK_WRITE, False, False
    )


def topk_per_region(
    scores: Tensor, neighbours: Tensor, per_region: int, k: int, counts: Tensor | None, length: int
) -> Tensor:
    """Launch the selection; arguments and result as in ``reference.py``."""
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
