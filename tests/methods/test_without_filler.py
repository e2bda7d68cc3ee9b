"""What runs before the decoder, in the fewest operations, against the functions that also take filler."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from gap_kernels import collect_nearest, grid_neighbours
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gap_triton.strategies import (
    LLAVA,
    LLAVA_NEXT,
    QWEN,
    Merged,
    aggregate,
    average,
    choose,
    contextual,
    nearest,
    spatial_order,
    text_similarity,
)
from gap_triton.strategies import without_filler as few
from gap_triton.strategies.aggregation import _least_ranks, aggregate_without_filler
from gap_triton.strategies.coverage import choose_on_grid
from gap_triton.strategies.draw import draw
from gap_triton.strategies.nearest import COLLECT_COUNT

GRID = st.tuples(st.integers(1, 9), st.integers(1, 9))
SCORE = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.5, math.inf, math.nan]), st.floats(-4, 4, width=32, allow_nan=False)
)
TOLERANCE = 1e-5  # sums are added up in another order


def rows_of(data: st.DataObject, groups: int, columns: int) -> Tensor:
    row = st.lists(SCORE, min_size=columns, max_size=columns)
    return torch.tensor(data.draw(st.lists(row, min_size=groups, max_size=groups)), dtype=torch.float32)


@pytest.mark.parametrize("coverage", ["topk", "region", "stride"])
@settings(deadline=None, max_examples=60)
@given(st.data())
def test_choice_on_whole_grids(coverage: str, data: st.DataObject) -> None:
    grid = data.draw(GRID)
    cells = grid[0] * grid[1]
    # Two rows at least: of one alone `choose` can't tell a cell that has its region to itself from filler.
    scores, keep = rows_of(data, data.draw(st.integers(2, 3)), cells), data.draw(st.integers(0, cells))
    shared = {"neighbours": grid_neighbours(grid)[None], "order": spatial_order(grid)[None]}
    given_scores = scores.clone()
    assert torch.equal(choose_on_grid(scores, keep, coverage, grid), choose(scores, keep, coverage, **shared))
    assert torch.equal(scores.nan_to_num(), given_scores.nan_to_num())


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_best_and_the_best_of_the_rest(data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 30))
    scores, keep = rows_of(data, 2, columns), data.draw(st.integers(1, columns))
    best = few.best_first(scores, keep)
    assert torch.equal(best.sort(dim=1).values, choose(scores, keep, "topk"))
    assert torch.equal(few.best_of_rest(scores, best[:, :-1]), best[:, -1:])


def same(found: Merged, expected: Merged) -> None:
    """``found``, of the tokens that change and in any order, is what ``expected`` holds of them."""
    for group in range(len(expected.index)):
        places = [expected.index[group].tolist().index(row) for row in found.index[group].tolist()]
        torch.testing.assert_close(
            found.features[group], expected.features[group, places], rtol=TOLERANCE, atol=TOLERANCE
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_merges(dtype: torch.dtype, data: st.DataObject) -> None:
    grid = data.draw(st.tuples(st.integers(2, 8), st.integers(2, 8)))
    cells, groups = grid[0] * grid[1], data.draw(st.integers(1, 3))
    source = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    features = torch.randn(groups, cells, 5, generator=source).to(dtype)
    keys = torch.randn(groups, cells, 6, generator=source)
    scores = torch.rand(groups, cells, generator=source)
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    assume(bool(((unit @ unit.transpose(1, 2)).sort().values.diff() > 1e-6).all()))
    for group in range(groups):
        scores[group, data.draw(st.integers(0, cells - 1))] = data.draw(
            st.sampled_from([math.nan, 0.0, 0.5, math.inf])
        )
    keep = data.draw(st.integers(1, cells - 2))
    kept, best = choose(scores, keep, "topk"), few.best_first(scores, keep + 1)

    found = Merged(best[:, -1:], few.average_of_rest(features, best[:, :-1]))
    same(found, average(features, scores, kept))
    found = Merged(best, collect_nearest(features, keys, scores, best[:, :-1], COLLECT_COUNT))
    same(found, nearest(features, keys, scores, kept))
    count = data.draw(st.integers(1, cells - keep))
    same(
        few.contextual_of_rest(features, keys, kept, few.rest_of(kept, cells), count),
        contextual(features, keys, kept, count),
    )
    for rule in (LLAVA, LLAVA_NEXT, QWEN, replace(LLAVA, pillar_quantile=1 / 3)):
        found = aggregate_without_filler(features, keys, scores, kept, grid, rule=rule)
        same(found, aggregate(features, keys, scores, kept, grid, rule=rule))


def test_keys_of_nan_collect_nothing() -> None:
    source = torch.Generator().manual_seed(3)
    features, keys = torch.randn(2, 40, 3, generator=source), torch.randn(2, 40, 4, generator=source)
    scores = torch.rand(2, 40, generator=source)
    keys[0, 7] = math.nan
    keys[1, :] = math.nan
    best = few.best_first(scores, 12)
    kept = best[:, :-1].sort(dim=1).values
    found = Merged(best, collect_nearest(features, keys, scores, best[:, :-1], COLLECT_COUNT))
    same(found, nearest(features, keys, scores, kept))
    same(
        few.contextual_of_rest(features, keys, kept, few.rest_of(kept, 40), 4),
        contextual(features, keys, kept, 4),
    )


def test_large_merges_are_done_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.Generator().manual_seed(3)
    features, keys = torch.randn(2, 90, 3, generator=source), torch.randn(2, 90, 4, generator=source)
    scores = torch.rand(2, 90, generator=source)
    best = few.best_first(scores, 30)
    run = [
        lambda: collect_nearest(features, keys, scores, best[:, :-1], COLLECT_COUNT),
        lambda: few.contextual_of_rest(features, keys, best, few.rest_of(best, 90), 9).features,
    ]
    whole = [each() for each in run]
    monkeypatch.setattr("gap_kernels.blocks.BLOCK_ELEMENTS", 1000)
    for each, expected in zip(run, whole, strict=True):
        torch.testing.assert_close(each(), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_ranks_of_quantiles() -> None:
    assert _least_ranks(5, 0.5) == [0, 0, 1, 1, 2, 2]
    assert _least_ranks(21, 0.55)[21] == 11  # 0.55 * 20 is above 11 in floats
    assert _least_ranks(3, 1.0) == [0, 0, 1, 2]
    assert _least_ranks(3, 0) == [0, 0, 0, 0]


def test_a_draw_is_a_constant_of_a_graph() -> None:
    """The same at every replay, and what it is without a graph."""
    graph = make_fx(lambda x: x + draw(3, 1, 6), tracing_mode="fake")(torch.zeros(6))
    for _ in range(2):
        assert torch.equal(graph(torch.zeros(6)), draw(3, 1, 6))


def test_text_without_a_mask_is_all_real() -> None:
    source = torch.Generator().manual_seed(3)
    visual, text = torch.randn(2, 7, 3, generator=source), torch.randn(2, 5, 3, generator=source)
    every = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(text_similarity(visual, text), text_similarity(visual, text, every))
