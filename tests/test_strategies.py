"""Coverage and merging against plain loops, on grids and on rows with filler."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from gap_kernels import grid_neighbours, topk_indices
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_triton.strategies import STRIDE_SHARE, choose, spatial_order

NAN, INF = math.nan, math.inf
GRID = st.tuples(st.integers(1, 9), st.integers(1, 9))
SCORE = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.5, INF, -INF, NAN]), st.floats(-4, 4, width=32, allow_nan=False)
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ranked(scores: list[float]) -> list[int]:
    """All rows, best first; ties to the lower row, NaN as -inf."""
    keys = [(INF if math.isnan(score) else -score, row) for row, score in enumerate(scores)]
    return [row for _, row in sorted(keys)]


def fill(row: list[int], length: int) -> list[int]:
    return [-1] * (length - len(row)) + sorted(row)


# --- the order of a grid -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.tuples(st.integers(1, 24), st.integers(1, 24)))
def test_spatial_order_is_a_permutation_spread_evenly(grid: tuple[int, int]) -> None:
    height, width = grid
    order = spatial_order(grid)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(height * width))
    ranks = order.view(height, width)
    steps = torch.arange(height * width + 1)[:, None, None]
    for size in (2, 4, 8, 16):
        corners = [
            (row, column)
            for row in range(0, height - size + 1, size)
            for column in range(0, width - size + 1, size)
        ]
        if corners:
            blocks = torch.stack([ranks[r : r + size, c : c + size].flatten() for r, c in corners])
            within = (blocks < steps).sum(-1)  # [k, block]
            assert int((within.amax(1) - within.amin(1)).max()) <= 1


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_a_quarter_of_an_even_grid_is_the_lattice_of_stride_2(size: int) -> None:
    ranks = spatial_order((size, size)).view(size, size)
    first = (ranks < size * size // 4).nonzero().tolist()
    assert first == [[row, column] for row in range(0, size, 2) for column in range(0, size, 2)]


def test_spatial_order_by_hand() -> None:
    expected = [[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]
    assert spatial_order((4, 4)).view(4, 4).tolist() == expected
    assert spatial_order((2, 3)).tolist() == [0, 3, 1, 4, 2, 5]
    assert spatial_order((1, 1)).tolist() == [0]


@pytest.mark.parametrize("grid", [(0, 3), (3, -1), 4, (2.0, 3), (1, 2, 3), (True, 2)])
def test_spatial_order_refuses_what_is_no_grid(grid: object) -> None:
    with pytest.raises(ValueError, match="grid: expected two ints >= 1"):
        spatial_order(grid)  # type: ignore[arg-type]


# --- coverage ------------------------------------------------------------------------------------------------------


def chosen_topk(scores: list[float], keep: int) -> list[int]:
    return ranked(scores)[:keep]


def chosen_by_region(
    scores: list[float], grid: tuple[int, int], keep: int, per_region: int | None
) -> list[int]:
    """The best of the candidates, then the best of the rest, from cells and their 2 x 2 regions."""
    regions: dict[tuple[int, int], list[int]] = {}
    place = {row: number for number, row in enumerate(ranked(scores))}
    for cell in range(len(scores)):
        regions.setdefault((cell // grid[1] // 2, cell % grid[1] // 2), []).append(cell)
    if per_region is None:
        per_region = max(1, math.ceil(keep / len(regions)))
    candidates = {cell for cells in regions.values() for cell in sorted(cells, key=place.get)[:per_region]}
    return sorted(place, key=lambda cell: (cell not in candidates, place[cell]))[:keep]


def chosen_by_stride(scores: list[float], order: list[int], keep: int) -> list[int]:
    lattice = sorted(range(len(scores)), key=lambda row: (order[row], row))[: int(keep * Fraction(3, 10))]
    others = [row for row in ranked(scores) if row not in lattice]
    return lattice + others[: keep - len(lattice)]


def expected_choice(
    coverage: str, scores: list[float], grid: tuple[int, int], keep: int, per_region: int | None
) -> list[int]:
    if coverage == "topk":
        return chosen_topk(scores, keep)
    if coverage == "region":
        return chosen_by_region(scores, grid, keep, per_region)
    return chosen_by_stride(scores, spatial_order(grid).tolist(), keep)


def test_the_share_of_the_lattice() -> None:
    """What FEATHER keeps by its lattice, rounded: a ninth, beside 30% of the rest."""
    ninth = Fraction(1, 9)
    assert abs(STRIDE_SHARE - ninth / (ninth + (1 - ninth) * Fraction(3, 10))) < Fraction(1, 100)


@pytest.mark.parametrize("coverage", ["topk", "region", "stride"])
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_choice_on_grids(coverage: str, data: st.DataObject) -> None:
    grid = data.draw(GRID)
    cells = grid[0] * grid[1]
    groups = data.draw(st.integers(1, 3))
    row = st.lists(SCORE, min_size=cells, max_size=cells)
    scores = data.draw(st.lists(row, min_size=groups, max_size=groups))
    keep = data.draw(st.lists(st.integers(0, cells), min_size=groups, max_size=groups))
    per_region = data.draw(st.sampled_from([None, 1, 2, 3, 4]))
    # Where a cell that is alone in its region is scored -inf it may count as filler.
    if groups == 1 and coverage == "region":
        scores = [[-5.0 if score == -INF or math.isnan(score) else score for score in scores[0]]]
    shared = {
        "neighbours": grid_neighbours(grid)[None],
        "order": spatial_order(grid)[None],
        "per_region": per_region,
    }
    tensor = torch.tensor(scores, dtype=torch.float32)
    given_scores = tensor.clone()
    index = choose(tensor, torch.tensor(keep), coverage, **shared)
    wanted = [
        expected_choice(coverage, row, grid, k, per_region) for row, k in zip(scores, keep, strict=True)
    ]
    assert index.dtype == torch.int64
    assert index.tolist() == [fill(row, max(keep)) for row in wanted]
    assert torch.equal(tensor.nan_to_num(), given_scores.nan_to_num())

    longer = choose(tensor, torch.tensor(keep), coverage, length=max(keep) + 2, **shared)
    assert longer.tolist() == [fill(row, max(keep) + 2) for row in wanted]
    one = choose(tensor, keep[0], coverage, **shared)
    assert one.tolist() == [
        sorted(expected_choice(coverage, row, grid, keep[0], per_region)) for row in scores
    ]


@pytest.mark.parametrize("coverage", ["topk", "region", "stride"])
@settings(deadline=None, max_examples=40)
@given(st.data())
def test_choice_on_samples_with_filler(coverage: str, data: st.DataObject) -> None:
    """Rows of different length, filler at the right: each is as if it were alone."""
    grids = data.draw(st.lists(GRID, min_size=2, max_size=3))
    lengths = [grid[0] * grid[1] for grid in grids]
    # The longest row may have filler too.
    columns = max(lengths) + data.draw(st.integers(0, 2))
    keep = [data.draw(st.integers(0, length)) for length in lengths]
    per_region = data.draw(st.sampled_from([None, 1, 2, 3, 4]))
    finite = st.one_of(
        st.sampled_from([0.0, 1.0, NAN if coverage != "region" else 0.5]), st.floats(-4, 4, width=32)
    )
    rows = [data.draw(st.lists(finite, min_size=length, max_size=length)) for length in lengths]
    scores = torch.full((len(grids), columns), -INF)
    neighbours = torch.full((len(grids), columns, 3), -1, dtype=torch.int32)
    order = torch.full((len(grids), columns), -1)
    for number, grid in enumerate(grids):
        scores[number, : lengths[number]] = torch.tensor(rows[number])
        neighbours[number, : lengths[number]] = grid_neighbours(grid)
        order[number, : lengths[number]] = spatial_order(grid)
    index = choose(
        scores, torch.tensor(keep), coverage, neighbours=neighbours, order=order, per_region=per_region
    )
    wanted = [
        expected_choice(coverage, row, grid, k, per_region)
        for row, grid, k in zip(rows, grids, keep, strict=True)
    ]
    assert index.tolist() == [fill(row, max(keep)) for row in wanted]


def test_filler_is_no_region() -> None:
    """Two regions of four and four fillers: to keep six takes three of each region, not one."""
    scores = torch.tensor([[8.0, 7.0, 4.0, 3.0, 6.0, 5.0, 2.0, 1.0, -INF, -INF, -INF, -INF]])
    neighbours = torch.full((1, 12, 3), -1, dtype=torch.int32)
    neighbours[0, :8] = grid_neighbours((2, 4))
    assert choose(scores, 6, "region", neighbours=neighbours).tolist() == [[0, 1, 2, 3, 4, 6]]
    # Cells 0, 1, 4, 5 and 2, 3, 6, 7 are the regions: the best six anywhere would be 0, 1, 2, 3, 4, 5.
    assert choose(scores, 6, "topk").tolist() == [[0, 1, 2, 3, 4, 5]]


def test_nuwa_numbers_of_candidates() -> None:
    """112 / 224 / 336 of 576 need 1 / 2 / 3 of each of the 144 regions."""
    scores = torch.rand(1, 576, generator=generator())
    neighbours = grid_neighbours((24, 24))[None]
    for keep, per_region in ((112, 1), (224, 2), (336, 3)):
        index = choose(scores, keep, "region", neighbours=neighbours)
        assert torch.equal(
            index, choose(scores, keep, "region", neighbours=neighbours, per_region=per_region)
        )
        assert not torch.equal(index, topk_indices(scores, keep))


def test_several_grids_in_one_row_share_the_lattice() -> None:
    order = torch.cat([spatial_order((2, 2)), spatial_order((2, 2))])[None]
    scores = torch.tensor([[0.0, 0.0, 0.0, 9.0, 0.0, 0.0, 0.0, 0.0]])
    # 7 tokens: 2 by the lattice, the first of each grid; 5 by score.
    assert choose(scores, 7, "stride", order=order).tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert choose(scores, 2, "stride", order=order).tolist() == [[0, 3]]


SCORES = torch.zeros(2, 6)
NEIGHBOURS = grid_neighbours((2, 3))[None]
ORDER = spatial_order((2, 3))[None]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((SCORES.double(), 1, "topk"), {}, "scores: expected dtype torch.float32, got"),
        ((SCORES, 7, "topk"), {}, r"keep: expected 0..6 \(N of scores\), got 7"),
        ((SCORES, -1, "topk"), {}, "keep: expected a count >= 0, got -1"),
        ((SCORES, 0.5, "topk"), {}, "keep: expected an int or an int64 tensor"),
        ((SCORES, torch.tensor([1, 7]), "topk"), {}, "keep: expected values in 0..6, got 7"),
        ((SCORES, torch.tensor([1, 3]), "stride"), {"order": ORDER, "length": 2}, "length: expected at least 3, got 2"),
        ((SCORES, 1, "random"), {}, "coverage: expected one of 'topk', 'region', 'stride', got 'random'"),
        ((SCORES, 1, "region"), {}, "neighbours: coverage='region' needs .* got None; see gap_kernels.grid_neighb"),
        ((SCORES, 1, "stride"), {}, "order: coverage='stride' needs .* got None; see spatial_order"),
        ((SCORES, 1, "stride"), {"order": ORDER[0]}, r"order: expected 2 dimensions \[R, N\]"),
        ((SCORES, 1, "stride"), {"order": ORDER[:, :4]}, r"order: expected \[R, N\] with N = 6"),
        ((SCORES, 1, "stride"), {"order": ORDER.expand(3, -1)}, r"order: expected \[B, N\] with B = 2, or \[1, N\]"),
        ((SCORES, 1, "region"), {"neighbours": NEIGHBOURS[0]}, "neighbours: expected 3 dimensions"),
        ((SCORES, 1, "region"), {"neighbours": NEIGHBOURS, "per_region": 0}, "per_region: expected at least 1, got 0"),
    ],
)  # fmt: skip
def test_choice_refuses_bad_arguments(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(*args, **kwargs)


def test_choice_of_nothing() -> None:
    for coverage in ("topk", "region", "stride"):
        shared = {"neighbours": NEIGHBOURS, "order": ORDER}
        assert choose(SCORES, 0, coverage, **shared).shape == (2, 0)
        assert choose(SCORES[:0], 2, coverage, **shared).shape == (0, 2)
