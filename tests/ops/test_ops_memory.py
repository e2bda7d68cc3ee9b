"""What plain PyTorch allocates: it grows with the inputs, not with a product of text and prompt."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import gap_kernels
import pytest
import torch
from gap_kernels import attention, attention_received, blocks, spatial_aggregate, visual_importance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gap_triton import strategies

LIMIT = 1 << 12
"""Elements of a block in these tests."""


REFERENCES = [
    importlib.import_module(f"gap_kernels.{name}.reference")
    for name in (
        "aggregate",
        "corrected",
        "cosine",
        "flash_attention",
        "greedy",
        "importance",
        "merge",
        "prune",
        "raters",
        "received",
        "region",
        "select",
        "similarity",
    )
]


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that PyTorch makes, views of expanded tensors left out."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and 0 not in leaf.stride():
                self.elements = max(self.elements, leaf.numel())
        return made


class Shapes(TorchDispatchMode):
    """Notes the shapes of what one function of PyTorch returns."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if str(func) == self.name:
            self.found.append(tuple(made.shape))
        return made


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> Largest:
    """To be entered around what is to be measured; it sees into operators, which are one call to PyTorch otherwise."""
    seen = Largest()

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with seen:
                return function(*args)

        return run

    for module in REFERENCES:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                monkeypatch.setattr(module, name, inside(function))
    return seen


def parts(batch: int, heads: tuple[int, int], rows: int, dim: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, heads[0], rows, dim), torch.randn(batch, heads[1], rows, dim)


def importance(rows: int, **options: Any) -> Tensor:
    query, key = parts(2, (4, 2), rows + 40)
    visual = torch.arange(40).expand(2, -1)
    text = torch.arange(40, rows + 40).expand(2, -1)
    mask = torch.rand(2, rows + 40) < 0.9
    if options.pop("given", False):
        lse = torch.randn(2, 4, rows)
        return visual_importance(query, key, visual, rows=text, attention_mask=mask, lse=lse, **options)
    return visual_importance(query, key, visual, rows=text, attention_mask=mask, **options)


def corrected(rows: int) -> Tensor:
    query, key = parts(2, (4, 2), rows + 40)
    visual, text = torch.arange(40).expand(2, -1), torch.arange(40, rows + 40).expand(2, -1)
    angles, turns = torch.rand(2, rows + 40, 4), torch.arange(1, 5)
    return gap_kernels.corrected_importance(query, key, visual, angles, angles, turns, 2, rows=text)


def pruned(rows: int) -> Tensor:
    query, key = parts(1, (4, 2), rows + 40)
    ids, visual = torch.arange(rows + 40)[None], torch.arange(40)[None]
    angles = torch.randn(1, rows + 40, 4)
    text = torch.arange(40, rows + 40)[None]
    given = (query, key, torch.randn(1, rows + 40, 8), angles, angles, ids, visual, 10)
    return gap_kernels.prune_tokens(*given, rows=text).scores


def attended(rows: int) -> Tensor:
    query, key = parts(1, (4, 2), rows)
    columns = torch.arange(40)[None]
    text = torch.arange(40, rows)[None]
    output = attention(query, key, key, importance_rows=text, importance_columns=columns)
    return torch.cat([output.output.flatten(), output.importance.flatten()])


def received(rows: int) -> Tensor:
    return attention_received(*parts(1, (4, 2), rows))


