"""Every operator and strategy computes in its own dtypes, whatever autocast or the default dtype say around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gap_kernels
import pytest
import torch
from gap_kernels import grid_neighbours
from support.default_dtype import float64_by_default
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gap_triton import strategies

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BATCH, HEADS, KEY_HEADS, ROWS, DIM = 2, 4, 2, 24, 8
GRID = (4, 5)
PATCHES = GRID[0] * GRID[1]
VISUAL = torch.arange(2, 2 + PATCHES).expand(BATCH, -1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is documented to be float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float32, generator=torch.Generator().manual_seed(len(shape))).to(
        dtype
    )


def attention_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return randn(BATCH, HEADS, ROWS, DIM, dtype=dtype), 0.5 * randn(BATCH, KEY_HEADS, ROWS, DIM, dtype=dtype)


def prompt(dtype: torch.dtype) -> tuple[Tensor, ...]:
    angles = randn(BATCH, ROWS, DIM, dtype=dtype)
    ids = torch.arange(ROWS).expand(BATCH, -1)
    return randn(BATCH, ROWS, 6, dtype=dtype), angles, angles.sin(), ids


SCORES = randn(BATCH, PATCHES)
KEPT = torch.tensor([[1, 7, 9], [0, 4, 19]])
WORDS = torch.ones(BATCH, 5, dtype=torch.bool)


def importance(dtype: torch.dtype) -> Any:
    return gap_kernels.visual_importance(*attention_inputs(dtype), VISUAL, rows=VISUAL[:, -3:] + 1)


def pruned(dtype: torch.dtype) -> Any:
    return gap_kernels.prune_tokens(*attention_inputs(dtype), *prompt(dtype), VISUAL, 7)


def turned_back(dtype: torch.dtype) -> Any:
    query, key = attention_inputs(dtype)
    key = key[:, :, : query.shape[2]]
    head_dim = query.shape[3]
    pairs = torch.stack([torch.arange(head_dim) ^ 1, torch.arange(head_dim) // 2]).int()
    angle = randn(1, query.shape[2], head_dim, dtype=dtype)
    return gap_kernels.unrotate(query[:, :, : key.shape[2]], key, angle.cos(), angle.sin(), pairs)


def corrected(dtype: torch.dtype) -> Any:
    _, cos, sin, _ = prompt(dtype)
    turns, rows = torch.arange(1, DIM + 1), VISUAL[:, -3:] + 1
    inputs = (*attention_inputs(dtype), VISUAL, cos.abs(), sin.abs(), turns, 2)
    return gap_kernels.corrected_importance(*inputs, rows=rows)


def attended(dtype: torch.dtype) -> Any:
    query, key = attention_inputs(dtype)
    return gap_kernels.attention(query, key, key + 1, importance_columns=VISUAL)


def aggregated(dtype: torch.dtype) -> Any:
    features, similarity = features_and_keys(dtype)
    return gap_kernels.spatial_aggregate(features, similarity, KEPT, GRID, radius=2.5)


def greedy(dtype: torch.dtype) -> Any:
    return [
        gap_kernels.greedy_indices(features_and_keys(dtype)[0], 5, rule)
        for rule in ("max_min", "determinant", "coverage_gain")
    ]


def features_and_keys(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return randn(BATCH, PATCHES, 6, dtype=dtype), randn(BATCH, PATCHES, 5, dtype=dtype)


def merged(merge: Callable[..., Any], *more: Any, **options: Any) -> Callable[[torch.dtype], Any]:
    return lambda dtype: merge(*features_and_keys(dtype), *more, **options)


def chosen(dtype: torch.dtype) -> Any:
    neighbours, order = grid_neighbours(GRID)[None], strategies.spatial_order(GRID)[None]
    return [
        strategies.choose(SCORES, 8, "topk"),
        strategies.choose(SCORES, 8, "region", neighbours=neighbours),
        strategies.choose(SCORES, 8, "stride", order=order),
    ]


def related(relate: Callable[..., Any], masked: bool) -> Callable[[torch.dtype], Any]:
    def run(dtype: torch.dtype) -> Any:
        visual, text = randn(BATCH, PATCHES, 6, dtype=dtype), 2 * randn(BATCH, 5, 6, dtype=dtype)
        mask = [torch.ones(BATCH, PATCHES, dtype=torch.bool)] if masked else []
        return relate(visual, *mask, text, WORDS)

    return run


# By name: how it is called with floating inputs of a dtype, and the dtypes of what it returns.
Row = tuple[Callable[[torch.dtype], Any], Callable[[torch.dtype], list[torch.dtype]]]
INT, SHORT, BOOL, FLOAT = torch.int64, torch.int32, torch.bool, torch.float32
OPERATORS: dict[str, Row] = {
    "attention": (attended, lambda d: [d, wide(d), wide(d)]),
    "attention_received": (
        lambda d: gap_kernels.attention_received(*attention_inputs(d)),
        lambda d: [wide(d)],
    ),
    "distinct_indices": (
        lambda d: gap_kernels.distinct_indices(features_and_keys(d)[0], SCORES, 8, 3),
        lambda d: [INT],
    ),
    "greedy_indices": (greedy, lambda d: [INT] * 3),
    "grid_neighbours": (lambda d: grid_neighbours((3, 4)), lambda d: [SHORT]),
    "least_similar_indices": (
        lambda d: gap_kernels.least_similar_indices(features_and_keys(d)[0], KEPT, 8),
        lambda d: [INT],
    ),
    "prune_by_score": (
        lambda d: gap_kernels.prune_by_score(SCORES, *prompt(d), VISUAL, 7),
        lambda d: [d, d, d, INT, INT, FLOAT],
    ),
    "prune_tokens": (pruned, lambda d: [d, d, d, INT, INT, FLOAT]),
    "read_prompt": (
        lambda d: gap_kernels.read_prompt(
            torch.arange(12)[None], [3, 4], attention_mask=torch.ones(1, 12, dtype=d)
        ),
        lambda d: [BOOL] * 3 + [INT] * 4,
    ),
    "scatter_rows": (
        lambda d: gap_kernels.scatter_rows(
            features_and_keys(d)[0], torch.arange(PATCHES).expand(BATCH, -1), 99
        ),
        lambda d: [d],
    ),
    "spatial_aggregate": (aggregated, lambda d: [d]),
    "collect_nearest": (
        lambda d: gap_kernels.collect_nearest(*features_and_keys(d), SCORES, KEPT, 4),
        lambda d: [d],
    ),
    "corrected_importance": (corrected, lambda d: [wide(d)]),
    "merge_nearest": (lambda d: gap_kernels.merge_nearest(*features_and_keys(d), KEPT), lambda d: [d]),
    "text_cosine": (
        lambda d: gap_kernels.text_cosine(
            randn(2, 9, 6, dtype=d), KEPT[:2, :3] % 4, torch.tensor([[5, 6, 8]] * 2)
        ),
        lambda d: [FLOAT],
    ),
    "text_raters": (
        lambda d: gap_kernels.text_raters(
            2 * randn(2, 9, 6, dtype=d), KEPT[:2, :3] % 4, torch.tensor([[5, 6, 8]] * 2)
        ),
        lambda d: [BOOL],
    ),
    "topk_indices": (lambda d: gap_kernels.topk_indices(SCORES, 5), lambda d: [INT]),
    "topk_per_region": (
        lambda d: gap_kernels.topk_per_region(SCORES, grid_neighbours(GRID)[None], 1, 5),
        lambda d: [INT],
    ),
    "visual_importance": (importance, lambda d: [wide(d)]),
    "unrotate": (turned_back, lambda d: [d, d]),
    "window_ranks": (lambda d: gap_kernels.window_ranks(SCORES, -SCORES, GRID, 5), lambda d: [FLOAT]),
}
STRATEGIES: dict[str, Row] = {
    "aggregate": (
        merged(strategies.aggregate, SCORES, KEPT, GRID, rule=strategies.LLAVA),
        lambda d: [INT, d],
    ),
    "average": (lambda d: strategies.average(features_and_keys(d)[0], SCORES, KEPT), lambda d: [INT, d]),
    "cluster": (lambda d: strategies.cluster(features_and_keys(d)[0], KEPT), lambda d: [INT, d]),
    "choose": (chosen, lambda d: [INT] * 3),
    "contextual": (merged(strategies.contextual, KEPT, 4), lambda d: [INT, d]),
    "contextual_count": (lambda d: strategies.contextual_count(torch.tensor([64, 7])), lambda d: [INT]),
    "nearest": (merged(strategies.nearest, SCORES, KEPT), lambda d: [INT, d]),
    "outlier_count": (lambda d: strategies.outlier_count(SCORES), lambda d: [INT]),
    "similarity_outlier_count": (lambda d: strategies.similarity_outlier_count(SCORES), lambda d: [INT]),
    "raters": (related(strategies.raters, masked=True), lambda d: [BOOL]),
    "spatial_order": (lambda d: strategies.spatial_order((3, 4)), lambda d: [INT]),
    "text_similarity": (related(strategies.text_similarity, masked=False), lambda d: [FLOAT]),
}
ROWS_OF = OPERATORS | STRATEGIES
NOT_CALLED = {
    "AttentionOutput",
    "PromptRows",
    "PrunedTokens",
    "backend",
    "AggregationRule",
    "Coverage",
    "Merged",
}


def test_everything_public_is_here() -> None:
    public = {*gap_kernels.__all__, *strategies.__all__} - NOT_CALLED
    assert {name for name in public if not name.isupper()} == set(ROWS_OF)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "float64 by default": float64_by_default,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("around", list(SURROUNDINGS))
@pytest.mark.parametrize("name", list(ROWS_OF))
def test_same_bits_and_dtypes(name: str, around: str, dtype: torch.dtype) -> None:
    run, returns = ROWS_OF[name]
    expected = tree_leaves(run(dtype))
    with SURROUNDINGS[around]():
        # `grid_neighbours` and `spatial_order` keep what they made before.
        gap_kernels.region.grid._kept_neighbours.cache_clear()
        strategies.spatial._kept_ranks.cache_clear()
        found = tree_leaves(run(dtype))
    assert [tensor.dtype for tensor in found] == returns(dtype)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_autocast_is_as_before_behind_an_operator() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        importance(torch.float32)
        strategies.raters(*(randn(1, 3, 4), WORDS[:1, :3]) * 2)
        assert torch.is_autocast_enabled("cpu")
        assert (randn(2, 2) @ randn(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["contextual", "nearest"])
def test_float64_keys_are_compared_in_float64(name: str) -> None:
    """Keys too long for float32 point where short ones do."""
    features, keys = features_and_keys(torch.float64)
    more = (KEPT, 4) if name == "contextual" else (SCORES, KEPT)
    merge = getattr(strategies, name)
    expected, found = merge(features, keys, *more), merge(features, keys * 1e60, *more)
    assert torch.equal(found.index, expected.index)
    torch.testing.assert_close(found.features, expected.features)
