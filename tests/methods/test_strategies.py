"""Coverage and merging against plain loops, on grids and on rows with filler."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from gap_kernels import grid_neighbours, topk_indices
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.naive.strategies import (
    averaged,
    chosen_by_region,
    collected_nearest,
    cosine,
    expect,
    expected_choice,
    fill,
    gathered_contextual,
)
from torch import Tensor

from gap_triton.strategies import (
    LLAVA,
    LLAVA_NEXT,
    QWEN,
    STRIDE_SHARE,
    AggregationRule,
    Merged,
    aggregate,
    average,
    choose,
    contextual,
    contextual_count,
    nearest,
    outlier_count,
    raters,
    similarity_outlier_count,
    spatial_order,
    text_similarity,
)
from gap_triton.strategies.coverage import choose_on_grid
from gap_triton.strategies.grid_positions import LAST, GridPositions

NAN, INF = math.nan, math.inf
GRID = st.tuples(st.integers(1, 9), st.integers(1, 9))
SCORE = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.5, INF, -INF, NAN]), st.floats(-4, 4, width=32, allow_nan=False)
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
    spread = data.draw(st.sampled_from([None, 0, 0.1, 0.294118, 0.7, 1.0]))
    # Where a cell that is alone in its region is scored -inf it may count as filler.
    if groups == 1 and coverage == "region":
        scores = [[-5.0 if score == -INF or math.isnan(score) else score for score in scores[0]]]
    shared = {
        "neighbours": grid_neighbours(grid)[None],
        "order": spatial_order(grid)[None],
        "per_region": per_region,
        "spread": spread,
    }
    tensor = torch.tensor(scores, dtype=torch.float32)
    given_scores = tensor.clone()
    index = choose(tensor, torch.tensor(keep), coverage, **shared)
    wanted = [
        expected_choice(coverage, row, grid, k, per_region, spread)
        for row, k in zip(scores, keep, strict=True)
    ]
    assert index.dtype == torch.int64
    assert index.tolist() == [fill(row, max(keep)) for row in wanted]
    assert torch.equal(tensor.nan_to_num(), given_scores.nan_to_num())

    longer = choose(tensor, torch.tensor(keep), coverage, length=max(keep) + 2, **shared)
    assert longer.tolist() == [fill(row, max(keep) + 2) for row in wanted]
    one = choose(tensor, keep[0], coverage, **shared)
    assert one.tolist() == [
        sorted(expected_choice(coverage, row, grid, keep[0], per_region, spread)) for row in scores
    ]
    if not (tensor.isnan().any() and tensor.isneginf().any()):
        options = {"per_region": per_region, "spread": spread}
        assert torch.equal(choose_on_grid(tensor, keep[0], coverage, grid, **options), one)


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


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_places_of_what_is_left(data: st.DataObject) -> None:
    """Neighbours and ranks of some visual rows, with filler anywhere, from those of all of them."""
    seeded = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    grids = data.draw(st.lists(GRID, min_size=1, max_size=3))
    cells = [grid[0] * grid[1] for grid in grids]
    most, queries = max(cells), max(cells) + 4
    neighbours = torch.full((len(grids), most, 3), -1, dtype=torch.int32)
    order, index = torch.full((len(grids), most), LAST), torch.full((len(grids), most), -1)
    left = torch.full((len(grids), data.draw(st.integers(1, most))), -1)
    for sample, (grid, count) in enumerate(zip(grids, cells, strict=True)):
        neighbours[sample, :count], order[sample, :count] = grid_neighbours(grid), spatial_order(grid)
        index[sample, :count] = torch.randperm(queries, generator=seeded)[:count].sort().values
        some = index[sample, :count][torch.rand(count, generator=seeded) < 0.7][: left.shape[1]]
        place = torch.randperm(left.shape[1], generator=seeded)[: len(some)].sort().values
        left[sample, place] = some
    positions = GridPositions(neighbours, order, index, queries)
    ranks = positions.order_of(left, left.device).tolist()
    around = positions.neighbours_of(left, left.device).tolist()
    for sample, rows in enumerate(left.tolist()):
        every = index[sample].tolist()
        for slot, row in enumerate(rows):
            number = every.index(row) if row >= 0 else None
            assert ranks[sample][slot] == (LAST if number is None else order[sample, number])
            others = [] if number is None else neighbours[sample, number].tolist()
            expected = {rows.index(every[other]) for other in others if other >= 0 and every[other] in rows}
            assert {other for other in around[sample][slot] if other >= 0} == expected
    assert torch.equal(positions.order_of(None, order.device), order)
    assert torch.equal(positions.neighbours_of(None, order.device), neighbours)


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
        ((SCORES, 1, "random"), {}, "coverage: expected one of 'topk', 'region', 'stride', .*'distinct', got 'random'"),
        ((SCORES, 1, "region"), {}, "neighbours: coverage='region' needs .* got None; see gap_kernels.grid_neighb"),
        ((SCORES, 1, "stride"), {}, "order: coverage='stride' needs .* got None; see spatial_order"),
        ((SCORES, 1, "stride"), {"order": ORDER[0]}, r"order: expected 2 dimensions \[B\|1, N\]"),
        ((SCORES, 1, "stride"), {"order": ORDER[:, :4]}, r"order: expected \[B\|1, N\] with N = 6"),
        ((SCORES, 1, "stride"), {"order": ORDER.expand(3, -1)}, r"order: expected \[B, N\] with B = 2, or \[1, N\]"),
        ((SCORES, 1, "region"), {"neighbours": NEIGHBOURS[0]}, "neighbours: expected 3 dimensions"),
        ((SCORES, 1, "stride"), {"order": ORDER, "spread": 1.5}, "spread: expected a float in 0..1, got 1.5"),
        ((SCORES, 1, "stride"), {"order": ORDER, "spread": True}, "spread: expected a float in 0..1, got True"),
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


# --- merging -------------------------------------------------------------------------------------------------------


def make(
    groups: int, rows: int, channels: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, keys and positive scores."""
    source = generator(seed)
    features = torch.randn(groups, rows, channels, generator=source).to(dtype)
    keys = torch.randn(groups, rows, 4, generator=source).to(dtype)
    return features, keys, torch.rand(groups, rows, generator=source)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_merges_match_loops(data: st.DataObject) -> None:
    """Grids of one size with different numbers of kept tokens, from none to all, and with NaN among the scores."""
    rows, groups = data.draw(st.integers(1, 45)), data.draw(st.integers(1, 3))
    features, keys, scores = make(
        groups, rows, data.draw(st.integers(1, 6)), seed=data.draw(st.integers(0, 99))
    )
    # Loops in float64 and sums in float32 agree on the order of cosines that differ by more than rounding.
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    assume(bool(((unit @ unit.transpose(1, 2)).sort().values.diff() > 1e-6).all()))
    for group in range(groups):
        scores[group, data.draw(st.integers(0, rows - 1))] = data.draw(st.sampled_from([NAN, 0.0, 0.5]))
    counts = [data.draw(st.integers(0, rows)) for _ in range(groups)]
    kept = choose(scores, torch.tensor(counts), "topk")
    lists = [[row for row in line if row >= 0] for line in kept.tolist()]
    each = list(zip(features, keys, scores.tolist(), lists, strict=True))

    expect(average(features, scores, kept), [averaged(x, s, own) for x, _, s, own in each])
    expect(nearest(features, keys, scores, kept), [collected_nearest(*one) for one in each])
    number = data.draw(st.integers(0, rows + 1))
    expected = [gathered_contextual(x, k, own, number) for x, k, _, own in each]
    expect(contextual(features, keys, kept, number), expected)
    numbers = [data.draw(st.integers(0, rows + 1)) for _ in range(groups)]
    expected = [gathered_contextual(x, k, own, n) for (x, k, _, own), n in zip(each, numbers, strict=True)]
    expect(contextual(features, keys, kept, torch.tensor(numbers)), expected)


