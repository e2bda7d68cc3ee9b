"""Which visual tokens are kept, given their scores: the best anywhere, of each region, some everywhere, or by features."""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from gap_kernels import grid_neighbours, topk_indices, topk_per_region
from gap_kernels.prune.coverage import STRIDE_SHARE, as_ratio
from gap_kernels.region.op import check_neighbours, check_per_region
from gap_kernels.validation import (
    FLOAT_DTYPES,
    ShapeChecker,
    check_range,
    describe,
    describe_number,
    is_number,
    is_readable,
    split_count,
    width_of,
)
from torch import Tensor

from ..constants import Constants
from .by_features import BY_FEATURES, GREEDY, choose_greedily, distinct, least_similar
from .rows import best_last, best_of, last_where, members
from .spatial import spatial_order
from .two_layers import BY_TWO_LAYERS, by_windows, with_neighbours

Count = TypeVar("Count", int, Tensor, int | Tensor)
Coverage = Literal[
    "topk",
    "region",
    "stride",
    "max_min",
    "determinant",
    "coverage_gain",
    "least_similar",
    "distinct",
    "anchors",
    "windows",
]

USUAL_SHARE = STRIDE_SHARE.as_integer_ratio()  # torch.compile can't trace fractions
_LATTICES = Constants(64)
REGION = 2  # rows and columns of a region: Nüwa's separation, arXiv 2602.02951, section 3.1


def choose(
    scores: Tensor,
    keep: int | Tensor,
    coverage: Coverage,
    *,
    neighbours: Tensor | None = None,
    per_region: int | None = None,
    order: Tensor | None = None,
    spread: float | None = None,
    features: Tensor | None = None,
    exponent: float = 1.0,
    mask: Tensor | None = None,
    length: int | None = None,
) -> Tensor:
    """Choose the visual tokens that are kept.

    - ``"topk"``: the best-scored.
    - ``"region"``: the best-scored among the ``per_region`` best of each region (Nüwa, arXiv 2602.02951, which keeps
      112 / 224 / 336 of 576 tokens among the best 1 / 2 / 3 of each 2 x 2 region); see `gap_kernels.topk_per_region`.
    - ``"stride"``: ``spread`` of ``keep``, rounded down, by ``order``; then the best-scored (FEATHER, 2412.13180).
    - Those of `strategies.by_features`: by the features of tokens. Those of `strategies.two_layers` are for whole grids.

    Equal scores go to the lower row, and NaN counts as -inf. A sample with fewer than N tokens has filler at the end of
    its row: score -inf, neighbours and order -1, mask False; not chosen while ``keep`` is at most the number of tokens.

    Args:
        scores: [G, N] float32, one row per grid or per sample.
        keep: How many to choose, 0..N: an int, or, but by ``"distinct"``, [G] int64.
        coverage: One of the above.
        neighbours: For ``"region"``: [G, N, R] or [1, N, R] int32, see `grid_neighbours`. In the first form a token that
            is alone in its region and scored -inf or NaN counts as filler.
        per_region: For ``"region"``: candidates of each region, >= 1. Default: ``ceil(keep / regions)``.
        order: For ``"stride"``: [G, N] or [1, N] int64, ranks of `spatial_order`, of each grid of a row its own.
        spread: For ``"stride"``: in 0..1, read as the decimal that was written. Default: ``STRIDE_SHARE``.
        features: For those that compare tokens: [G, N, C], of any float dtype.
        exponent: Power of the scores by ``"determinant"`` and ``"coverage_gain"``.
        mask: For those that compare tokens, but ``"distinct"``: [G, N] bool, True = a real token. Default: all are.
        length: Columns of the result; default ``keep``, or the largest ``keep``, which takes one read from the device.

    Returns:
        [G, length] int64, ascending, filled with -1 on the left.

    Raises:
        ValueError: If an argument has another shape, dtype or device than stated, is out of range (values of a ``keep``
            tensor: on the CPU only), or is missing.
    """
    shapes = ShapeChecker()
    shapes.check("scores", scores, "B N", (torch.float32,))
    length = _check_keep(keep, scores, shapes, length)
    _check_coverage(coverage)
    _check_grids(shapes, neighbours, per_region, order, spread)
    _check_features(shapes, coverage, features, mask, keep)
    if features is not None and coverage in BY_FEATURES:
        return _by_features(scores, features, keep, coverage, exponent, mask, length)
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    if coverage == "topk":
        return topk_indices(scores, keep, length=length)
    if coverage == "region":
        return _by_region(scores, neighbours, per_region, keep, length)
    return _by_stride(scores, order, keep, length, spread)


