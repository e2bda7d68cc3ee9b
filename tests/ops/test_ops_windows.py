"""Ranks by windows: against loops in Python, by hand, and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gap_kernels import window_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from support.naive.windows import ranks
from torch import Tensor
from torch.library import opcheck

OP = torch.ops.gap_kernels.window_ranks.default
NAN, INF = math.nan, math.inf
SCORE = st.one_of(st.sampled_from([0.0, -0.0, 1.0, INF, -INF, NAN]), st.floats(-4, 4, width=32))
SIDE = st.integers(1, 9)


def expected(scores: Tensor, earlier: Tensor, grid: tuple[int, int], count: int, windows: int = 4) -> Tensor:
    rows = zip(scores.tolist(), earlier.tolist(), strict=True)
    return torch.stack([ranks(*each, grid, count, windows) for each in rows])


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_against_loops(data: st.DataObject) -> None:
    grid = data.draw(st.tuples(SIDE, SIDE))
    cells = grid[0] * grid[1]
    line = st.lists(SCORE, min_size=cells, max_size=cells)
    scores, earlier = (torch.tensor([data.draw(line), data.draw(line)]) for _ in range(2))
    count, windows = data.draw(st.integers(0, cells + 1)), data.draw(st.integers(1, 10))
    found = window_ranks(scores, earlier, grid, count, windows=windows)
    assert torch.equal(found, expected(scores, earlier, grid, count, windows))


def test_by_hand() -> None:
    """Of 3 x 4 tokens in 2 x 2 windows, two of each for six: the third best of the first window waits."""
    earlier = torch.tensor([[9, 8, 1, 2], [7, 0, 3, 4], [5, 6, NAN, -1]])
    scores = torch.arange(12.0).view(1, 12)
    found = window_ranks(scores, earlier.view(1, 12), (3, 4), 6, windows=2)
    # Rows 0 and 1 are those of the upper windows: 9, 8 and 4, 3 enter, and of the lower ones all.
    assert found.isinf().view(3, 4).tolist() == [
        [True, True, False, False],
        [False, False, True, True],
        [True, True, False, False],
    ]
    assert found[0, [2, 3, 4, 5, 10, 11]].tolist() == [2, 3, 4, 5, 10, 11]


def test_what_is_no_number() -> None:
    """Infinity is below what comes first, and NaN below all numbers."""
    scores = torch.tensor([[INF, NAN, -INF, 0.0]])
    found = window_ranks(scores, torch.tensor([[NAN, 0, 0, 1.0]]), (1, 4), 1)
    assert found.tolist() == [[torch.finfo(torch.float32).max, -INF, -INF, INF]]
    assert window_ranks(scores, scores, (1, 4), 0).tolist() == [
        [torch.finfo(torch.float32).max, -INF, -INF, 0]
    ]
    assert window_ranks(scores, scores, (1, 4), 9).tolist() == [[INF] * 4]


def test_strided_scores() -> None:
    """Rows of longer ones, as the attention of a CLS token has them, and columns of others."""
    both = torch.rand(2, 13)
    for scores in (both[:, 1:], both.t().contiguous().t()[:, 1:]):
        found = window_ranks(scores, scores.flip(1), (3, 4), 5)
        assert torch.equal(found, expected(scores, scores.flip(1), (3, 4), 5))


def test_opcheck_and_no_gradient() -> None:
    scores, earlier = torch.rand(2, 12), torch.rand(2, 12)
    opcheck(OP, (scores, earlier, 3, 4, 5, 2))
    with pytest.raises(RuntimeError, match=r"gap_kernels\.window_ranks has no gradient"):
        window_ranks(scores.requires_grad_(), earlier, (3, 4), 5).sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.ones(12)}, r"scores: expected 2 dimensions \[B, N\], got shape \[12\]"),
        ({"scores": torch.ones(2, 12).half()}, "scores: expected dtype torch.float32, got"),
        ({"earlier": torch.ones(2, 11)}, r"earlier: expected \[B, N\] with N = 12, got shape \[2, 11\]"),
        ({"grid": (3, 5)}, r"grid: expected H \* W = 12 \(N of scores\), got \(3, 5\)"),
        ({"grid": 12}, "grid: expected two ints >= 1, got 12"),
        ({"count": -1}, r"count: expected an int >= 0, got -1 \(int\)"),
        ({"count": 2.0}, r"count: expected an int >= 0, got 2.0 \(float\)"),
        ({"windows": 0}, "windows: expected an int >= 1, got 0"),
        ({"windows": None}, "windows: expected an int >= 1, got None"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    given = {"scores": torch.ones(2, 12), "earlier": torch.ones(2, 12), "grid": (3, 4), "count": 5}
    with pytest.raises(ValueError, match=message):
        window_ranks(**given | change)