def merges(
    features: Tensor, keys: Tensor, scores: Tensor, grid: tuple[int, int], keep: int
) -> dict[str, Merged]:
    """Every merge of a grid down to ``keep`` tokens, all chosen by score."""
    count = contextual_count(keep)
    return {
        "average": average(features, scores, choose(scores, keep - 1, "topk")),
        "nearest": nearest(features, keys, scores, choose(scores, keep - 1, "topk")),
        "contextual": contextual(features, keys, choose(scores, keep - count, "topk"), count),
        **{
            f"aggregate {name}": aggregate(
                features, keys, scores, choose(scores, keep, "topk"), grid, rule=rule
            )
            for name, rule in (("llava", LLAVA), ("next", LLAVA_NEXT), ("qwen", QWEN))
        },
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grid", [(5, 7), (1, 1), (12, 12)])
def test_nothing_changes_where_all_tokens_are_kept(dtype: torch.dtype, grid: tuple[int, int]) -> None:
    features, keys, scores = make(2, grid[0] * grid[1], dtype=dtype)
    for name, merged in merges(features, keys, scores, grid, grid[0] * grid[1]).items():
        assert torch.equal(merged.index, torch.arange(grid[0] * grid[1]).expand(2, -1)), name
        assert merged.features.dtype == dtype
        assert torch.equal(merged.features, features), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_token_holds_everything(dtype: torch.dtype) -> None:
    features, keys, scores = make(2, 30, dtype=dtype)
    best = scores.argmax(1)
    exact = features.double()
    weighted = (scores.double()[..., None] * exact).sum(1)
    wanted = {
        "average": (best, exact.mean(1)),
        "nearest": (best, weighted),
        # The first token is the target, and the mean of all others is added to it.
        "contextual": (torch.zeros_like(best), exact[:, 0] + exact[:, 1:].mean(1)),
    }
    found = merges(features, keys, scores, (5, 6), 1)
    for name, (row, value) in wanted.items():
        assert found[name].index.tolist() == row[:, None].tolist(), name
        tolerance = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
        torch.testing.assert_close(found[name].features[:, 0].double(), value, rtol=tolerance, atol=tolerance)


def test_long_sums_are_not_added_up_in_half_precision() -> None:
    """4,096 ones, which float16 counts no further than 2,048, and whose sum of 70,000 would be infinite."""
    features = torch.full((1, 4097, 1), 17.0, dtype=torch.float16)
    scores = torch.zeros(1, 4097)
    scores[0, 0] = 1.0
    kept = torch.tensor([[0]])
    assert average(features, scores, kept).features.flatten().tolist() == [17.0, 17.0]
    keys = torch.ones(1, 4097, 2, dtype=torch.float16)
    assert contextual(features, keys, kept, 1).features.flatten().tolist() == [17.0, 34.0]
    scores[0, 1:] = 1 / 4096
    added = nearest(features, keys, scores, kept).features.flatten().tolist()
    assert added == [float(torch.tensor(17 + 32 * 17 / 4096).half()), 17.0]


def test_ties_go_to_the_lower_row() -> None:
    features = torch.arange(1.0, 41.0).view(1, 40, 1)
    scores, keys = torch.ones(1, 40), torch.ones(1, 40, 3)
    kept = torch.tensor([[7]])
    # Row 0 is the best of the dropped; the first 32 other rows are collected: 0..6 and 8..32.
    assert average(features, scores, kept).index.tolist() == [[0, 7]]
    merged = nearest(features, keys, scores, kept)
    assert merged.index.tolist() == [[0, 7]]
    assert merged.features.flatten().tolist() == [820.0 - 8.0, 33 * 34 / 2]
    # Targets are rows 0 and 20 (the 20th of those left); every other token goes to the first.
    merged = contextual(features, keys, kept, 2)
    assert merged.index.tolist() == [[0, 7, 20]]
    assert merged.features.flatten().tolist() == pytest.approx([1 + (820 - 8 - 1 - 21) / 37, 8, 21])


def test_nan_stays_where_it_is() -> None:
    features, keys, scores = make(1, 40)
    scores[0, 11] = NAN
    scores[0, 12] = INF
    kept = choose(scores, 5, "topk")
    assert 12 in kept.tolist()[0]
    without = torch.where(scores.isfinite(), scores, 0.0)
    expected = nearest(features, keys, without, kept)
    found = nearest(features, keys, scores, kept)
    assert torch.equal(found.index, expected.index)
    assert torch.equal(found.features, expected.features)
    assert found.features.isfinite().all()

    keys[0, 20] = NAN
    scores = torch.rand(1, 40, generator=generator(1))
    scores[0, 3], scores[0, 20] = 2.0, 0.0
    found = nearest(features, keys, scores, torch.tensor([[3, 20]]))
    assert found.features.isfinite().all()
    # A token without a key collects nothing, and isn't collected: as if the grid had not held it.
    assert torch.equal(found.features[0, found.index[0] == 20], features[0, 20:21])
    rest = torch.arange(40) != 20
    alone = nearest(features[:, rest], keys[:, rest], scores[:, rest], torch.tensor([[3]]))
    torch.testing.assert_close(found.features[0, found.index[0] == 3], alone.features[0, alone.index[0] == 3])
    merged = contextual(features, keys, torch.tensor([[3]]), 4)
    assert merged.features.isfinite().all()
    expected = gathered_contextual(features[0], keys[0].nan_to_num(), [3], 4)
    assert merged.index.tolist() == [sorted(expected)]
    # Not even to columns that hold no target.
    longer = contextual(features, keys, torch.tensor([[3]]), 4, length=6)
    assert torch.equal(longer.index[:, 2:], merged.index)
    assert torch.equal(longer.features[:, 2:], merged.features)
    clean = torch.where(torch.arange(40)[:, None] == 20, features[0, 20], 0.0)
    alone = contextual(clean[None], keys, torch.tensor([[3]]), 4).features[0]
    assert bool(alone[merged.index[0] == 0].any())


def test_features_of_others_do_not_reach_what_was_kept_or_averaged() -> None:
    features, _, scores = make(1, 9)
    kept = choose(scores, 4, "topk")
    spoiled = features.clone()
    spoiled[0, kept[0]] = NAN
    clean, found = average(features, scores, kept), average(spoiled, scores, kept)
    added = ~torch.isin(clean.index, kept)
    assert torch.equal(clean.features[added], found.features[added])


@pytest.mark.parametrize(("groups", "rows"), [(0, 6), (2, 0), (0, 0)])
def test_merging_nothing(groups: int, rows: int) -> None:
    features, keys, scores = make(groups, rows)
    kept = torch.full((groups, 2), -1)
    found = [average(features, scores, kept), nearest(features, keys, scores, kept)]
    if not rows:
        assert all((merged.index == -1).all() and not merged.features.any() for merged in found)
    found.append(contextual(features, keys, kept, 1))
    assert [tuple(merged.index.shape) for merged in found] == [(groups, 3)] * 3
    if rows:
        merged = aggregate(features, keys, scores, kept, (2, 3), rule=LLAVA)
        assert merged.features.shape == (groups, 2, 5)


def test_contextual_counts() -> None:
    keep = torch.arange(200)
    counts = contextual_count(keep)
    assert isinstance(counts, Tensor)
    assert [int(counts[k]) for k in (64, 128, 192)] == [10, 20, 30]
    assert counts.tolist() == [contextual_count(k) for k in range(200)]
    assert counts.tolist() == [
        min(k, max(1, math.floor(Fraction(k * 10, 64) + Fraction(1, 2)))) for k in range(200)
    ]


FEATURES, KEYS, _ = make(2, 6)
KEPT = torch.tensor([[-1, 2], [0, 5]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: average(FEATURES[0], SCORES, KEPT), r"features: expected 3 dimensions \[G, N, C\]"),
        (lambda: average(FEATURES, SCORES.double(), KEPT), "scores: expected dtype torch.float32"),
        (lambda: average(FEATURES, SCORES[:, :5], KEPT), r"scores: expected \[G, N\] with N = 6"),
        (lambda: average(FEATURES, SCORES, KEPT + 1), "kept: expected values in -1..5, got 6"),
        (lambda: average(FEATURES, SCORES, KEPT.int()), "kept: expected dtype torch.int64"),
        (lambda: nearest(FEATURES, KEYS[:1], SCORES, KEPT), r"keys: expected \[G, N, E\] with G = 2"),
        (lambda: nearest(FEATURES, KEYS, SCORES, KEPT[:1]), r"kept: expected \[G, K\] with G = 2"),
        (lambda: contextual(FEATURES, KEYS, KEPT, -1), "count: expected a count >= 0, got -1"),
        (lambda: contextual(FEATURES, KEYS, KEPT, 1.5), "count: expected an int or an int64 tensor"),
        (lambda: contextual(FEATURES, KEYS, KEPT, 3, length=2), "length: expected at least 3, got 2"),
        (lambda: aggregate(FEATURES, KEYS, SCORES, KEPT - 1, (2, 3), rule=LLAVA), "anchors: expected values in -1..5"),
        (lambda: aggregate(FEATURES, KEYS, SCORES, KEPT, (2, 2), rule=LLAVA), r"grid: expected H \* W = 6"),
        (lambda: AggregationRule(1.5, 1.0, False, None), "pillar_quantile: expected a float in 0..1, got 1.5"),
        (lambda: AggregationRule(0.5, 0.0, False, None), "radius: expected a float > 0, got 0.0"),
        (lambda: outlier_count(SCORES[:, :0]), r"scores: expected N >= 1, got shape \[2, 0\]"),
        (lambda: outlier_count(SCORES.half()), "scores: expected dtype torch.float32"),
        (lambda: outlier_count(SCORES[:, :1].expand(-1, 2**24 + 1)), "scores: expected N <= 16777216, got shape"),
        (lambda: average(FEATURES, SCORES, KEPT * 0), "kept: expected distinct positions, got 0 twice in sample 0"),
        (lambda: contextual_count(-1), r"keep: expected an int >= 0 or an int64 tensor, got -1 \(int\)"),
        (lambda: aggregate(FEATURES, KEYS, SCORES, KEPT, (2, 3), rule=None), "rule: expected an AggregationRule, got None"),
        (lambda: AggregationRule(0.5, 1.0, 1, None), r"radius_in_diagonals: expected a bool, got 1 \(int\)"),
        (lambda: AggregationRule(0.5, 1.0, True, NAN), "self_weight: expected a finite float or None, got nan"),
        (lambda: text_similarity(FEATURES, KEYS, SCORES > 0), r"text: expected \[G, T, C\] with C = 5"),
        (lambda: text_similarity(FEATURES, FEATURES, SCORES), "text_mask: expected dtype torch.bool"),
        (lambda: raters(FEATURES, SCORES[:1] > 0, FEATURES, SCORES > 0), r"visual_mask: expected \[B, V\] with B = 2"),
    ],
)  # fmt: skip
def test_merging_refuses_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- Nüwa's first stage --------------------------------------------------------------------------------------------