def grids(patches: int, width: int = 16) -> tuple[Tensor, Tensor, tuple[int, int]]:
    return torch.randn(1, patches, 6), torch.randn(1, patches, 4), (patches // width, width)


def aggregated(patches: int) -> Tensor:
    features, similarity, grid = grids(patches)
    anchors = torch.arange(0, patches, 2)[None]
    return spatial_aggregate(features, similarity, anchors, grid, radius=3.0)


def greedy(patches: int, rule: str) -> Tensor:
    return gap_kernels.greedy_indices(torch.randn(1, patches, 6), 10, rule).float()


def distinct(patches: int) -> Tensor:
    features = torch.randn(1, patches, 6)
    return gap_kernels.distinct_indices(features, torch.rand(1, patches), patches // 2, 10).float()


def least_similar(patches: int) -> Tensor:
    pivots = torch.tensor([[3, 1, 8, 50]])
    return gap_kernels.least_similar_indices(torch.randn(1, patches, 6), pivots, patches // 2).float()


def contextual(patches: int) -> Tensor:
    features, keys, _ = grids(patches)
    kept = torch.arange(0, patches, 4)[None]
    return strategies.contextual(features, keys, kept, patches // 4).features


def nearest(patches: int) -> Tensor:
    features, keys, _ = grids(patches)
    kept = torch.arange(0, patches, 2)[None]
    return strategies.nearest(features, keys, torch.rand(1, patches), kept).features


def average(patches: int) -> Tensor:
    features, _, _ = grids(patches)
    return strategies.average(features, torch.rand(1, patches), torch.arange(0, patches, 2)[None]).features


def rate(tokens: int) -> Tensor:
    every = torch.ones(1, tokens, dtype=torch.bool)
    return strategies.raters(torch.randn(1, tokens, 4), every, torch.randn(1, tokens, 4), every).float()


def similar(tokens: int) -> Tensor:
    every = torch.ones(1, tokens, dtype=torch.bool)
    return strategies.text_similarity(torch.randn(1, tokens, 4), torch.randn(1, tokens, 4), every)


def chosen(patches: int) -> Tensor:
    neighbours = gap_kernels.grid_neighbours((patches // 16, 16))[None]
    return strategies.choose(torch.rand(1, patches), patches // 2, "region", neighbours=neighbours).float()


WORK: dict[str, Callable[[int], Tensor]] = {
    "importance": importance,
    "importance, max": lambda rows: importance(rows, head_reduction="max", causal=False),
    "importance with lse": lambda rows: importance(rows, given=True),
    "corrected_importance": corrected,
    "prune_tokens": pruned,
    "attention": attended,
    "attention_received": received,
    "spatial_aggregate": aggregated,
    "greedy_indices, max-min": lambda patches: greedy(patches, "max_min"),
    "greedy_indices, determinant": lambda patches: greedy(patches, "determinant"),
    "greedy_indices, coverage": lambda patches: greedy(patches, "coverage_gain"),
    "distinct_indices": distinct,
    "least_similar_indices": least_similar,
    "contextual": contextual,
    "nearest": nearest,
    "average": average,
    "raters": rate,
    "text_similarity": similar,
    "choose": chosen,
}


@pytest.mark.parametrize("name", list(WORK))
def test_memory_doubles_with_twice_the_tokens(
    name: str, largest: Largest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", LIMIT)
    found = []
    for size in (512, 1024):
        largest.elements = 0
        with largest:
            WORK[name](size)
        found.append(largest.elements)
    assert found[0] >= 512
    # A block, or an input and what is made of it row by row; a product of both sizes would grow fourfold.
    assert found[1] <= max(LIMIT, 2.1 * found[0])


@pytest.mark.parametrize("limit", [1, 40, 1 << 12])
@pytest.mark.parametrize("sizes", [(7,), (5, 3), (2, 1, 9), (3, 0), (0, 4)])
def test_nested_blocks_cover_every_item_once(
    sizes: tuple[int, ...], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", limit * blocks.CACHED_SHARE)
    count = torch.zeros(sizes)
    for block in blocks.nested_blocks(sizes, 6):
        count[block] += 1
        assert count[block].numel() * 6 <= max(limit, 6)
    assert torch.equal(count, torch.ones(sizes))


def test_the_rows_of_a_sample_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of one row of each of many samples would read all keys of all of them for little work."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 16 * 16 * 4 * blocks.CACHED_SHARE)
    found = list(blocks.nested_blocks((64, 2, 16), 2 * 16))
    assert found == [(slice(i, i + 1), slice(0, 2), slice(0, 16)) for i in range(64)]
    query, key = parts(64, (4, 2), 16)
    shapes = Shapes("aten.bmm.default")
    inside = importlib.import_module("gap_kernels.received.reference")
    with shapes:
        inside.attention_received(query, key, None, None, False, None, None)
    assert shapes.found == [(2, 32, 16)] * 64


def test_packed_sequences_are_scored_by_themselves() -> None:
    query, key = parts(1, (2, 2), 512)
    bounds = torch.arange(0, 513, 64, dtype=torch.int32)
    shapes = Shapes("aten.bmm.default")
    inside = importlib.import_module("gap_kernels.received.reference")
    with shapes:
        found = inside.attention_received(query, key, None, bounds, False, None, None)
    assert shapes.found == [(2, 64, 64)] * 8
    shapes.found.clear()
    # As where to read the bounds would wait for a GPU.
    with pytest.MonkeyPatch.context() as patch, shapes:
        patch.setattr(inside, "_separate_spans", lambda tokens, bounds: [(0, tokens)])
        whole = inside.attention_received(query, key, None, bounds, False, None, None)
    assert shapes.found == [(2, 512, 512)]
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("name", list(WORK))
def test_blocks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    whole = WORK[name](256)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", LIMIT)
    torch.manual_seed(1)
    torch.testing.assert_close(WORK[name](256), whole)


def test_text_of_thousands_of_tokens(largest: Largest) -> None:
    """The default score of a prompt of 8,000 text tokens, at the size of the blocks that is shipped."""
    query, key = parts(1, (2, 2), 8064, 16)
    text, visual = torch.arange(64, 8064)[None], torch.arange(64)[None]
    with largest:
        scores = visual_importance(query, key, visual, rows=text)
    assert 8064 * 100 <= largest.elements <= blocks.BLOCK_ELEMENTS
    attended = attention(query, key, key, importance_rows=text, importance_columns=visual)
    torch.testing.assert_close(scores, attended.importance)


@pytest.mark.parametrize("name", ["nearest", "contextual", "spatial_aggregate", "attention_received"])
def test_grids_of_thousands_of_patches(name: str, largest: Largest) -> None:
    """At the size of the blocks that is shipped: the matrix of all has two to thirty-six times as many elements."""
    with largest:
        WORK[name](6144)
    assert largest.elements <= blocks.BLOCK_ELEMENTS


@pytest.mark.parametrize("rule", ["max_min", "determinant", "coverage_gain"])
def test_greedy_selection_of_thousands_of_tokens(rule: str, largest: Largest) -> None:
    """At the size of the blocks that is shipped, 4,096 tokens have four times as many pairs."""
    features = torch.randn(1, 4096, 8)
    with largest:
        gap_kernels.greedy_indices(features, 3, rule)
    assert 4096 * 8 <= largest.elements <= blocks.BLOCK_ELEMENTS
