"""Scores from the attention of a vision tower, and what is chosen by them, as the plug-in for vLLM computes both."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from support.towers import MERGE, family
from torch import Tensor, nn

from gap_triton.strategies import spatial_order
from gap_triton.strategies.draw import draw
from gap_triton.vision_tower import find_tower
from gap_triton.vllm.choose import choose
from gap_triton.vllm.layouts import PackedLayout, SquareLayout, chunks
from gap_triton.vllm.plan import Plan
from gap_triton.vllm.scores import TowerScores

TOLERANCE = 1e-5


class Attention(nn.Module):
    """Takes query, key and value as the encoder attention of vLLM does, and ends there."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.num_heads = self.num_kv_heads = heads
        self.scale = size**-0.5

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Any = None) -> None:
        pass


def naive(query: Tensor, key: Tensor, bounds: list[int], leading: int) -> dict[str, Tensor]:
    """Scores of query and key [B, S, H, D], sequence by sequence and head by head."""
    batch, _, heads, size = query.shape
    found: dict[str, list[Tensor]] = {"received": [], "cls": [], "key_norm": []}
    for sample in range(batch):
        for first, after in pairwise(bounds):
            rows = slice(first, after)
            maps = [
                torch.softmax(
                    query[sample, rows, head].double() @ key[sample, rows, head].double().T / size**0.5, -1
                )
                for head in range(heads)
            ]
            mean = torch.stack(maps).mean(0)
            found["received"].append(mean.mean(0)[leading:])
            found["cls"].append(mean[0, leading:])
            found["key_norm"].append(key[sample, rows].double().flatten(1).norm(dim=-1)[leading:])
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.fixture
def query_and_key() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 10, 4, 8, generator=generator), torch.randn(2, 10, 4, 8, generator=generator)


NAMES = ("received", "cls", "key_norm")