def nuwa_stage_one(
    features: Tensor,
    similarity: Tensor,
    scores: list[float],
    grid: tuple[int, int],
    keep: int,
    quantile: float,
    radius: float,
    self_weight: float | None,
) -> dict[int, Tensor]:
    """Separation, alignment and aggregation in float64, one patch at a time."""
    anchors = sorted(chosen_by_region(scores, grid, keep, None))
    levels = sorted(scores[anchor] for anchor in anchors)
    below, share = divmod(quantile * (len(levels) - 1), 1)
    above = levels[min(int(below) + 1, len(levels) - 1)]
    threshold = levels[int(below)] + share * (above - levels[int(below)])
    features, unit = features.double(), similarity.double() / similarity.double().norm(dim=1, keepdim=True)
    tokens = {}
    for anchor in anchors:
        if scores[anchor] >= threshold:
            tokens[anchor] = features[anchor]
            continue
        weights = []
        for patch, similar in enumerate((unit @ unit[anchor]).tolist()):
            distance = math.dist(divmod(anchor, grid[1]), divmod(patch, grid[1]))
            weights.append(max(0.0, similar) * (1 - min(1.0, distance / radius)))
        total = math.fsum(weights) + 1e-8
        weights = [weight / total for weight in weights]
        if self_weight is not None:
            weights[anchor] = self_weight
        tokens[anchor] = (torch.tensor(weights, dtype=torch.float64)[:, None] * features).sum(0)
    return tokens


