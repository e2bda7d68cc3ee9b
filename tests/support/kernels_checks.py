"""Kernels against the reference at sizes that cross their tile boundaries.

Not collected by default: ``test_ops_kernels.py`` runs this file in Triton's interpreter, see
``kernels_interpreter.py``, beside the small cases of the other ``test_ops_*`` files; and on a GPU where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import gap_kernels
import pytest
import torch
import triton
import triton.language as tl
from gap_kernels import blocks, tiles
from gap_kernels.aggregate import kernel as aggregate
from gap_kernels.aggregate import reference as aggregate_reference
from gap_kernels.backends import triton_is_interpreted
from gap_kernels.corrected import kernel as corrected
from gap_kernels.corrected import reference as corrected_reference
from gap_kernels.cosine import kernel as cosine
from gap_kernels.cosine import reference as cosine_reference
from gap_kernels.flash_attention import kernel as attention
from gap_kernels.flash_attention import reference as attention_reference
from gap_kernels.greedy import coverage as greedy_coverage
from gap_kernels.greedy import kernel as greedy
from gap_kernels.greedy import reference as greedy_reference
from gap_kernels.importance import kernel as importance
from gap_kernels.importance import reference as importance_reference
from gap_kernels.merge import kernel as merge
from gap_kernels.merge import reference as merge_reference
from gap_kernels.prompt import kernel as prompt
from gap_kernels.prompt import reference as prompt_reference
from gap_kernels.prune import kernel as prune
from gap_kernels.prune import one_launch, op
from gap_kernels.prune import reference as prune_reference
from gap_kernels.raters import kernel as raters
from gap_kernels.raters import reference as raters_reference
from gap_kernels.received import kernel as received
from gap_kernels.received import reference as received_reference
from gap_kernels.region import grid_neighbours
from gap_kernels.region import kernel as region
from gap_kernels.region import reference as region_reference
from gap_kernels.rotation import kernel as rotation
from gap_kernels.rotation import reference as rotation_reference
from gap_kernels.scatter import kernel as scatter
from gap_kernels.scatter import reference as scatter_reference
from gap_kernels.select import kernel as select
from gap_kernels.select import reference as select_reference
from gap_kernels.similarity import kernel as similarity
from gap_kernels.similarity import reference as similarity_reference
from gap_kernels.windows import kernel as windows
from gap_kernels.windows import reference as windows_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gap_triton import latency
from support.naive.corrected import halves
from support.poison import poisoned_memory

DEVICE = "cpu" if triton_is_interpreted() else "cuda"


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poisoned_memory(DEVICE):
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def special_scores(batch: int, n: int, generator: torch.Generator) -> Tensor:
    """Scores of both signs with many ties, zeros of both signs, infinities and NaN."""
    scores = (torch.randn(batch, n, generator=generator) * 4).round() / 4
    for value in (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45):
        scores[torch.rand(batch, n, generator=generator) < 0.03] = value
    return scores.to(DEVICE)


@pytest.mark.parametrize("length", [1, 1023, 1025, 3000])
def test_prompt(length: int, generator: torch.Generator) -> None:
    """Lengths around the block, in which images, text and padding are anywhere."""
    tokens = torch.randint(0, 6, (3, length), generator=generator).to(DEVICE)
    flags = [torch.rand(3, length, generator=generator).to(DEVICE) < 0.9 for _ in range(3)]
    index = torch.arange(length, device=DEVICE).expand(3, -1)[:, :: 2 if length > 1 else 1].contiguous()
    index[:, : length // 5] = -1
    for arguments in (
        (tokens, (3, 5), None, None, None, None),
        (tokens, (3, 5), flags[0].long(), ~flags[1], None, None),
        (tokens == 3, (), flags[0], ~flags[1], flags[2], index),
        (tokens == 3, (), None, None, None, index),
    ):
        for found, expected in zip(
            prompt.read_prompt(*arguments, length, length),
            prompt_reference.read_prompt(*arguments, length, length),
            strict=True,
        ):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_raters(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Tiles of visual tokens, text and channels that are not full; scores so far apart that rounding decides nothing."""
    embeds = torch.randn(2, 300, 100, generator=generator).to(DEVICE, dtype)
    order = torch.rand(2, 300, generator=generator).argsort(1).to(DEVICE)
    visual_index, text_rows = order[:, :70].clone(), order[:, 70:220].clone()
    visual_index[0, 40:], text_rows[1, :30] = -1, -1
    found = raters.text_raters(embeds, visual_index, text_rows)
    assert torch.equal(found, raters_reference.text_raters(embeds.double(), visual_index, text_rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cosine(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Tiles of visual tokens, text and channels that are not full."""
    embeds = torch.randn(2, 300, 300, generator=generator).to(DEVICE, dtype)
    order = torch.rand(2, 300, generator=generator).argsort(1).to(DEVICE)
    visual_index, text_rows = order[:, :70].clone(), order[:, 70:220].clone()
    visual_index[0, 40:], text_rows[1, :30] = -1, -1
    found = cosine.text_cosine(embeds, visual_index, text_rows)
    expected = cosine_reference.text_cosine(embeds.double(), visual_index, text_rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_merge(generator: torch.Generator) -> None:
    """Tiles of tokens, of those that they merge into, and of channels that are not full; more of each than one."""
    features = torch.randn(1, 70, 130, generator=generator).to(DEVICE, torch.bfloat16)
    keys = torch.randn(1, 70, 130, generator=generator).to(DEVICE, torch.bfloat16)
    weights = torch.rand(1, 70, generator=generator).to(DEVICE)
    rows = torch.rand(1, 70, generator=generator).argsort(1).to(DEVICE)
    rows[0, ::7] = -1
    kept, excluded = rows[:, :20].contiguous(), rows[:, 20:40].contiguous()
    exact = features.double(), keys.double()
    found = merge.collect_nearest(features, keys, weights, kept, 40)
    expected = merge_reference.collect_nearest(*exact, weights, kept, 40)
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)
    for average in (False, True):
        found = merge.merge_nearest(features, keys, kept, excluded, average)
        expected = merge_reference.merge_nearest(*exact, kept, excluded, average)
        torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("n", [1, 127, 129, 576, 1000, 8193, 16384, 16385, 65536])
def test_select(n: int, generator: torch.Generator) -> None:
    scores = special_scores(2, n, generator)
    counts = torch.tensor([n, n // 5], device=DEVICE)
    for k in {0, 1, n // 3, n - 1, n}:
        assert torch.equal(
            select.topk_indices(scores, k, None, k), select_reference.topk_indices(scores, k, None, k)
        )
    for length in (n + 300, n):
        expected = select_reference.topk_indices(scores, 0, counts, length)
        assert torch.equal(select.topk_indices(scores, 0, counts, length), expected)


@pytest.mark.parametrize("n", [576, 20011])
def test_select_of_softmax_like_and_equal_scores(n: int, generator: torch.Generator) -> None:
    scores = torch.stack(
        [torch.randn(n, generator=generator).softmax(0), torch.full((n,), 0.25), torch.zeros(n)]
    )
    expected = select_reference.topk_indices(scores, n // 4, None, n // 4)
    assert torch.equal(select.topk_indices(scores, n // 4, None, n // 4), expected)


def test_select_beyond_what_can_be_selected() -> None:
    """Counts that only the CPU checks: a GPU clamps them."""
    scores = torch.tensor([[3.0, 1.0, 2.0]] * 3, device=DEVICE)
    index = select.topk_indices(scores, 0, torch.tensor([9, -2, 3], device=DEVICE), 2)
    assert index.tolist() == [[0, 2], [-1, -1], [0, 2]]


@pytest.mark.parametrize(
    ("grid", "cells"),
    [
        ((1, 1), (2, 2)),
        ((3, 43), (2, 2)),
        ((24, 24), (2, 2)),
        ((25, 41), (1, 2)),  # a cell beyond one tile of writes
        ((91, 90), (3, 3)),
        ((128, 128), (2, 2)),
        ((5, 3277), (2, 2)),  # a cell beyond what stays in registers
        ((181, 182), (1, 1)),
    ],
)
def test_region(grid: tuple[int, int], cells: tuple[int, int], generator: torch.Generator) -> None:
    n = grid[0] * grid[1]
    scores = special_scores(2, n, generator)
    neighbours = grid_neighbours(grid, cells, DEVICE)[None]
    counts = torch.tensor([n, n // 5], device=DEVICE)
    most = cells[0] * cells[1]
    for per_region in {1, most // 2 + 1}:
        for k in {0, 1, n // 7, n // 2, n}:
            given = (scores, neighbours, per_region, k, None, k)
            assert torch.equal(region.topk_per_region(*given), region_reference.topk_per_region(*given))
        for length in (n + 300, n):
            given = (scores, neighbours, per_region, 0, counts, length)
            assert torch.equal(region.topk_per_region(*given), region_reference.topk_per_region(*given))


@pytest.mark.parametrize("num_neighbours", [1, 3, 8])
def test_region_of_any_neighbours(num_neighbours: int, generator: torch.Generator) -> None:
    """Of their own for each sample, in other tiles, and out of range, which only the CPU checks."""
    n = 2500
    scores = special_scores(3, n, generator)
    neighbours = torch.randint(-9, n + 9, (3, n, num_neighbours), generator=generator).int().to(DEVICE)
    neighbours[0, :, 0], neighbours[1, :, 0] = 2**31 - 1, -(2**31)
    for per_region in (1, 2, 2**31):
        for k in (n // 20, n // 2, n - 1):
            given = (scores, neighbours, per_region, k, None, k)
            assert torch.equal(region.topk_per_region(*given), region_reference.topk_per_region(*given))


def test_region_beyond_what_can_be_selected() -> None:
    """Counts that only the CPU checks: a GPU clamps them."""
    scores = torch.tensor([[3.0, 1.0, 2.0]] * 5, device=DEVICE)
    neighbours = grid_neighbours((1, 3), device=DEVICE)[None]
    counts = torch.tensor([9, -2, 3, 2**40, -(2**40)], device=DEVICE)
    index = region.topk_per_region(scores, neighbours, 1, 0, counts, 2)
    assert index.tolist() == [[0, 2], [-1, -1], [0, 2], [0, 2], [-1, -1]]
    index = region.topk_per_region(scores, neighbours, 1, 0, counts, 4)
    every = [-1, 0, 1, 2]
    assert index.tolist() == [every, [-1] * 4, every, every, [-1] * 4]


@pytest.mark.parametrize("grid", [(24, 24), (7, 9), (1, 5), (33, 40)])
def test_region_with_as_many_candidates_as_needed(grid: tuple[int, int], generator: torch.Generator) -> None:
    n = grid[0] * grid[1]
    scores = special_scores(3, n, generator)
    neighbours = grid_neighbours(grid, device=DEVICE)[None]
    regions = -(-grid[0] // 2) * -(-grid[1] // 2)
    counts = [n // 5, n // 2, n]
    index = region.topk_per_region(scores, neighbours, 0, 0, torch.tensor(counts, device=DEVICE), n)
    for b, count in enumerate(counts):
        given = (scores[b : b + 1], neighbours, max(1, -(-count // regions)), count, None, n)
        assert torch.equal(index[b : b + 1], region_reference.topk_per_region(*given))


@triton.jit(do_not_specialize=["num_keys", "n", "per_region", "budget"])
def rows_by_region_kernel(
    scores, neighbours, positions, keys, index, num_keys, n, per_region, budget, R: tl.constexpr
):
    """Select rows of a prompt, of which entries are some, as a launch that also scores them would."""
    left = region.write_region_keys(
        scores, neighbours, positions, keys, per_region, budget, n, num_keys, R, 128, ".cg"
    )
    threshold, ties, _, total = select.select_threshold(keys, num_keys, left, 1024, True, False)
    select.write_selected(index, keys, num_keys, num_keys, threshold, ties, total, 128, False, False)


@pytest.mark.parametrize("per_region", [0, 1, 3])
def test_region_of_rows_among_others(per_region: int, generator: torch.Generator) -> None:
    """Keys at the places of visual rows in a prompt whose text is selected always, and whose padding never is."""
    grid, num_rows = (12, 15), 300
    n = grid[0] * grid[1]
    scores = special_scores(1, n + 9, generator)
    rows = torch.randperm(num_rows, generator=generator)[:n].sort().values
    positions = torch.cat([rows, torch.full((9,), -1)]).to(DEVICE)  # filler at the end
    neighbours = grid_neighbours(grid, device=DEVICE)
    neighbours = torch.cat([neighbours, neighbours.new_full((9, 3), -1)])
    text = torch.ones(num_rows, dtype=torch.bool).scatter(0, rows, False)
    padding = text & (torch.rand(num_rows, generator=generator) < 0.3)
    for keep in (0, 17, 45, 100, n):
        keys = torch.where(padding, -(2**31), 2**31 - 1).int().to(DEVICE)
        index = torch.full((num_rows,), -7, device=DEVICE)
        rows_by_region_kernel[(1,)](
            scores, neighbours, positions, keys, index, num_rows, n + 9, per_region, keep, R=3
        )
        wanted = per_region or max(1, -(-keep // 48))
        chosen = region_reference.topk_per_region(
            scores[:, :n], neighbours[None, :n], wanted, keep, None, keep
        )[0]
        expected = torch.cat([(text & ~padding).nonzero()[:, 0], rows[chosen.cpu()]]).sort().values
        assert index.tolist() == [-1] * (num_rows - len(expected)) + expected.tolist()


def importance_case(
    generator: torch.Generator,
    heads: tuple[int, int],
    num_query: int,
    num_keys: int,
    head_dim: int,
    num_rows: int | None,
    num_visual: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Query, key, visual_index, rows and mask with filler, padding and tokens that no row sees."""
    query = torch.randn(2, heads[0], num_query, head_dim, generator=generator)
    key = torch.randn(2, heads[1], num_keys, head_dim, generator=generator)
    visual_index = torch.stack(
        [torch.randperm(num_query, generator=generator)[:num_visual] for _ in range(2)]
    )
    visual_index[1, ::7] = -1
    rows = None
    if num_rows is not None:
        rows = torch.randint(-1, num_query, (2, num_rows), generator=generator)
    mask = torch.rand(2, num_keys, generator=generator) < 0.9
    rows = None if rows is None else rows.to(DEVICE)
    return query.to(DEVICE), key.to(DEVICE), visual_index.to(DEVICE), rows, mask.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "num_query", "num_keys", "head_dim", "num_rows", "num_visual"),
    [
        ((2, 2), 65, 600, 128, None, 65),  # several splits of the keys
        ((7, 1), 200, 200, 80, 9, 130),  # M = 63 rows, several tiles of rows and of visual tokens
        ((4, 2), 70, 70, 96, 16, 63),  # head_dim that is no power of two
        ((2, 1), 40, 300, 256, 3, 33),  # narrower key tiles
        ((3, 3), 17, 17, 8, 1, 16),  # head_dim below the smallest tile
    ],
)
def test_importance(
    dtype: torch.dtype,
    heads: tuple[int, int],
    num_query: int,
    num_keys: int,
    head_dim: int,
    num_rows: int | None,
    num_visual: int,
    generator: torch.Generator,
) -> None:
    query, key, visual_index, rows, mask = importance_case(
        generator, heads, num_query, num_keys, head_dim, num_rows, num_visual
    )
    query, key = query.to(dtype), key.to(dtype)
    # Heads beside positions in memory, as projections leave them.
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    scores = importance.visual_importance(query, key, visual_index, rows, mask, None, None)
    exact = importance_reference.visual_importance(
        query.double(), key.double(), visual_index, rows, mask, None, None
    )
    assert_accurate(scores, exact, query)
    assert (scores[1, ::7] == 0).all()

    again = importance.visual_importance(query, key, visual_index, rows, mask, None, None)
    assert torch.equal(scores, again)

    lse = row_lse(query, key, rows, mask)
    scores = importance.visual_importance(query, key, visual_index, rows, mask, lse, None)
    assert_accurate(scores, exact, query)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "num_query", "num_keys", "head_dim", "channels", "num_rows", "num_visual"),
    [
        ((2, 1), 40, 140, 128, 128, None, 33),  # several splits of the keys
        (
            (2, 1),
            50,
            50,
            40,
            20,
            37,
            40,
        ),  # several tiles of rows and of visual tokens, a part of the channels
        ((6, 3), 20, 25, 20, 10, 5, 10),  # no power of two of anything
    ],
)
def test_corrected(
    dtype: torch.dtype,
    heads: tuple[int, int],
    num_query: int,
    num_keys: int,
    head_dim: int,
    channels: int,
    num_rows: int | None,
    num_visual: int,
    generator: torch.Generator,
) -> None:
    query, key, visual_index, rows, mask = importance_case(
        generator, heads, num_query, num_keys, head_dim, num_rows, num_visual
    )
    query, key = query.to(dtype), key.to(dtype)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    angle = torch.rand(2, num_query, channels, generator=generator)
    angles = [x.to(DEVICE, dtype) for x in (angle.cos(), angle.sin())]
    turns = halves(channels, head_dim).to(DEVICE)
    optional = (turns, max(heads[0] * 14 // 32, 1), rows, mask, None)
    scores = corrected.corrected_importance(query, key, visual_index, *angles, *optional)
    exact = corrected_reference.corrected_importance(
        query.double(), key.double(), visual_index, *(x.double() for x in angles), *optional
    )
    assert_accurate(scores, exact, query)
    assert (scores[1, ::7] == 0).all()

    again = corrected.corrected_importance(query, key, visual_index, *angles, *optional)
    assert torch.equal(scores, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_reduction", ["mean", "max"])
@pytest.mark.parametrize(
    ("heads", "num_query", "num_keys", "head_dim", "value_dim", "num_rows", "num_visual", "causal"),
    [
        ((2, 2), 65, 600, 64, 64, None, 65, False),  # one row, several splits of the keys
        ((7, 1), 140, 140, 80, 80, 9, 130, True),  # several tiles of rows for the mean, one for the maximum
        ((4, 2), 70, 90, 72, 200, 37, 63, False),  # several tiles of rows for either, long values
        ((2, 1), 40, 70, 256, 3, 3, 33, True),  # values shorter than the smallest tile
        ((4, 2), 50, 60, 96, 128, 5, 40, False),
        ((2, 1), 40, 70, 128, None, 17, 33, False),
    ],
)
def test_importance_variants(
    dtype: torch.dtype,
    head_reduction: str,
    heads: tuple[int, int],
    num_query: int,
    num_keys: int,
    head_dim: int,
    value_dim: int | None,
    num_rows: int | None,
    num_visual: int,
    causal: bool,
    generator: torch.Generator,
) -> None:
    query, key, visual_index, rows, mask = importance_case(
        generator, heads, num_query, num_keys, head_dim, num_rows, num_visual
    )
    query, key, value = query.to(dtype), key.to(dtype), None
    if value_dim is not None:
        # Heads beside positions in memory, as projections leave them.
        value = torch.randn(2, num_keys, heads[1], value_dim, generator=generator).to(DEVICE, dtype)
        value = value.transpose(1, 2)
        value[~mask[:, None].expand(2, heads[1], num_keys)] = math.nan
    variant = (causal, value, head_reduction)
    scores = importance.visual_importance(query, key, visual_index, rows, mask, None, None, *variant)
    exact = importance_reference.visual_importance(
        query.double(), key.double(), visual_index, rows, mask, None, None,
        causal, None if value is None else value.double(), head_reduction,
    )  # fmt: skip
    assert_accurate(scores, exact, query)
    assert (scores[1, ::7] == 0).all()

    again = importance.visual_importance(query, key, visual_index, rows, mask, None, None, *variant)
    assert torch.equal(scores, again)

    lse = row_lse(query, key, rows, mask, causal)
    scores = importance.visual_importance(query, key, visual_index, rows, mask, lse, None, *variant)
    assert_accurate(scores, exact, query)


@pytest.mark.parametrize(
    ("head_reduction", "with_value", "with_lse", "stored"),
    [
        ("mean", False, False, True),
        ("mean", False, True, False),
        ("mean", True, False, False),
        ("max", False, False, False),
        ("max", True, True, False),
    ],
)
def test_importance_launches(
    head_reduction: str, with_value: bool, with_lse: bool, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, launch = [], importance.launch
    monkeypatch.setattr(
        importance,
        "launch",
        lambda kernel, *rest, **options: (launched.append(kernel), launch(kernel, *rest, **options)),
    )
    query, key = torch.ones(1, 4, 3, 16, device=DEVICE), torch.ones(1, 2, 3, 16, device=DEVICE)
    lse = torch.zeros(1, 4, 1, device=DEVICE) if with_lse else None
    index = torch.tensor([[0, 1]], device=DEVICE)
    value = key if with_value else None
    importance.visual_importance(query, key, index, None, None, lse, None, False, value, head_reduction)
    first = [] if with_lse else [importance.row_lse_kernel]
    swept = [importance.visual_mass_kernel, importance.mean_kernel]
    assert launched == [*first, *([importance.stored_mean_kernel] if stored else swept)]


@pytest.mark.parametrize("head_reduction", ["mean", "max"])
def test_nan_of_one_head_among_many(head_reduction: str, generator: torch.Generator) -> None:
    query = torch.randn(1, 40, 5, 16, generator=generator)
    key = torch.randn(1, 40, 5, 16, generator=generator)
    key[0, 3, 2] = math.nan
    scores = importance.visual_importance(
        query.to(DEVICE), key.to(DEVICE), torch.tensor([[0, 1, 2]], device=DEVICE), None, None,
        torch.zeros(1, 40, 1, device=DEVICE), None, True, None, head_reduction,
    )  # fmt: skip
    assert scores.isnan().tolist() == [[False, False, True]]


def row_lse(query: Tensor, key: Tensor, rows: Tensor | None, mask: Tensor, causal: bool = True) -> Tensor:
    """Log-sum-exp [B, Hq, R] in float32; NaN for filler rows, as what an attention returns there is arbitrary."""
    batch, query_heads, num_query, head_dim = query.shape
    rows = torch.full((batch, 1), num_query - 1, device=DEVICE) if rows is None else rows
    key = key.repeat_interleave(query_heads // key.shape[1], 1).double()
    logits = query.double() @ key.transpose(-1, -2) * head_dim**-0.5
    offset = key.shape[2] - num_query
    visible = torch.ones(num_query, key.shape[2], dtype=torch.bool, device=DEVICE)
    visible = visible.tril(offset) if causal else visible
    lse = logits.masked_fill(~(visible & mask[:, None, None]), -math.inf).logsumexp(-1)
    lse = lse.gather(2, rows.clamp(min=0)[:, None].expand(-1, query_heads, -1))
    return lse.masked_fill((rows < 0)[:, None], math.nan).float()


SUMS = 1e-5
"""Relative error that sums of up to hundreds of float32 numbers stay well within, exponentials included."""
PRODUCTS_AT_ONCE = 16
"""Of 16 bit numbers, that tensor cores add to a sum at a time."""
LARGEST_LOGIT = 5.0
"""Of normally distributed queries and keys, about."""


def rounding_of_scores(query: Tensor) -> float:
    """Return the relative error that probabilities may have.

    Tensor cores cut a sum off where float32 would round it, each time by up to 2^-23 of it. A logit is off by as much as
    all its sums together, in the same direction, and so is the log-sum-exp that is taken from it.
    """
    if not query.is_cuda or query.dtype == torch.float32:  # whose products aren't made by tensor cores
        return SUMS
    return SUMS + cut_off(query.shape[3])


def cut_off(head_dim: int) -> float:
    """Return how much of a probability may be lost by cutting off, in its logit and the log-sum-exp."""
    return 2 * -(-head_dim // PRODUCTS_AT_ONCE) * 2**-23 * LARGEST_LOGIT


def assert_accurate(scores: Tensor, exact: Tensor, query: Tensor) -> None:
    """Compare the scores of ``query`` with those in float64."""
    assert scores.dtype == torch.float32
    assert (exact > 0).any()
    torch.testing.assert_close(scores.double(), exact, rtol=rounding_of_scores(query), atol=1e-7)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_what_tensor_cores_cut_off_is_allowed(head_dim: int, generator: torch.Generator) -> None:
    """Sums of float64 are cut off as theirs are: the bound holds, and isn't much too wide."""
    query = torch.randn(64, head_dim, generator=generator).half().double()
    key = torch.randn(512, head_dim, generator=generator).half().double()
    logits = torch.zeros(64, 512, dtype=torch.float64)
    for start in range(0, head_dim, PRODUCTS_AT_ONCE):
        part = slice(start, start + PRODUCTS_AT_ONCE)
        logits += query[:, part] @ key[:, part].T
        mantissa, exponent = logits.frexp()
        logits = torch.ldexp((mantissa * 2**24).trunc(), exponent - 24)
    exact, scores = ((each * head_dim**-0.5).softmax(1) for each in (query @ key.T, logits))
    error = ((scores - exact).abs() / exact).max().item()
    assert cut_off(head_dim) / 10 < error < cut_off(head_dim)


def spread_over(coverage: str, num_visual: int, generator: torch.Generator) -> tuple[Any, ...]:
    """A coverage with what it needs: neighbours in other tiles, of three samples; one order for all, with ties."""
    if coverage == "topk":
        return ("topk", None, 0, None)
    if coverage == "stride":
        order = torch.randint(-1, 1 + num_visual // 2, (1, num_visual), generator=generator) * 2**15
        return ("stride", None, 0, order.to(DEVICE))
    together = torch.rand(3, num_visual, generator=generator).argsort(1)
    place = together.argsort(1)
    others = [place - place % 4 + (place + step) % 4 for step in (1, 2, 3)]
    inside = torch.stack(others, 2).clamp(max=max(num_visual - 1, 0))
    neighbours = together.gather(1, inside.flatten(1)).view_as(inside)
    neighbours = torch.where(torch.stack(others, 2) < num_visual, neighbours, -1).int()
    return ("region", neighbours.to(DEVICE), 2 if coverage == "two of each region" else 0, None)


@pytest.mark.parametrize("num_rows", [37, 1100, 8300])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("coverage", ["topk", "region", "two of each region", "stride"])
def test_surviving_rows(num_rows: int, masked: bool, coverage: str, generator: torch.Generator) -> None:
    num_visual = num_rows - 12
    visual_index = torch.stack([torch.randperm(num_rows, generator=generator)[:num_visual] for _ in range(3)])
    visual_index[1, ::5] = -1
    visual_index[2] = torch.arange(num_rows)[-num_visual:]  # ends in a visual token
    scores = special_scores(3, num_visual, generator)
    visual_index = visual_index.to(DEVICE)
    mask = (torch.rand(3, num_rows, generator=generator) < 0.8).to(DEVICE) if masked else None
    ragged = torch.tensor([0, num_visual // 2, 10 * num_rows], device=DEVICE)
    spread = spread_over(coverage, num_visual, generator)
    if coverage == "stride" and masked:
        spread = (*spread, 293_578_123, 10**9)
    lengths = (num_rows, num_rows // 2, num_rows + 200)[: 3 if coverage == "topk" else 1]
    for keep, counts in ((num_rows // 3, None), (0, ragged)):
        for length in lengths:
            arguments = (scores, visual_index, keep, counts, mask, num_rows, length, *spread)
            assert torch.equal(prune.surviving_rows(*arguments), prune_reference.surviving_rows(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("axes", "channels"), [(None, 1500), (3, 1500), (5, 8200)])
def test_gather_rows(dtype: torch.dtype, axes: int | None, channels: int, generator: torch.Generator) -> None:
    hidden = torch.randn(2, 9, channels, generator=generator).to(DEVICE, dtype)
    hidden[0, 0, 0] = math.nan
    cos = torch.randn(1, 9, 80, generator=generator).to(DEVICE, dtype).expand(2, -1, -1)
    sin = torch.randn(2, 80, 9, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    ids = torch.arange(18, device=DEVICE).reshape(2, 9)
    ids = ids if axes is None else torch.stack([ids + 100 * axis for axis in range(axes)])
    index = torch.tensor([[-1, 0, 3, 8], [1, 2, 4, 7]], device=DEVICE)
    expected = prune_reference.gather_rows(hidden, cos, sin, ids, index)
    for output, wanted in zip(prune.gather_rows(hidden, cos, sin, ids, index), expected, strict=True):
        assert output.shape == wanted.shape
        assert output.dtype == wanted.dtype
        assert torch.equal(output.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 100), (torch.bfloat16, 2100)], ids=str)
def test_scatter_rows(dtype: torch.dtype, channels: int, generator: torch.Generator) -> None:
    """Tiles of rows and of the index that are not full, rows that are copied in parts, filler, also out of range."""
    rows = torch.randn(2, 68, channels, generator=generator).to(DEVICE, dtype)[:, 1:]
    base = torch.randn(2, 71, channels, generator=generator).to(DEVICE, dtype)
    index, among = (torch.rand(2, 71, generator=generator).argsort(1).to(DEVICE) for _ in range(2))
    index, among = index[:, :67].contiguous(), among.contiguous()
    index[0, ::5], among[1, ::7] = -1, -1
    beyond = torch.where(index < 0, 999, index)  # only the CPU checks their range
    for others in ((None, None), (among, base)):
        expected = scatter_reference.scatter_rows(rows, index, 71, *others)
        assert torch.equal(scatter.scatter_rows(rows, beyond, 71, *others), expected)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "axes"), [(torch.float32, 72, 3), (torch.bfloat16, 128, None)], ids=str
)
def test_unrotate(dtype: torch.dtype, head_dim: int, axes: int | None, generator: torch.Generator) -> None:
    """Tiles of rows that are not full, channels that are not turned, and pairs that only the CPU checks."""
    query, key = (
        torch.randn(2, heads, 37, head_dim, generator=generator).to(DEVICE, dtype) for heads in (3, 1)
    )
    angle = 50 * torch.randn(*([] if axes is None else [axes]), 1, 37, 64, generator=generator)
    cos, sin = (1.5 * function(angle).to(DEVICE, dtype) for function in (torch.cos, torch.sin))
    channel = torch.arange(head_dim)
    column = channel // 2 + (0 if axes is None else channel % 4 // 2 * 64)
    turned = channel < 64
    pairs = torch.stack([channel ^ 1, torch.where(turned, column, -1)]).int().to(DEVICE)
    beyond = torch.where(turned.to(DEVICE), pairs, 999)
    for rescale in (False, True):
        found = rotation.unrotate(query, key, cos, sin, pairs, rescale)
        exact = rotation_reference.unrotate(query.double(), key.double(), cos, sin, pairs, rescale)
        for one, wanted in zip(found, exact, strict=True):
            torch.testing.assert_close(one.double(), wanted, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
        again = rotation.unrotate(query, key, cos, sin, beyond, rescale)
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("grid", [(24, 24), (3, 140)])
def test_window_ranks(grid: tuple[int, int], generator: torch.Generator) -> None:
    """Tiles of tokens that are not full, and windows of more columns than are compared at a time."""
    n = grid[0] * grid[1]
    scores, earlier = special_scores(2, n + 1, generator)[:, 1:], special_scores(2, n, generator)
    for count, along in ((n // 5, 4), (n - n // 9, 2), (n, 200)):
        found = windows.window_ranks(scores, earlier, *grid, count, along)
        assert torch.equal(found, windows_reference.window_ranks(scores, earlier, *grid, count, along))


class Prompts(NamedTuple):
    """Arguments of ``one_launch.prune_tokens`` for two samples."""

    query: Tensor
    key: Tensor
    hidden_states: Tensor
    cos: Tensor
    sin: Tensor
    position_ids: Tensor
    visual_index: Tensor
    keep: int
    counts: Tensor | None
    rows: Tensor | None
    attention_mask: Tensor | None
    lse: Tensor | None
    scale: float | None
    length: int
    coverage: str = "topk"
    neighbours: Tensor | None = None
    per_region: int = 0
    order: Tensor | None = None


def prompts(
    generator: torch.Generator,
    heads: tuple[int, int] = (4, 2),
    num_query: int = 50,
    num_keys: int = 70,
    head_dim: int = 16,
    num_rows: int | None = None,
    num_visual: int = 40,
    dtype: torch.dtype = torch.float32,
    axes: int | None = None,
    ragged: bool = False,
    masked: bool = False,
    with_lse: bool = False,
    channels: int = 96,
    coverage: str = "topk",
) -> Prompts:
    """Prompts with filler, padding and more columns than survivors, as asked."""
    query, key, visual_index, rows, mask = importance_case(
        generator, heads, num_query, num_keys, head_dim, num_rows, num_visual
    )
    mask[0, : num_keys // 3] = False  # padding on the left and within
    mask = mask if masked else torch.ones_like(mask)
    query, key = query.to(dtype), key.to(dtype)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    ids = torch.arange(2 * num_query, device=DEVICE).reshape(2, num_query) + 7
    name, neighbours, per_region, order = spread_over(coverage, num_visual, generator)
    return Prompts(
        query,
        key,
        torch.randn(2, num_query, channels, generator=generator).to(DEVICE, dtype),
        torch.randn(1, num_query, 20, generator=generator).to(DEVICE, dtype).expand(2, -1, -1),
        torch.randn(2, num_query, 20, generator=generator).to(DEVICE, dtype),
        ids if axes is None else torch.stack([ids + 1000 * axis for axis in range(axes)]),
        visual_index,
        num_visual // 3,
        torch.tensor([num_visual // 2, 2 * num_query], device=DEVICE) if ragged else None,
        rows,
        mask if masked else None,
        row_lse(query, key, rows, mask) if with_lse else None,
        None,
        num_query + 3,
        name,
        None if neighbours is None else neighbours[:2],
        per_region,
        order,
    )


def assert_pruned(case: Prompts, result: tuple[Tensor, ...]) -> None:
    """Compare scores with float64, and all that follows from them exactly."""
    *rows, index, scores = result
    exact = importance_reference.visual_importance(
        case.query.double(),
        case.key.double(),
        case.visual_index,
        case.rows,
        case.attention_mask,
        None,
        case.scale,
    )
    torch.testing.assert_close(scores.double(), exact, rtol=rounding_of_scores(case.query), atol=1e-7)
    num_query, num_keys = case.query.shape[2], case.key.shape[2]
    mask = None if case.attention_mask is None else case.attention_mask[:, num_keys - num_query :]
    selection = (scores, case.visual_index, case.keep, case.counts, mask, num_query, case.length, *case[14:])
    assert torch.equal(index, prune_reference.surviving_rows(*selection))
    expected = prune_reference.gather_rows(case.hidden_states, case.cos, case.sin, case.position_ids, index)
    assert all(torch.equal(row, wanted) for row, wanted in zip(rows, expected, strict=True))


@pytest.mark.parametrize("ticket", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        {"num_query": 65, "num_keys": 600, "masked": True},  # several splits of the keys
        {
            "heads": (7, 1),
            "num_query": 200,
            "num_keys": 200,
            "num_rows": 9,
            "num_visual": 130,
            "ragged": True,
        },
        {"heads": (2, 2), "num_rows": 16, "with_lse": True, "axes": 3, "masked": True},
        {"heads": (3, 3), "num_query": 17, "num_keys": 17, "head_dim": 8, "num_visual": 16, "channels": 4100},
        {
            "heads": (1, 1),
            "num_query": 300,
            "num_keys": 300,
            "axes": 3,
            "channels": 8,
        },  # several rows of a program
        {"heads": (2, 1), "head_dim": 72, "num_rows": 3, "ragged": True, "masked": True, "with_lse": True},
        {"num_query": 65, "masked": True, "coverage": "region", "num_visual": 60, "ragged": True},
        {"heads": (2, 1), "num_rows": 9, "coverage": "two of each region"},
        {"heads": (2, 1), "num_rows": 20, "masked": True, "coverage": "stride", "ragged": True},
    ],
    ids=lambda shape: "-".join(shape),
)
def test_prune_in_one_launch(
    shape: dict[str, Any], dtype: torch.dtype, ticket: bool, generator: torch.Generator
) -> None:
    if ticket and DEVICE == "cpu" and dtype != torch.float32:
        pytest.skip("the interpreter runs programs in order: drawing numbers has been tried with float32")
    case = prompts(generator, dtype=dtype, **shape)
    result = one_launch.prune_tokens(*case, ticket=ticket)
    assert_pruned(case, result)
    again = one_launch.prune_tokens(*case, ticket=ticket)
    assert all(torch.equal(left, right) for left, right in zip(result, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {"num_query": 65, "num_keys": 600, "masked": True, "axes": 3},
        {
            "heads": (6, 2),
            "num_query": 150,
            "num_keys": 150,
            "num_rows": 9,
            "num_visual": 130,
            "ragged": True,
        },
        {"heads": (2, 2), "num_rows": 16, "with_lse": True, "coverage": "region"},
    ],
    ids=lambda shape: "-".join(shape),
)
def test_several_launches_give_what_one_gives(
    shape: dict[str, Any], dtype: torch.dtype, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit in the interpreter. A GPU adds up the values of a tile in an order that depends on its shape."""
    case = prompts(generator, dtype=dtype, **shape)._replace(length=shape.get("num_query", 50))
    launched: list[object] = []
    launch = one_launch.launch
    monkeypatch.setattr(
        one_launch, "launch", lambda *rest, **options: launched.append(launch(*rest, **options))
    )
    results = []
    with gap_kernels.backend("triton"):
        for one in (True, False):
            monkeypatch.setattr(one_launch, "is_likely_faster", lambda programs, device, one=one: one)
            results.append(op.prune_tokens_op(*case))
            assert_pruned(case, results[-1])
    assert len(launched) == 1
    if DEVICE == "cpu":
        assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("dtype", "heads", "head_dim", "num_rows", "stored"),
    [
        (torch.float16, (7, 1), 128, 2, True),
        (torch.float16, (7, 1), 128, 3, False),
        (torch.bfloat16, (7, 1), 64, None, True),
        (torch.bfloat16, (8, 1), 64, None, False),
        (torch.float16, (8, 1), 80, None, True),
        (torch.bfloat16, (3, 1), 80, 3, False),
        (torch.bfloat16, (14, 14), 96, 10, True),  # more rows of all heads than one block
        (torch.bfloat16, (2, 2), 96, 11, False),
        (torch.bfloat16, (4, 2), 256, 14, True),
        (torch.bfloat16, (4, 2), 256, 15, False),
        (torch.float32, (7, 1), 128, 4, True),  # two tiles of rows
        (torch.float32, (7, 1), 128, 5, False),
    ],
)
def test_few_rows_store_their_logits(
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    num_rows: int | None,
    stored: bool,
    generator: torch.Generator,
) -> None:
    """On either side of the border, with padding, filler, several splits of the keys, and a count for each sample."""
    case = prompts(
        generator, heads, 140, 160, head_dim, num_rows, 130, dtype, ragged=True, masked=True, channels=8
    )
    case = case._replace(length=90)
    rows_of_key_head = heads[0] // heads[1] * (num_rows or 1)
    assert importance.stores_logits(rows_of_key_head, 160, 130, head_dim, dtype) == stored
    scoring = (case.query, case.key, case.visual_index, case.rows, case.attention_mask)
    scores = importance.visual_importance(*scoring, None, None)
    result = one_launch.prune_tokens(*case)
    assert_pruned(case, result)
    if DEVICE == "cpu":  # where sums don't depend on the number of warps
        assert torch.equal(result[5], scores)
    assert_accurate(scores, result[5].double(), case.query)
    again = one_launch.prune_tokens(*case)
    assert all(torch.equal(left, right) for left, right in zip(result, again, strict=True))


@pytest.mark.parametrize("num_rows", [None, 20])
def test_nan_logits_make_nan_scores(num_rows: int | None, generator: torch.Generator) -> None:
    """Of what the rows see of a key that is NaN; a key that the mask excludes is never looked at."""
    case = prompts(generator, num_keys=50, num_rows=num_rows)
    mask = torch.ones(2, 50, dtype=torch.bool, device=DEVICE)
    mask[0, 3], case.key[0, :, 3], case.key[1, :, 0] = False, math.nan, math.nan
    scores = one_launch.prune_tokens(*case._replace(attention_mask=mask))[5]
    exact = importance_reference.visual_importance(*case[:2], case.visual_index, case.rows, mask, None, None)
    assert torch.equal(scores.isnan(), exact.isnan())
    assert scores.isnan().any(-1).tolist() == [False, True]


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter tells which counters are used")
@pytest.mark.parametrize(
    "shape", [{"num_keys": 50}, {"num_rows": 20}, {"with_lse": True}], ids=["stored", "swept", "lse"]
)
def test_counters_that_are_waited_for_have_a_line_to_themselves(
    shape: dict[str, Any], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, set[int]] = {"wait": set(), "announce": set()}

    def recorded(name: str, function: Any) -> Any:
        def call(counter: Any, *rest: Any) -> Any:
            used[name].add(int(counter.handle.data.item()))
            return function(counter, *rest)

        return call

    for module in (one_launch, importance):
        for name in used:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    held = torch.zeros(4000, dtype=torch.int32)
    start = -held.data_ptr() % 128 // 4
    monkeypatch.setattr(one_launch, "counters", lambda device, count: held[start : start + count])
    one_launch.prune_tokens(*prompts(generator, heads=(6, 3), **shape), ticket=True)
    assert used["wait"]
    lines = [address // 128 for address in used["wait"] | used["announce"]]
    assert all(lines.count(address // 128) == 1 for address in used["wait"])
    assert held.data_ptr() // 128 not in {address // 128 for address in used["wait"]}


@pytest.mark.parametrize("ticket", [False, True])
def test_launches_leave_their_counters_at_zero(
    ticket: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = torch.zeros(1000, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(one_launch, "counters", lambda device, count: held[:count])
    for shape in (
        {"num_keys": 50},
        {"heads": (6, 3), "num_visual": 7, "num_rows": 20},
        {"with_lse": True},
        {"num_keys": 50},
    ):
        case = prompts(generator, **shape)
        assert_pruned(case, one_launch.prune_tokens(*case, ticket=ticket))
        assert not held.any()


@pytest.mark.parametrize("num_rows", [0, None])
@pytest.mark.parametrize("num_visual", [0, 9])
def test_prune_in_one_launch_with_nothing_to_score(
    num_rows: int | None, num_visual: int, generator: torch.Generator
) -> None:
    case = prompts(generator, num_query=33, num_visual=num_visual, num_rows=num_rows, masked=True)
    assert_pruned(case, one_launch.prune_tokens(*case))


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_prune_in_one_launch_of_anything(data: st.DataObject) -> None:
    key_heads = data.draw(st.integers(1, 3))
    num_query = data.draw(st.integers(1, 40))
    case = prompts(
        torch.Generator().manual_seed(data.draw(st.integers(0, 99))),
        (key_heads * data.draw(st.integers(1, 3)), key_heads),
        num_query,
        num_query + data.draw(st.integers(0, 30)),
        data.draw(st.sampled_from([3, 8, 16, 20])),
        data.draw(st.none() | st.integers(0, 18)),
        data.draw(st.integers(0, num_query)),
        axes=data.draw(st.none() | st.integers(1, 4)),
        ragged=data.draw(st.booleans()),
        masked=data.draw(st.booleans()),
        with_lse=data.draw(st.booleans()),
        channels=data.draw(st.integers(1, 40)),
        coverage=data.draw(st.sampled_from(["topk", "region", "two of each region", "stride"])),
    )
    case = case._replace(
        keep=data.draw(st.integers(0, 50)),
        scale=data.draw(st.none() | st.just(0.3) if case.lse is None else st.none()),
    )
    assert_pruned(case, one_launch.prune_tokens(*case, ticket=data.draw(st.booleans())))


@pytest.mark.parametrize(("dtype", "longest"), [(torch.float32, 4096), (torch.float16, 8192)])
def test_the_longest_prompt_of_one_launch(dtype: torch.dtype, longest: int) -> None:
    query = torch.empty(1, 1, longest + 1, 1, dtype=dtype, device=DEVICE)
    for coverage in ("topk", "region"):
        assert one_launch.applies(query[:, :, :-1], 9, coverage)
        assert not one_launch.applies(query, 9, coverage)
    assert one_launch.applies(query[:, :, :4096], 9, "stride")
    assert not one_launch.applies(query[:, :, :4097], 9, "stride")


def test_prompts_too_long_for_one_launch(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_launch, "MAX_ROWS", 64)
    monkeypatch.setattr(one_launch, "prune_tokens", None)
    case = prompts(generator, masked=True, ragged=True)._replace(length=60)
    assert_pruned(case, torch.ops.gap_kernels.prune_tokens(*case))


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "num_query", "num_keys", "head_dim", "causal"),
    [
        ((4, 2), 150, 217, 80, True),  # several tiles of rows and keys, whole ones and those on the diagonal
        ((2, 1), 67, 67, 256, True),  # shorter key tiles than row tiles
        ((2, 2), 1, 130, 64, True),  # one row that sees all
        ((3, 1), 130, 150, 8, False),  # head_dim below the smallest tile
    ],
)
def test_attention(
    dtype: torch.dtype,
    heads: tuple[int, int],
    num_query: int,
    num_keys: int,
    head_dim: int,
    causal: bool,
    generator: torch.Generator,
) -> None:
    num_rows, num_visual = min(num_query, 5), num_query // 2
    query, key, columns, rows, mask = importance_case(
        generator, heads, num_query, num_keys, head_dim, num_rows, num_visual
    )
    value = torch.randn(key.shape, generator=generator).to(DEVICE, dtype)
    query, key = query.to(dtype), key.to(dtype)
    # Heads beside positions in memory, as projections leave them.
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    mask[1, : num_keys - num_query + 3] = False  # padding on the left, so that some rows see nothing
    for chosen in (mask, None):
        result = attention.attention(query, key, value, causal, chosen, None, rows, columns)
        exact = attention_reference.attention(
            query.double(), key.double(), value.double(), causal, chosen, None, rows, columns
        )
        rounding = ROUNDING[dtype]
        torch.testing.assert_close(result[0].double(), exact[0], rtol=rounding, atol=rounding)
        sums = rounding_of_scores(query)
        torch.testing.assert_close(result[1].double(), exact[1], rtol=sums, atol=sums)
        torch.testing.assert_close(result[2].double(), exact[2], rtol=sums, atol=1e-7)
    again = attention.attention(query, key, value, causal, None, None, rows, columns)
    assert all(torch.equal(left, right) for left, right in zip(result, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "num_tokens", "head_dim", "causal", "bounds"),
    [
        ((2, 1), 100, 80, False, None),  # several tiles of rows and keys
        ((1, 1), 150, 64, True, None),
        ((2, 1), 150, 128, False, [0, 5, 64, 64, 131, 150]),  # sequences within and across tiles
        ((1, 1), 150, 8, True, [0, 70, 150]),
        ((1, 1), 70, 256, False, [2, 5, 999]),  # only the CPU checks bounds: tokens in no sequence get 0
    ],
)
def test_received(
    dtype: torch.dtype,
    heads: tuple[int, int],
    num_tokens: int,
    head_dim: int,
    causal: bool,
    bounds: list[int] | None,
    generator: torch.Generator,
) -> None:
    batch = 2 if bounds is None else 1
    query = torch.randn(batch, num_tokens, heads[0], head_dim, generator=generator).to(DEVICE, dtype)
    query = query.transpose(1, 2)  # heads beside positions in memory, as projections leave them
    key = torch.randn(batch, heads[1], num_tokens, head_dim, generator=generator).to(DEVICE, dtype)
    packed = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    mask = (torch.rand(batch, num_tokens, generator=generator) < 0.9).to(DEVICE)
    mask[0, :66] &= bounds is not None  # a tile of padding
    for chosen in (mask, None):
        arguments = (chosen, packed, causal, None)
        scores = received.attention_received(query, key, *arguments, None)
        exact = received_reference.attention_received(query.double(), key.double(), *arguments, None)
        assert_accurate(scores, exact, query)
    assert torch.equal(scores, received.attention_received(query, key, *arguments, None))
    if bounds is None:
        lse = attention.attention(query, key, key, causal, None, None, None, None)[1]
        assert_accurate(received.attention_received(query, key, *arguments, lse), exact, query)


@pytest.mark.parametrize(
    ("dtype", "similarity_dtype"),
    [*((dtype, dtype) for dtype in DTYPES), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
)
@pytest.mark.parametrize(
    ("grid", "channels", "length", "num_anchors", "radius", "self_weight", "with_pillars"),
    [
        ((9, 8), 140, 72, 35, 6.0, 1.0, True),  # several tiles of anchors, patches and channels
        ((8, 8), 128, 128, 32, 4.5, None, False),  # whole tiles, several chunks of the similarity vectors
        ((1, 65), 33, 5, 7, 3.0, 0.5, False),  # a single row; vectors below the smallest tile
        ((65, 1), 16, 16, 1, 100.0, None, True),
    ],
)
def test_aggregate(
    dtype: torch.dtype,
    similarity_dtype: torch.dtype,
    grid: tuple[int, int],
    channels: int,
    length: int,
    num_anchors: int,
    radius: float,
    self_weight: float | None,
    with_pillars: bool,
    generator: torch.Generator,
) -> None:
    num_patches = grid[0] * grid[1]
    features = torch.randn(2, num_patches, channels, generator=generator).to(DEVICE, dtype)
    # Patches of a longer sequence, as a vision tower leaves them behind its CLS token.
    similarity = torch.randn(2, num_patches + 1, length, generator=generator) + 0.2
    similarity[:, ::4, length // 2 :] = 0.0  # norms must not be those of the last chunk
    similarity = similarity.to(DEVICE, similarity_dtype)[:, 1:]
    anchors = torch.stack([torch.randperm(num_patches, generator=generator)[:num_anchors] for _ in range(2)])
    anchors = anchors.sort(-1).values
    anchors[1, : num_anchors // 3] = -1
    anchors = anchors.to(DEVICE)
    pillars = (torch.rand(2, num_anchors, generator=generator) < 0.4).to(DEVICE) if with_pillars else None
    arguments = (anchors, grid[1], radius, pillars, self_weight)
    collected = aggregate.spatial_aggregate(features, similarity, *arguments)
    exact = aggregate_reference.spatial_aggregate(features.double(), similarity.double(), *arguments)
    assert collected.dtype == dtype
    rounding = ROUNDING[dtype]
    torch.testing.assert_close(collected.double(), exact, rtol=rounding, atol=rounding)
    assert (collected[anchors < 0] == 0).all()
    assert torch.equal(collected, aggregate.spatial_aggregate(features, similarity, *arguments))


def test_aggregate_by_the_scores_of_anchors(generator: torch.Generator) -> None:
    """Tiles of anchors that are not full, ties and NaN; scores of a longer row, as the attention of a CLS token has them."""
    features = torch.randn(2, 40, 5, generator=generator).to(DEVICE)
    anchors = torch.stack([torch.randperm(40, generator=generator)[:35] for _ in range(2)]).to(DEVICE)
    anchors[1, ::3], anchors[0, 5] = -1, 999
    scores = special_scores(2, 41, generator)[:, 1:]
    real = anchors.masked_fill(anchors == 999, -1)
    for share, of_shares in ((11, 20), (123456789, 10**9), (1, 1)):
        given_scores = (10, 1.0, None, 0.5, scores, share, of_shares)
        found = aggregate.spatial_aggregate(features, features, anchors, *given_scores)
        expected = aggregate_reference.spatial_aggregate(features, features, real, *given_scores)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_aggregate_with_nan_across_tiles(dtype: torch.dtype, generator: torch.Generator) -> None:
    features = torch.randn(1, 140, 70, generator=generator).to(DEVICE, dtype)
    similarity = torch.randn(1, 140, 20, generator=generator).to(DEVICE, dtype)
    similarity[0, 130, 19] = math.nan
    features[0, 10, 65] = math.nan
    anchors = torch.tensor([[-1, *range(0, 140, 5), 999]], device=DEVICE)  # only the CPU checks their range
    pillars = anchors % 2 == 0
    arguments = (10, 6.0, pillars, 1.0)
    collected = aggregate.spatial_aggregate(features, similarity, anchors, *arguments)
    expected = aggregate_reference.spatial_aggregate(
        features, similarity, anchors.masked_fill(anchors == 999, -1), *arguments
    )
    assert torch.equal(collected.isnan(), expected.isnan())
    spoiled = collected.isnan().sum(-1)[0]
    assert {0, 1, 70} == set(spoiled.tolist())
    assert spoiled[[0, -1]].tolist() == [0, 0]
    torch.testing.assert_close(
        collected, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype], equal_nan=True
    )


def test_aggregate_in_blocks_of_anchors(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a few anchors at a time, as where all of them would take too much memory."""
    features = torch.randn(2, 70, 24, generator=generator).to(DEVICE)
    anchors = torch.stack([torch.randperm(70, generator=generator)[:37] for _ in range(2)]).to(DEVICE)
    anchors[0, 5] = -1
    pillars = anchors % 3 == 0
    given = (features, features, anchors, 10, 4.0, pillars, 0.5)
    whole = aggregate.spatial_aggregate(*given)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 2 * 80 * 18)
    launched = launches(monkeypatch)
    assert torch.equal(aggregate.spatial_aggregate(*given), whole)
    assert [name for name, _ in launched] == ["spatial_weights_kernel", "spatial_aggregate_kernel"] * 3


def test_each_cosine_is_computed_once(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many channels are collected by it, and so tiles of them."""
    similarity = torch.randn(1, 64, 16, generator=generator).to(DEVICE)
    anchors = torch.arange(20, device=DEVICE)[None]
    launched = launches(monkeypatch)
    for channels in (16, 512):
        features = torch.randn(1, 64, channels, generator=generator).to(DEVICE)
        aggregate.spatial_aggregate(features, similarity, anchors, 8, 4.0, None, 1.0)
    grids = [grid for name, grid in launched if name == "spatial_weights_kernel"]
    chosen = tiles.spatial_weights(torch.float32)
    assert grids == [(-(-20 // chosen.rows) * (64 // chosen.columns),)] * 2


def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Return what will hold the name and grid of every launch of aggregation."""
    launched: list[tuple[str, tuple[int, ...]]] = []
    launch = aggregate.launch

    def noted(kernel: Any, grid: tuple[int, ...], *rest: Any, **options: Any) -> None:
        launched.append((kernel.__name__, grid))
        launch(kernel, grid, *rest, **options)

    monkeypatch.setattr(aggregate, "launch", noted)
    return launched


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", ["max_min", "determinant", "coverage_gain"])
def test_greedy(rule: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Several tiles of tokens, more than one part of each vector, NaN, zeros and duplicates, a count each."""
    tokens, channels, k = 67, 150, 19  # rows of the factor: 16 at a time
    features = torch.randn(2, tokens + 1, channels, generator=generator).to(DEVICE, dtype)[:, 1:]
    features[0, 7, 149], features[0, 66, 3], features[1, 5] = math.nan, math.inf, 0.0
    features[1, 60:] = features[1, :7]
    mask = (torch.rand(2, tokens, generator=generator) < 0.9).to(DEVICE)
    scores = None if rule == "max_min" else torch.rand(2, tokens, generator=generator).to(DEVICE)
    counts = torch.tensor([k, k // 2], device=DEVICE)
    for arguments in (
        (features, scores, None, rule, 1.0, 4, None, 4),
        (features, scores, mask, rule, 0.5, 0, counts, k + 2),
    ):
        expected = greedy_reference.greedy_indices(features.double(), *arguments[1:])
        assert torch.equal(greedy.greedy_indices(*arguments), expected)


def test_greedy_by_coverage_of_many_tokens(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters and copies, so that old gains rarely still hold; more columns than a tile has; samples in blocks of one.

    And where there are too many cosines to store them: the same.
    """
    tokens = 270
    centers = torch.randn(12, 24, generator=generator)
    which = torch.randint(12, (2, tokens), generator=generator)
    features = (centers[which] + 0.3 * torch.randn(2, tokens, 24, generator=generator)).to(DEVICE)
    features[0, 250:] = features[0, :20]
    features[1, 3], features[1, 4] = 0.0, math.nan
    scores = torch.rand(2, tokens, generator=generator).to(DEVICE)
    mask = (torch.rand(2, tokens, generator=generator) < 0.9).to(DEVICE)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", tokens * tokens)
    for score, k in ((None, 16), (scores, 12)):
        expected = greedy_reference.greedy_indices(
            features.double(), score, mask, "coverage_gain", 1.0, k, None, k
        )
        found = greedy.greedy_indices(features, score, mask, "coverage_gain", 1.0, k, None, k)
        assert torch.equal(found, expected)
    few = features[:1, :40], None, None, "coverage_gain", 1.0, 3, None, 3
    expected = greedy_reference.greedy_indices(few[0].double(), *few[1:])
    monkeypatch.setattr(greedy, "MOST_COSINES", 40 * 40 - 1)
    assert torch.equal(greedy.greedy_indices(*few), expected)


def test_greedy_beyond_what_can_be_chosen() -> None:
    """Counts that only the CPU checks: a GPU clamps them. NaN comes last, in a tile of its own too."""
    features = torch.eye(3, device=DEVICE).repeat(5, 1, 1)
    features[:, 0] = math.nan
    counts = torch.tensor([9, -2, 3, 2**40, -(2**40)], device=DEVICE)
    index = greedy.greedy_indices(features, None, None, "determinant", 1.0, 0, counts, 2)
    assert index.tolist() == [[1, 2], [-1, -1], [1, 2], [1, 2], [-1, -1]]
    index = greedy.greedy_indices(features, None, None, "max_min", 1.0, 0, counts, 4)
    every = [-1, 0, 1, 2]
    assert index.tolist() == [every, [-1] * 4, every, every, [-1] * 4]


def test_distinct(generator: torch.Generator) -> None:
    """Several tiles of tokens and of both halves; NaN and zeros; samples in two blocks."""
    features = torch.randn(1, 290, 20, generator=generator).to(DEVICE, torch.bfloat16)
    features[0, 7, 9], features[0, 90, 3], features[0, 5] = math.nan, math.inf, 0.0
    scores = torch.rand(1, 290, generator=generator).to(DEVICE)
    scores[0, 33], scores[0, 40:45] = math.nan, 0.5
    expected = similarity_reference.distinct_indices(features.double(), scores, 20, 10, 61)
    assert torch.equal(similarity.distinct_indices(features, scores, 20, 10, 61), expected)
    features, scores = features.view(10, 29, 20)[:3], scores.view(10, 29)[:3]
    expected = similarity_reference.distinct_indices(features.double(), scores, 9, 2, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", 2 * 27 * 29)
        assert torch.equal(similarity.distinct_indices(features, scores, 9, 2, 8), expected)


@pytest.mark.parametrize(("tokens", "num_pivots"), [(1100, 4), (40, 19)])
def test_least_similar(tokens: int, num_pivots: int, generator: torch.Generator) -> None:
    """More tokens than are written at a time, more pivots than a tile has; NaN, filler, a mask, a count each."""
    features = torch.randn(2, tokens, 20, generator=generator).to(DEVICE, torch.bfloat16)
    features[0, 7, 9], features[1, 30, 3], features[1, 5] = math.nan, math.inf, 0.0
    pivots = torch.rand(2, tokens, generator=generator).argsort(1)[:, :num_pivots].to(DEVICE)
    pivots[0, ::4] = -1
    mask = (torch.rand(2, tokens, generator=generator) < 0.9).to(DEVICE)
    counts = torch.tensor([tokens // 4, 30], device=DEVICE)
    arguments = pivots, mask, 0, counts, max(30, tokens // 4) + 2
    expected = similarity_reference.least_similar_indices(features.double(), *arguments)
    assert torch.equal(similarity.least_similar_indices(features, *arguments), expected)


def test_least_similar_beyond_what_can_be_chosen() -> None:
    """Counts that only the CPU checks: a GPU clamps them."""
    features = torch.eye(3, device=DEVICE).repeat(4, 1, 1)
    pivots = torch.tensor([[2, -1]] * 4, device=DEVICE)
    counts = torch.tensor([9, -2, 2**40, -(2**40)], device=DEVICE)
    index = similarity.least_similar_indices(features, pivots, None, 0, counts, 2)
    assert index.tolist() == [[0, 2], [-1, -1], [0, 2], [-1, -1]]
    index = similarity.least_similar_indices(features, pivots, None, 0, counts, 4)
    every = [-1, 0, 1, 2]
    assert index.tolist() == [every, [-1] * 4, every, [-1] * 4]


def test_choices_launch_kernels_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or what counts as one operator would be a dozen launches on a GPU."""
    launched: list[str] = []
    for module in (greedy, greedy_coverage, merge, similarity):
        monkeypatch.setattr(
            module, "launch", lambda kernel, *rest, **options: launched.append(kernel.__name__)
        )
    features, scores = torch.zeros(2, 40, 8, device=DEVICE), torch.zeros(2, 40, device=DEVICE)
    pivots, mask, counts = scores[:, :4].long(), scores > 0, scores[:, 0].long()
    choices = {
        ("prepare", "pairs", "choose"): partial(
            greedy.greedy_indices, features, None, mask, "max_min", 1.0, 0, counts, 9
        ),
        ("prepare", "choose"): partial(
            greedy.greedy_indices, features, scores, mask, "determinant", 1.0, 9, None, 9
        ),
        ("prepare", "pairs", "cover"): partial(
            greedy.greedy_indices, features, scores, None, "coverage_gain", 1.0, 9, None, 9
        ),
        ("rest", "cosines", "remove"): partial(similarity.distinct_indices, features, scores, 9, 4, 8),
        ("cosines", "least_similar"): partial(
            similarity.least_similar_indices, features, pivots, mask, 0, counts, 9
        ),
    }
    for kernels, choose in choices.items():
        launched.clear()
        operators = latency.count(choose, torch.device("cpu")).operators
        assert [name.removesuffix("_kernel") for name in launched] == list(kernels)
        assert set(operators) <= {"clone"}, kernels  # of what isn't contiguous