def test_scores_of_a_batch_of_images(query_and_key: tuple[Tensor, Tensor]) -> None:
    query, key = query_and_key
    attention = Attention(4, 8)
    watched = TowerScores(attention, 1, 1, lambda x: x)
    expected = naive(query, key, [0, 10], 1)
    for flat in (False, True):  # CLIP's gives its heads side by side
        arguments = [each.flatten(2) if flat else each for each in (query, key, key)]
        with watched.record(NAMES) as scores:
            attention(*arguments)
        assert set(scores) == set(NAMES)
        for name in NAMES:
            torch.testing.assert_close(scores[name].double(), expected[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_scores_of_images_in_one_sequence(query_and_key: tuple[Tensor, Tensor]) -> None:
    query, key = (each[:1] for each in query_and_key)
    attention = Attention(4, 8)
    watched = TowerScores(attention, 0, 1, lambda x: x)
    with watched.record({"received", "key_norm"}) as scores:
        attention(query=query, key=key, value=key, cu_seqlens=torch.tensor([0, 3, 10]))
    expected = naive(query, key, [0, 3, 10], 0)
    for name in ("received", "key_norm"):
        torch.testing.assert_close(scores[name].double(), expected[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_ranks_that_hold_half_of_the_heads_agree(query_and_key: tuple[Tensor, Tensor]) -> None:
    query, key = query_and_key
    local: list[list[Tensor]] = []
    for half in (slice(0, 2), slice(2, 4)):
        attention, parts = Attention(2, 8), []
        with TowerScores(attention, 1, 2, lambda x, parts=parts: parts.append(x) or x).record(NAMES):
            attention(query[:, :, half], key[:, :, half], key[:, :, half])
        local.append(parts)
    sums = [first + second for first, second in zip(*local, strict=True)]
    attention, queue = Attention(2, 8), list(sums)
    with TowerScores(attention, 1, 2, lambda x: queue.pop(0)).record(NAMES) as scores:
        attention(query[:, :, :2], key[:, :, :2], key[:, :, :2])
    expected = naive(query, key, [0, 10], 1)
    for name in NAMES:
        torch.testing.assert_close(scores[name].double(), expected[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_nothing_is_scored_outside_of_a_recording(query_and_key: tuple[Tensor, Tensor]) -> None:
    attention = Attention(4, 8)
    watched = TowerScores(attention, 1, 1, lambda x: x)
    with pytest.raises(ZeroDivisionError), watched.record(NAMES) as scores:
        raise ZeroDivisionError
    attention(*query_and_key, query_and_key[1])
    with watched.record(()) as none:
        attention(*query_and_key, query_and_key[1])
    assert scores == none == {}


# --------------------------------------------------------------------------------------------- layouts
def test_patches_become_tokens_as_they_do_in_transformers() -> None:
    tower = find_tower(family("qwen2_5_vl").model)
    assert tower.window is not None
    grids = [(1, 8, 12), (1, 6, 4)]
    layout = PackedLayout((7,), 0, 3, merge=MERGE, window=tower.window)
    fields = {"image_grid_thw": torch.tensor(grids)}
    tokens = layout.grids(fields, 2)
    assert tokens == [(4, 6), (3, 2)]
    rows = torch.randn(sum(h * w for _, h, w in grids), generator=torch.Generator().manual_seed(1))
    expected = tower.to_features(rows, {"image_grid_thw": grids}, 30)
    assert torch.equal(layout.to_features(rows, tokens), expected)
    without = PackedLayout((7,), 0, 3, merge=MERGE)
    assert not torch.equal(without.to_features(rows, tokens), expected)


def test_ids_of_an_image() -> None:
    assert PackedLayout((7,), 0, 3, merge=2).offsets((2, 3)).tolist() == [
        [0] * 6,
        [0, 0, 0, 1, 1, 1],
        [0, 1, 2, 0, 1, 2],
    ]
    assert SquareLayout((7,), 1, 1, side=2).offsets((2, 2)).tolist() == [[0, 1, 2, 3]] * 3


def test_a_batch_is_taken_apart() -> None:
    packed = PackedLayout((7,), 0, 3, merge=2)
    sizes = torch.tensor([[1, 2, 4], [1, 2, 2], [1, 4, 4]])
    fields = {"pixel_values": torch.arange(28), "image_grid_thw": sizes}
    part = packed.part(fields, 1, 3)
    assert part["pixel_values"].tolist() == list(range(8, 28))
    assert torch.equal(part["image_grid_thw"], sizes[1:])
    square = SquareLayout((7,), 1, 1, side=2)
    assert square.part({"pixel_values": torch.arange(5)}, 1, 3)["pixel_values"].tolist() == [1, 2]
    assert square.grids({}, 2) == [(2, 2), (2, 2)]


@pytest.mark.parametrize(
    ("grids", "most", "expected"),
    [
        ([(2, 2)] * 5, 8, [(0, 2), (2, 4), (4, 5)]),
        ([(2, 2)] * 3, 100, [(0, 3)]),
        ([(9, 9), (1, 1), (9, 9)], 8, [(0, 1), (1, 2), (2, 3)]),  # an image that is too large goes alone
        ([(1, 3), (1, 5), (1, 1)], 8, [(0, 2), (2, 3)]),
        ([], 8, []),
    ],
)
def test_images_are_encoded_in_chunks(
    grids: list[tuple[int, int]], most: int, expected: list[tuple[int, int]]
) -> None:
    assert list(chunks(grids, most)) == expected


# --------------------------------------------------------------------------------------------- choices
def test_what_is_chosen() -> None:
    score = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.2, 0.3])
    grid = (2, 3)
    best = choose(Plan(2, "received", "topk", "kept", 0), grid, score)
    assert best is not None
    assert best.tolist() == [1, 3]
    assert (
        choose(Plan(2, "received", "topk", "kept", 0), grid) is None
    )  # nothing is known before the tower ran
    assert choose(Plan(6, "received", "topk", "kept", 0), grid, score) is None  # all survive
    by_region = choose(Plan(2, "received", "region", "kept", 0), grid, score)
    assert by_region is not None
    assert by_region.tolist() == [1, 2]  # 0.7 is in the region of 0.9


def test_what_needs_no_tower_is_known_before_it_runs() -> None:
    grid = (3, 4)
    spread = choose(Plan(5, "spatial", "topk", "kept", 0), grid)
    drawn = choose(Plan(5, "random", "topk", "kept", 9), grid)
    assert spread is not None
    assert drawn is not None
    assert spread.tolist() == (spatial_order(grid) < 5).nonzero()[:, 0].tolist()
    assert drawn.tolist() == draw(9, 0, 12).topk(5).indices.sort().values.tolist()