RULES = {
    "llava": (LLAVA, 0.55, lambda h, w: math.sqrt(280) * math.hypot(h - 1, w - 1) / math.hypot(23, 23), 1.0),
    "next": (LLAVA_NEXT, 0.5, lambda h, w: math.sqrt(280), 1.0),
    "qwen": (QWEN, 0.1, lambda h, w: 0.8 * math.hypot(h - 1, w - 1), None),
    "no pillars": (AggregationRule(1.0, 2.5, False, 1.0), 2.0, lambda h, w: 2.5, 1.0),
}


@pytest.mark.parametrize(
    ("rule", "grid"),
    [*itertools.product(RULES, [(8, 8), (6, 9), (7, 5)]), ("llava", (24, 24)), ("qwen", (24, 24))],
)
def test_nuwa_stage_one(rule: str, grid: tuple[int, int]) -> None:
    """Same anchors, and features to 1e-5, on even and odd grids, with and without pillars."""
    constants, quantile, radius, self_weight = RULES[rule]
    cells = grid[0] * grid[1]
    features, similarity, scores = make(2, cells, seed=cells)
    similarity = similarity + 0.5
    for keep in {24: (112,), 8: (9, 30), 6: (9, 30), 7: (9, 30)}[grid[0]]:
        anchors = choose(scores, keep, "region", neighbours=grid_neighbours(grid)[None])
        merged = aggregate(features, similarity, scores, anchors, grid, rule=constants)
        wanted = []
        for group in range(2):
            line = scores[group].tolist()
            if quantile > 1:  # a level that nothing reaches, but for the best anchor itself
                tokens = nuwa_stage_one(
                    features[group], similarity[group], line, grid, keep, 1.0, radius(*grid), self_weight
                )
                best = max(tokens, key=lambda row: line[row])
                assert torch.equal(tokens[best], features[group, best].double())
            else:
                tokens = nuwa_stage_one(
                    features[group], similarity[group], line, grid, keep, quantile, radius(*grid), self_weight
                )
                pillars = [
                    row for row, value in tokens.items() if torch.equal(value, features[group, row].double())
                ]
                assert len(pillars) == keep - math.ceil(quantile * (keep - 1))
            wanted.append(tokens)
        expect(merged, wanted)


