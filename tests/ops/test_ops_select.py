"""Exact, ordered top-k against a Python sort."""

from __future__ import annotations

import math

import pytest
import torch
from gap_kernels import topk_indices
from hypothesis import given, settings
from hypothesis import strategies as st
from support.naive.select import fill, oracle
from torch._subclasses.fake_tensor import FakeTensorMode

NAN, INF = math.nan, math.inf


# Exact in float32: the oracle would tell floats apart that are equal there.
SMALLEST, LARGEST = 2.0**-149, (2 - 2**-23) * 2.0**127
SCORE = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, INF, -INF, NAN, SMALLEST, LARGEST]),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[float]], list[int], int, int]:
    n = draw(st.integers(0, 24))
    batch = draw(st.integers(1, 3))
    scores = draw(st.lists(st.lists(SCORE, min_size=n, max_size=n), min_size=batch, max_size=batch))
    counts = draw(st.lists(st.integers(0, n), min_size=batch, max_size=batch))
    return scores, counts, draw(st.integers(0, n)), draw(st.integers(0, 3))


@settings(deadline=None)
@given(batches())
def test_matches_a_sort(case: tuple[list[list[float]], list[int], int, int]) -> None:
    scores, counts, k, extra = case
    tensor = torch.tensor(scores, dtype=torch.float32).reshape(len(scores), -1)
    assert topk_indices(tensor, k).tolist() == [oracle(row, k) for row in scores]

    expected = [oracle(row, count) for row, count in zip(scores, counts, strict=True)]
    ragged = topk_indices(tensor, torch.tensor(counts))
    assert ragged.tolist() == [fill(row, max(counts)) for row in expected]

    length = max(counts) + extra
    padded = topk_indices(tensor, torch.tensor(counts), length=length)
    assert padded.tolist() == [fill(row, length) for row in expected]


@pytest.mark.parametrize(
    ("scores", "k", "expected"),
    [
        ([3.0, 1.0, 2.0], 2, [0, 2]),
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]),
        ([-0.0, 0.0, -0.0, 0.0], 3, [0, 1, 2]),
        ([0.0, 5.0, -0.0], 2, [0, 1]),
        ([NAN, -INF, NAN, 1.0], 2, [1, 3]),
        ([NAN, -INF, NAN, 1.0], 3, [0, 1, 3]),
        ([NAN, NAN, NAN], 2, [0, 1]),
        ([-3.0, -1.0, -2.0], 1, [1]),
        ([INF, INF, 1.0], 1, [0]),
        ([2.0, 1.0], 0, []),
        ([2.0, 1.0], 2, [0, 1]),
    ],
)
def test_order_and_ties(scores: list[float], k: int, expected: list[int]) -> None:
    assert topk_indices(torch.tensor([scores]), k).tolist() == [expected]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    scores = torch.zeros(shape)
    index = topk_indices(scores, 0)
    assert index.shape == (shape[0], 0)
    assert index.dtype == torch.int64
    counts = torch.zeros(shape[0], dtype=torch.int64)
    assert topk_indices(scores, counts).shape == (shape[0], 0)
    assert topk_indices(scores, counts, length=3).tolist() == [[-1, -1, -1]] * shape[0]


def test_length_may_exceed_the_number_of_scores() -> None:
    assert topk_indices(torch.tensor([[1.0, 2.0]]), 2, length=4).tolist() == [[-1, -1, 0, 1]]


def test_strided_scores() -> None:
    scores = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(topk_indices(scores.T, 4), topk_indices(scores.T.contiguous(), 4))


SCORES = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((SCORES.half(), 1), {}, r"scores: expected dtype torch.float32, got shape \[2, 3\], torch.float16"),
        ((SCORES[0], 1), {}, r"scores: expected 2 dimensions \[B, N\], got shape \[3\]"),
        (([1.0], 1), {}, r"scores: expected a tensor \[B, N\], got \[1.0\] \(list\)"),
        ((SCORES, 4), {}, r"k: expected 0..3 \(N of scores\), got 4"),
        ((SCORES, -1), {}, "k: expected a count >= 0, got -1"),
        ((SCORES, 0.5), {}, r"k: expected an int or an int64 tensor \[B\], got 0.5 \(float\)"),
        ((SCORES, True), {}, r"k: expected an int or an int64 tensor \[B\], got True"),
        ((SCORES, torch.tensor([1, 2, 3])), {}, r"k: expected \[B\] with B = 2, got shape \[3\]"),
        ((SCORES, torch.tensor([1.0, 2.0])), {}, "k: expected dtype torch.int64, got .*float32"),
        ((SCORES, torch.tensor([1, 4])), {}, "k: expected values in 0..3, got 4"),
        ((SCORES, torch.tensor([-2, 1])), {}, "k: expected values in 0..3, got -2"),
        ((SCORES, 2), {"length": 1}, "length: expected at least 2, got 1"),
        ((SCORES, torch.tensor([1, 3])), {"length": 2}, "length: expected at least the largest k, 3, got 2"),
        ((SCORES, 2), {"length": 2.0}, r"length: expected an int or None, got 2.0 \(float\)"),
        ((SCORES, torch.ones(2, dtype=torch.int64, device="meta")), {}, "k: expected device cpu, got .*meta"),
        ((SCORES, 10**5000), {}, r"k: expected 0..3 \(N of scores\), got an int of 16610 bits"),
        ((SCORES, 2), {"length": 2**24 + 1}, "length: expected at most 16777216, got 16777217"),
        (
            (SCORES.to_sparse(), 1),
            {},
            r"scores: expected a dense tensor \[B, N\], got .*layout torch.sparse_coo",
        ),
        (
            (SCORES.to_mkldnn(), 1),
            {},
            r"scores: expected a dense tensor \[B, N\], got .*layout torch._mkldnn",
        ),
        (
            (torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), 1),
            {},
            r"scores: expected a dense tensor \[B, N\], got a nested tensor, torch.float32, device cpu",
        ),
    ],
)
def test_bad_arguments(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topk_indices(*args, **kwargs)


def test_a_length_is_needed_where_there_are_no_values() -> None:
    message = r"length: the number of columns depends on the values of k; pass length=\.\.\. for tensors without values"
    for kind in (torch.device("meta"), FakeTensorMode()):
        with kind:
            scores, counts = torch.zeros(2, 3), torch.ones(2, dtype=torch.int64)
            with pytest.raises(ValueError, match=message):
                topk_indices(scores, counts)
            assert topk_indices(scores, counts, length=2).shape == (2, 2)