def choose_on_grid(
    scores: Tensor,
    keep: int,
    coverage: Coverage,
    grid: tuple[int, int],
    beside: Tensor | None = None,
    *,
    exponent: float = 1.0,
    per_region: int | None = None,
    spread: float | None = None,
) -> Tensor:
    """Choose as `choose` does where every row is one whole grid, in the fewest operations and without a read.

    Args:
        scores: [G, N] float32, none of them -inf beside NaN.
        keep: How many to choose, 0..N.
        coverage: How.
        grid: (H, W), H * W = N.
        beside: What a coverage looks at beside the scores: [G, N, C], features, where it compares tokens; [G, N] float32,
            the score in an earlier layer of the vision encoder, for ``"anchors"`` and ``"windows"``.
        exponent: Power of the scores, as in `choose`.
        per_region: For ``"region"``, as in `choose`.
        spread: For ``"stride"``, as in `choose`.

    Returns:
        [G, keep] int64, ascending.
    """
    ranks = ranks_on_grid(scores, keep, coverage, grid, beside, spread=spread)
    if ranks is not None:
        return topk_indices(ranks, keep)
    if beside is not None and coverage in BY_FEATURES:
        return _by_features(scores, beside, keep, coverage, exponent, None, keep)
    neighbours = grid_neighbours(grid, device=scores.device)
    regions = -(-grid[0] // REGION) * -(-grid[1] // REGION)
    candidates = max(-(-keep // regions), 1) if per_region is None else per_region
    return topk_per_region(scores, neighbours[None], candidates, keep)


def ranks_on_grid(
    scores: Tensor,
    keep: int,
    coverage: Coverage,
    grid: tuple[int, int],
    beside: Tensor | None = None,
    *,
    spread: float | None = None,
) -> Tensor | None:
    """Return [G, N] float32, of which the ``keep`` largest are what `choose_on_grid` chooses; None where nothing ranks so.

    Equal ones go to the lower row, and NaN comes last. Arguments as there.
    """
    if coverage == "topk" or keep == scores.shape[1]:
        return scores
    if coverage in BY_TWO_LAYERS and beside is not None:
        by_two = with_neighbours if coverage == "anchors" else by_windows
        return by_two(scores, beside, keep, grid)
    if coverage == "stride":
        share, device = _lattice(keep, spread), scores.device
        in_lattice = _LATTICES.get(
            (grid, share, device), device, lambda: spatial_order(grid, device=device) < share
        )
        return best_last(scores).masked_fill_(in_lattice, torch.inf)
    return None


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


def _check_coverage(coverage: Coverage) -> None:
    allowed = [each for each in get_args(Coverage) if each not in BY_TWO_LAYERS]
    if not isinstance(coverage, str) or coverage not in allowed:
        raise ValueError(
            f"coverage: expected one of {', '.join(map(repr, allowed))}, got {describe(coverage)}"
        )


def _check_grids(
    shapes: ShapeChecker,
    neighbours: Tensor | None,
    per_region: int | None,
    order: Tensor | None,
    spread: float | None,
) -> None:
    if spread is not None and (not is_number(spread) or not 0 <= spread <= 1):
        raise ValueError(f"spread: expected a float in 0..1, got {describe(spread)}")
    if neighbours is not None:
        check_neighbours(shapes, neighbours)
    check_per_region(per_region)
    if order is not None:
        shapes.check_shared("order", order, "N", (torch.int64,))


def _check_features(
    shapes: ShapeChecker,
    coverage: Coverage,
    features: Tensor | None,
    mask: Tensor | None,
    keep: int | Tensor,
) -> None:
    if features is not None:
        shapes.check("features", features, "B N C", FLOAT_DTYPES)
    if mask is not None:
        shapes.check("mask", mask, "B N", (torch.bool,))
    if coverage not in BY_FEATURES:
        return
    if features is None:
        raise ValueError(
            f"features: coverage={coverage!r} compares tokens by their features, [G, N, C], got None"
        )
    if coverage == "distinct" and isinstance(keep, Tensor):
        raise ValueError(
            f"keep: coverage='distinct' takes an int, the same for all rows, got {describe(keep)}"
        )
    if coverage == "distinct" and mask is not None:
        raise ValueError(f"mask: coverage='distinct' takes rows without filler, got {describe(mask)}")


def _by_features(
    scores: Tensor,
    features: Tensor,
    keep: int | Tensor,
    coverage: Coverage,
    exponent: float,
    mask: Tensor | None,
    length: int,
) -> Tensor:
    if coverage in GREEDY:
        given = (scores, features, keep, coverage)
        return choose_greedily(*given, exponent=exponent, mask=mask, length=length)
    if coverage == "least_similar":
        return least_similar(scores, features, keep, mask=mask, length=length)
    assert not isinstance(keep, Tensor)
    index = distinct(scores, features, keep)
    return index if length == keep else F.pad(index, (length - keep, 0), value=-1)


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


def _by_stride(
    scores: Tensor, order: Tensor | None, keep: int | Tensor, length: int, spread: float | None
) -> Tensor:
    if order is None:
        raise ValueError("order: coverage='stride' needs the rank of each token, got None; see spatial_order")
    order = order.expand_as(scores)
    lattice, lattice_length = _lattice(keep, spread), _lattice(length, spread)
    uniform = topk_indices(last_where(order < 0, -order.float()), lattice, length=lattice_length)
    others = ~members(uniform, scores.shape[1])
    best = best_of(scores, others, keep - lattice, length - lattice_length)
    return torch.cat([uniform, best], dim=1).sort(dim=1).values


def _lattice(keep: Count, spread: float | None) -> Count:
    """``spread`` of ``keep``, rounded down."""
    numerator, denominator = USUAL_SHARE if spread is None else as_ratio(float(spread))
    return keep * numerator // denominator