def test_the_radius_of_each_rule() -> None:
    assert LLAVA.radius_of((24, 24)) == pytest.approx(math.sqrt(280), rel=1e-15)
    assert LLAVA.radius_of((12, 12)) == pytest.approx(math.sqrt(280) * 11 / 23)
    assert LLAVA_NEXT.radius_of((48, 36)) == math.sqrt(280)
    assert QWEN.radius_of((4, 5)) == 0.8 * 5
    assert QWEN.radius_of((1, 1)) == 1.0


def test_anchors_with_filler_and_nan() -> None:
    """Filler and NaN don't move the level of the pillars; a row of filler is 0."""
    features, similarity, scores = make(2, 12)
    anchors = torch.tensor([[-1, -1, 1, 4, 6, 9], [0, 2, 3, 5, 7, 11]])
    together = aggregate(features, similarity, scores, anchors, (3, 4), rule=LLAVA)
    alone = aggregate(features[:1], similarity[:1], scores[:1], anchors[:1, 2:], (3, 4), rule=LLAVA)
    assert torch.equal(together.features[:1, 2:], alone.features)
    assert (together.features[0, :2] == 0).all()
    assert torch.equal(together.index, anchors)

    scores[1, 5] = NAN
    found = aggregate(features[1:], similarity[1:], scores[1:], anchors[1:], (3, 4), rule=LLAVA)
    others = aggregate(
        features[1:], similarity[1:], scores[1:], anchors[1:, [0, 1, 2, 4, 5]], (3, 4), rule=LLAVA
    )
    assert found.features.isfinite().all()
    assert torch.equal(found.features[:, [0, 1, 2, 4, 5]], others.features)
    assert not torch.equal(found.features[0, 3], features[1, 5])
    nothing = aggregate(features, similarity, scores, anchors[:, :0], (3, 4), rule=LLAVA)
    assert nothing.features.shape == (2, 0, 5)


