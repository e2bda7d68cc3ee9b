"""Exact, ordered top-k among the best entries of each region."""

from __future__ import annotations

from torch import Tensor

from ..validation import ShapeChecker, split_count, width_of
from .grid import grid_neighbours
from .op import candidates_of, check_region, topk_per_region_op

__all__ = ["grid_neighbours", "topk_per_region"]


def topk_per_region(
    scores: Tensor,
    neighbours: Tensor,
    per_region: int | None,
    k: int | Tensor,
    *,
    length: int | None = None,
) -> Tensor:
    """Return the indices of the ``k`` best among the ``per_region`` best of each region, in ascending index order.

    This keeps spatial coverage, as Nüwa's separation and alignment do (arXiv 2602.02951): an entry is a candidate if
    fewer than ``per_region`` of its neighbours beat it, and the best ``k`` candidates are selected. A sample with fewer
    candidates than ``k`` gets all of them and the best of its other entries, so ``min(k, N)`` entries in any case. One
    entry beats another, and is better, exactly as in `topk_indices`: by the larger score, then by the lower index,
    and NaN is beaten by everything. One launch::

        topk_per_region(scores, grid_neighbours((24, 24))[None], per_region=1, k=112)  # LLaVA-1.5, 576 scores

    Args:
        scores: [B, N] float32; B and N may be 0. Rows may lie apart, as those of a slice do.
        neighbours: [B, N, R] int32, or [1, N, R] for all samples alike, with R of 0..8: the other entries of each
            entry's region, distinct, in any order; -1 = none. See `grid_neighbours`.
        per_region: Candidates of a region, >= 1. None: as many as ``k`` needs of each region, ``ceil(k / regions)``, found
            without a read; a region is counted at its first entry, so that neighbours must be mutual then.
        k: How many to select, >= 0: an int, or an int64 tensor [B] with a count per sample. More than N means all.
        length: Columns of the result; default ``min(k, N)``, or that of the largest ``k`` of the batch, which takes
            one read from the device. Give it under ``torch.compile`` or CUDA graphs if ``k`` is a tensor. More than
            needed means more filler.

    Returns:
        [B, length] int64. A row with fewer than ``length`` indices is filled with -1 on the left.

    Raises:
        ValueError: If an argument has another shape, dtype or device, or is out of range. The values of
            ``neighbours`` and of a ``k`` tensor are checked on the CPU only; elsewhere neighbours out of range and an
            entry beside itself count as none, one that is there twice counts twice, and counts beyond
            ``min(N, length)`` select the best ``min(N, length)``.
    """
    shapes = ShapeChecker()
    check_region(shapes, scores, neighbours, per_region)
    count, counts = split_count("k", k, shapes)
    num_entries = scores.shape[1]
    count = min(count, num_entries)
    largest = width_of("k", count, counts, length)
    length = min(largest, num_entries) if length is None else length
    candidates = candidates_of(per_region, neighbours)
    return topk_per_region_op(scores, neighbours, candidates, count, counts, length)
