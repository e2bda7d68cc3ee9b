"""Which visual tokens are kept, given their scores: the best anywhere, the best of each region, or some everywhere."""

from __future__ import annotations

import torch
from gap_kernels import grid_neighbours, topk_indices, topk_per_region
from gap_kernels.prune.coverage import STRIDE_SHARE, Coverage, check_coverage
from gap_kernels.region.op import check_neighbours, check_per_region
from gap_kernels.validation import (
    ShapeChecker,
    check_range,
    describe_number,
    is_readable,
    split_count,
    width_of,
)
from torch import Tensor

from .rows import best_of, last_where, members
from .spatial import spatial_order

REGION = 2  # rows and columns of a region: Nüwa's separation, arXiv 2602.02951, section 3.1


def choose(
    scores: Tensor,
    keep: int | Tensor,
    coverage: Coverage,
    *,
    neighbours: Tensor | None = None,
    per_region: int | None = None,
    order: Tensor | None = None,
    length: int | None = None,
) -> Tensor:
    """Choose the visual tokens that are kept.

    - ``"topk"``: the best-scored.
    - ``"region"``: the best-scored among the ``per_region`` best of each region (Nüwa, arXiv 2602.02951, which keeps
      112 / 224 / 336 of 576 tokens among the best 1 / 2 / 3 of each 2 x 2 region); see `gap_kernels.topk_per_region`.
    - ``"stride"``: ``STRIDE_SHARE`` of ``keep``, rounded down, by ``order`` alone; then the best-scored of the others
      (FEATHER, arXiv 2412.13180). FEATHER's lattice has a fixed stride and what it adds to the best-scored depends on
      how many they share. Here ``keep`` is exact: the lattice is the beginning of `spatial_order`, and the
      best-scored fill the budget.

    Equal scores go to the lower row, and NaN counts as -inf. A sample with fewer than N tokens has filler at the end of
    its row: score -inf, neighbours -1, order -1. Filler is not chosen while ``keep`` is at most the number of tokens.

    Args:
        scores: [G, N] float32, one row per grid or per sample.
        keep: How many to choose, 0..N: an int, or [G] int64.
        coverage: ``"topk"``, ``"region"`` or ``"stride"``.
        neighbours: For ``"region"``: [G, N, R] or [1, N, R] int32, see `gap_kernels.grid_neighbours`. In the first
            form a token that is alone in its region and scored -inf or NaN counts as filler.
        per_region: For ``"region"``: how many of each region are candidates, >= 1. Default: as many as ``keep`` needs,
            ``ceil(keep / regions)`` of each row.
        order: For ``"stride"``: [G, N] or [1, N] int64, ranks of `spatial_order`. Where a row holds several grids,
            each may have its own; equal ranks go to the lower row.
        length: Columns of the result; default ``keep``, or the largest ``keep``, which takes one read from the device.

    Returns:
        [G, length] int64, ascending, filled with -1 on the left.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated, is out of range, or is missing. The
            values of a ``keep`` tensor are checked on the CPU only.
    """
    shapes = ShapeChecker()
    shapes.check("scores", scores, "B N", (torch.float32,))
    length = _check_keep(keep, scores, shapes, length)
    check_coverage(coverage)
    _check_grids(shapes, neighbours, per_region, order)
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    if coverage == "topk":
        return topk_indices(scores, keep, length=length)
    if coverage == "region":
        return _by_region(scores, neighbours, per_region, keep, length)
    return _by_stride(scores, order, keep, length)


def choose_on_grid(scores: Tensor, keep: int, coverage: Coverage, grid: tuple[int, int]) -> Tensor:
    """Choose as `choose` does where every row is one whole grid, in the fewest operations and without a read.

    Args:
        scores: [G, N] float32, none of them -inf beside NaN.
        keep: How many to choose, 0..N.
        coverage: How.
        grid: (H, W), H * W = N.

    Returns:
        [G, keep] int64, ascending.
    """
    if coverage == "topk":
        return topk_indices(scores, keep)
    if coverage == "region":
        neighbours = grid_neighbours(grid, device=scores.device)
        regions = -(-grid[0] // REGION) * -(-grid[1] // REGION)
        return topk_per_region(scores, neighbours[None], max(-(-keep // regions), 1), keep)
    lattice = keep * STRIDE_SHARE.numerator // STRIDE_SHARE.denominator
    # The lattice is chosen first: no score is above the largest number but its infinity.
    scores = torch.nan_to_num(
        scores, nan=-torch.inf, posinf=torch.finfo(torch.float32).max, neginf=-torch.inf
    )
    in_lattice = spatial_order(grid, device=scores.device) < lattice
    return topk_indices(scores.masked_fill_(in_lattice, torch.inf), keep)


def _check_keep(keep: int | Tensor, scores: Tensor, shapes: ShapeChecker, length: int | None) -> int:
    """Return the columns of the result, after a check of ``keep``."""
    num_rows = scores.shape[1]
    count, counts = split_count("keep", keep, shapes)
    if counts is None:
        if count > num_rows:
            raise ValueError(f"keep: expected 0..{num_rows} (N of scores), got {describe_number(count)}")
    elif is_readable(counts):
        check_range("keep", counts, 0, num_rows)
        count = int(counts.max()) if counts.numel() else 0
    return width_of("keep", count, counts, length)


def _check_grids(
    shapes: ShapeChecker, neighbours: Tensor | None, per_region: int | None, order: Tensor | None
) -> None:
    if neighbours is not None:
        check_neighbours(shapes, neighbours)
    check_per_region(per_region)
    if order is not None:
        shapes.check_shared("order", order, "N", (torch.int64,))


def _by_region(
    scores: Tensor, neighbours: Tensor | None, per_region: int | None, keep: int | Tensor, length: int
) -> Tensor:
    if neighbours is None:
        raise ValueError(
            "neighbours: coverage='region' needs the neighbours of each token, got None; "
            "see gap_kernels.grid_neighbours"
        )
    if neighbours.shape[0] == scores.shape[0]:  # one grid for all rows has no filler
        # Filler is alone in its region, so a candidate in spite of its score: let the first tokens beat it there.
        filler = (neighbours < 0).all(-1) & scores.isneginf()
        first = torch.arange(neighbours.shape[2], dtype=neighbours.dtype, device=neighbours.device)
        row = torch.arange(scores.shape[1], device=neighbours.device)[:, None]
        others = torch.where((first < scores.shape[1]) & (first != row), first, -1)  # [N, R]
        neighbours = torch.where(filler[..., None], others, neighbours)
    return topk_per_region(scores, neighbours, per_region, keep, length=length)


def _by_stride(scores: Tensor, order: Tensor | None, keep: int | Tensor, length: int) -> Tensor:
    if order is None:
        raise ValueError("order: coverage='stride' needs the rank of each token, got None; see spatial_order")
    order = order.expand_as(scores)
    lattice = keep * STRIDE_SHARE.numerator // STRIDE_SHARE.denominator
    lattice_length = length * STRIDE_SHARE.numerator // STRIDE_SHARE.denominator
    uniform = topk_indices(last_where(order < 0, -order.float()), lattice, length=lattice_length)
    others = ~members(uniform, scores.shape[1])
    best = best_of(scores, others, keep - lattice, length - lattice_length)
    return torch.cat([uniform, best], dim=1).sort(dim=1).values