# --- counts and relevance ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=20),
    st.lists(st.integers(-4, 12), min_size=0, max_size=5),
)
def test_outliers_match_the_definition(most: list[int], some: list[int]) -> None:
    values = some + most
    ordered = sorted(values)

    def quartile(share: Fraction) -> Fraction:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    first, third = quartile(Fraction(1, 4)), quartile(Fraction(3, 4))
    limit = third + Fraction(3, 2) * (third - first)
    expected = max(1, sum(value > limit for value in values))
    # Quartiles of small integers are exact in float32.
    padded = torch.tensor([[*map(float, values), NAN, NAN], [*map(float, values), 0.0, 0.0]])
    assert outlier_count(padded)[:1].tolist() == [expected]
    assert outlier_count(padded[:, :-2]).tolist() == [expected, expected]


@given(values=st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=60))
def test_outliers_of_similarities_are_those_of_their_softmax(values: list[float]) -> None:
    """TRIM: quartiles of the softmax, in float64 by numpy."""
    weights = np.exp(100 * (np.array(values) - max(values)))
    weights /= weights.sum()
    first, third = np.percentile(weights, [25, 75])
    limit = third + 1.5 * (third - first)
    near = np.abs(weights - limit) <= 1e-4 * max(limit, 1e-30)  # float32 may see these on the other side
    least, most = (weights > limit)[~near].sum(), ((weights > limit) | near).sum()
    (found,) = similarity_outlier_count(torch.tensor([values])).tolist()
    assert max(least, 1) <= found <= max(most, 1)
    (padded,) = similarity_outlier_count(torch.tensor([[*values, math.nan]])).tolist()
    assert padded == found


def test_more_stands_out_of_the_softmax() -> None:
    """A fifth of the tokens, as TRIM reports, where hardly any similarity is an outlier itself."""
    similarity = torch.randn(1, 576, generator=torch.Generator().manual_seed(0)) * 0.02
    assert int(outlier_count(similarity)) <= 6
    assert 60 <= int(similarity_outlier_count(similarity)) <= 130


def test_outliers_by_hand() -> None:
    # Quartiles 1 and 2, so the limit is 3.5, which is not above itself.
    scores = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 3.5, 3.75, 4.0]
    assert outlier_count(torch.tensor([scores, scores[::-1]])).tolist() == [2, 2]
    assert outlier_count(torch.tensor([[*scores, NAN, NAN]])).tolist() == [2]
    assert outlier_count(torch.zeros(2, 5)).tolist() == [1, 1]
    assert outlier_count(torch.zeros(0, 5)).tolist() == []


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 99), st.lists(st.booleans(), min_size=1, max_size=6))
def test_text_similarity_matches_a_loop(seed: int, mask: list[bool]) -> None:
    visual = torch.randn(2, 7, 5, generator=generator(seed))
    text = torch.randn(2, len(mask), 5, generator=generator(seed + 1))
    text_mask = torch.tensor([mask, mask[::-1]])
    text[~text_mask] = NAN
    found = text_similarity(visual, text, text_mask)
    assert found.dtype == torch.float32
    for group in range(2):
        words = [
            word for word, real in zip(text[group].double(), text_mask[group].tolist(), strict=True) if real
        ]
        mean = sum(words) / len(words) if words else torch.zeros(5, dtype=torch.float64)
        wanted = [cosine(patch, mean) for patch in visual[group].double()]
        torch.testing.assert_close(found[group].double(), torch.tensor(wanted).double(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_raters_match_a_loop(data: st.DataObject) -> None:
    patches, words = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    source = generator(data.draw(st.integers(0, 99)))
    visual, text = torch.randn(2, patches, 4, generator=source), torch.randn(2, words, 4, generator=source)
    visual_mask = torch.tensor(
        [data.draw(st.lists(st.booleans(), min_size=patches, max_size=patches)) for _ in "ab"]
    )
    text_mask = torch.tensor(
        [data.draw(st.lists(st.booleans(), min_size=words, max_size=words)) for _ in "ab"]
    )
    visual[~visual_mask], text[~text_mask] = NAN, INF
    found = raters(visual, visual_mask, text, text_mask)
    for sample in range(2):
        real = text_mask[sample].nonzero().flatten().tolist()
        relevance = dict.fromkeys(real, 0.0)
        for patch in visual[sample, visual_mask[sample]].double():
            raised = {word: math.exp(float(patch @ text[sample, word].double())) for word in real}
            for word in real:
                relevance[word] += raised[word] / math.fsum(raised.values())
        mean = math.fsum(relevance.values()) / max(1, len(real))
        # Within rounding of the mean, either is right: one word alone, or no visual token.
        for word in range(words):
            if word not in relevance:
                assert not found[sample, word]
            elif abs(relevance[word] - mean) > 1e-5:
                assert bool(found[sample, word]) == (relevance[word] > mean)
        assert bool(found[sample].any()) == bool(real)


def test_raters_by_hand() -> None:
    visual = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    text = torch.tensor([[[3.0, 0.0], [0.0, 9.0], [-1.0, 0.0], [2.9, 0.0]]])
    everything = torch.ones(1, 2, dtype=torch.bool)
    assert raters(visual, everything, text, torch.ones(1, 4, dtype=torch.bool)).tolist() == [
        [True, False, False, True]
    ]
    # Each of four patches is for one word alone, exactly: two for the first, one for the next two, which are at the mean.
    words = torch.tensor([[[1.0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]])
    real = torch.ones(1, 4, dtype=torch.bool)
    assert raters(200 * torch.eye(4)[None], real, words, real).tolist() == [[True, True, True, False]]
    # Products (10, 9) and (-10, -8.5): a masked word, with product 0, would leave nothing of the second patch.
    pair = torch.tensor([[[10.0, 9.0], [-10.0, -8.5]]])
    masked = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [7.0, 7.0]]])
    known = torch.tensor([[True, True, False]])
    assert raters(pair, everything, masked, known).tolist() == [[False, True, False]]
    # One word, no visual token, NaN: every word judges.
    one = torch.tensor([[False, True, False, False]])
    assert raters(visual, everything, text, one).tolist() == one.tolist()
    assert raters(visual, ~everything, text, ~one).tolist() == (~one).tolist()
    assert raters(visual * NAN, everything, text, ~one).tolist() == (~one).tolist()


@pytest.mark.parametrize("autocast", [False, True])
def test_merges_and_scores_compile(autocast: bool) -> None:
    features, keys, scores = make(2, 6)
    calls: list[tuple[Callable, tuple]] = [
        (average, (features, scores, KEPT)),
        (nearest, (features, keys, scores, KEPT)),
        (contextual, (features, keys, KEPT, 2)),
        (text_similarity, (features, features[:, :2], scores[:, :2] > 0)),
    ]
    for function, arguments in calls:
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
        torch.testing.assert_close(found, function(*arguments), rtol=0, atol=0)
    torch._dynamo.reset()
