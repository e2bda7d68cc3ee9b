"""Selection by similarity against a float64 loop over pairs; exact cases; as torch.library objects; its errors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from gap_kernels import blocks, distinct_indices, least_similar_indices
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.naive import similarity as naive
from support.naive.select import fill
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

NAN, INF = math.nan, math.inf
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
OPS = torch.ops.gap_kernels


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(batch: int = 2, tokens: int = 9, channels: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, channels, generator=generator), torch.rand(
        batch, tokens, generator=generator
    )


def drawn_features(data: st.DataObject, most: int) -> tuple[Tensor, Tensor]:
    """Features, some of them zeros or spoiled, and scores with ties and NaN."""
    batch, tokens = data.draw(st.integers(1, 2)), data.draw(st.integers(1, most))
    channels = data.draw(st.integers(0, 6))
    features, scores = inputs(batch, tokens, channels, data.draw(st.integers(0, 999)))
    features = features.to(data.draw(st.sampled_from(DTYPES)))
    if data.draw(st.booleans()):
        features[:, tokens // 2] = 0
    for place in data.draw(st.lists(st.integers(0, tokens - 1), max_size=3)):
        if channels:
            features[0, place, place % channels] = data.draw(st.sampled_from([NAN, INF, -INF]))
    scores[:, tokens // 3] = data.draw(st.sampled_from([NAN, INF, -INF, 0.5]))
    return features, scores if data.draw(st.booleans()) else scores.round(decimals=1)


@settings(deadline=None)
@given(st.data())
def test_duplicates_that_a_loop_removes(data: st.DataObject) -> None:
    features, scores = drawn_features(data, 19)
    k = data.draw(st.integers(0, features.shape[1]))
    important, at_once = data.draw(st.integers(0, k)), data.draw(st.integers(1, 9))
    expected = []
    for sample, row in enumerate(scores.tolist()):
        index, clear = naive.distinct(features[sample], row, k, important, at_once)
        assume(clear > naive.CLEAR)
        expected.append(index)
    found = distinct_indices(features, scores, k, important, removed_at_once=at_once)
    assert found.dtype == torch.int64
    assert found.tolist() == expected


@settings(deadline=None)
@given(st.data())
def test_what_a_loop_finds_least_similar(data: st.DataObject) -> None:
    """With pivots in any order and filler among them, a mask, more to choose than there is, a count each."""
    features, scores = drawn_features(data, 12)
    batch, tokens = scores.shape
    pivots = torch.rand(batch, tokens).argsort(1)[:, : data.draw(st.integers(0, 5))]
    pivots = torch.where(torch.rand(pivots.shape) < 0.2, -1, pivots)
    mask = torch.rand(batch, tokens) < 0.8 if data.draw(st.booleans()) else None
    counts = data.draw(st.lists(st.integers(0, tokens + 2), min_size=batch, max_size=batch))
    expected = []
    for sample, count in enumerate(counts):
        hidden = None if mask is None else mask[sample].tolist()
        index, clear = naive.least_similar(features[sample], pivots[sample].tolist(), count, hidden)
        assume(clear > naive.CLEAR)
        expected.append(index)
    length = min(max(counts), tokens)
    found = least_similar_indices(features, pivots, torch.tensor(counts), mask=mask)
    assert found.dtype == torch.int64
    assert found.tolist() == [fill(row, length) for row in expected]
    found = least_similar_indices(features, pivots, torch.tensor(counts), mask=mask, length=length + 2)
    assert found.tolist() == [fill(row, length + 2) for row in expected]
    found = least_similar_indices(
        features[:1], pivots[:1], counts[0], mask=None if mask is None else mask[:1]
    )
    assert found.tolist() == [fill(expected[0], min(counts[0], tokens))]


# Two pairs that point the same way, and one that no other is like.
PAIRS = [[2.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 3, 0], [0, 0, 1]]


def test_duplicates_by_hand() -> None:
    features, scores = torch.tensor([PAIRS]), torch.tensor([[0.5, 0.4, 0.3, 0.2, 0.1]])
    # Behind the first two by score: 2 and 4 are compared with 3, and 2 is like it.
    assert distinct_indices(features, scores, 4, 2).tolist() == [[0, 1, 3, 4]]
    # 0, 2 and 4 are compared with 1 and 3: 0 goes, then 2, which is as like as 0.
    assert distinct_indices(features, scores, 4, 0, removed_at_once=1).tolist() == [[1, 2, 3, 4]]
    assert distinct_indices(features, scores, 3, 0, removed_at_once=2).tolist() == [[1, 3, 4]]
    # One at a time: behind 0 the order is 2, 4, 1, 3; 2 and 1 are compared with 4 and 3, and 2 goes.
    assert distinct_indices(features, scores, 3, 0, removed_at_once=1).tolist() == [[1, 3, 4]]
    for k in range(6):
        assert distinct_indices(features, scores, k, k).tolist() == [list(range(k))]


def test_least_similar_by_hand() -> None:
    features = torch.tensor([[*PAIRS, [-1.0, 0, 0]]])
    # Opposite to 0 is 5; of those at right angles to 3, the first that is left.
    assert least_similar_indices(features, torch.tensor([[0, 3]]), 4).tolist() == [[0, 1, 3, 5]]
    # The order of pivots counts, and what is left over goes to the later ones.
    assert least_similar_indices(features, torch.tensor([[3, 0]]), 4).tolist() == [[0, 1, 3, 5]]
    assert least_similar_indices(features, torch.tensor([[3, 0]]), 3).tolist() == [[0, 3, 5]]
    assert least_similar_indices(features, torch.tensor([[0, 3]]), 3).tolist() == [[0, 1, 3]]
    # Of more pivots than are wanted the first; without one nothing; filler is none.
    assert least_similar_indices(features, torch.tensor([[0, 4, 3]]), 2).tolist() == [[0, 4]]
    assert least_similar_indices(features, torch.tensor([[-1, -1]]), 2).tolist() == [[-1, -1]]
    assert least_similar_indices(features, torch.tensor([[-1, 0]]), 2).tolist() == [[0, 5]]
    # What is hidden is never chosen, not even as a pivot.
    mask = torch.tensor([[True, True, True, True, True, False]])
    assert least_similar_indices(features, torch.tensor([[0]]), 9, mask=mask).tolist() == [
        [-1, 0, 1, 2, 3, 4]
    ]
    assert least_similar_indices(features, torch.tensor([[5]]), 2, mask=mask).tolist() == [[-1, -1]]


def test_ties_go_to_the_lower_index() -> None:
    same = torch.ones(1, 20, 4)
    assert least_similar_indices(same, torch.tensor([[7, 3]]), 6).tolist() == [[0, 1, 2, 3, 4, 7]]
    # 0, 2 and so on are all as like; the first eight are removed, then the first of 16, 18, 1, 3 and so on.
    scores = torch.linspace(1, 0, 20)[None]
    assert distinct_indices(same, scores, 12, 0).tolist() == [[1, 3, 5, 7, 9, 11, 13, 15, 16, 17, 18, 19]]
    assert distinct_indices(same, torch.zeros(1, 20), 12, 0).tolist() == [
        [1, 3, 5, 7, 9, 11, 13, 15, 16, 17, 18, 19]
    ]
    assert distinct_indices(same, scores, 10, 0).tolist() == [[3, 5, 7, 9, 11, 13, 15, 17, 18, 19]]


def test_what_is_spoiled_goes_first_and_takes_none_along() -> None:
    features, scores = inputs(1, 12, 6)
    scores = scores.sort(descending=True).values
    features[0, 4, 2] = NAN
    features[0, 10, 1] = INF
    kept = distinct_indices(features, scores, 10, 0, removed_at_once=2)
    assert kept.tolist() == [[0, 1, 2, 3, 5, 6, 7, 8, 9, 11]]
    found = least_similar_indices(features, torch.tensor([[0]]), 10)
    assert 4 not in found
    assert 10 not in found


@pytest.mark.parametrize("shape", [(0, 6, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    features, scores = torch.zeros(shape), torch.zeros(shape[:2])
    k = min(4, shape[1])
    found = distinct_indices(features, scores, k, k // 2)
    assert found.shape == (shape[0], k)
    pivots = torch.full((shape[0], 2), min(0, shape[1] - 1))
    pivots[:, 1] = -1
    expected = list(range(k)) if shape[1] else [-1] * 3
    assert least_similar_indices(features, pivots, 4, length=k or 3).tolist() == [expected] * shape[0]
    counts = torch.zeros(shape[0], dtype=torch.int64)
    assert least_similar_indices(features, pivots, counts, length=3).tolist() == [[-1] * 3] * shape[0]
    assert least_similar_indices(features, pivots[:, :0], 2, length=3).tolist() == [[-1] * 3] * shape[0]


def test_strides_and_lengths_of_vectors() -> None:
    features, scores = inputs(2, 16, 6)
    pivots = torch.tensor([[3, 9]] * 2)
    distinct, least = distinct_indices(features, scores, 9, 3), least_similar_indices(features, pivots, 9)
    transposed = features.transpose(0, 2).contiguous().transpose(0, 2)
    longer = torch.nn.functional.pad(features, (0, 0, 1, 0), value=NAN)[:, 1:]
    scaled = features * torch.tensor(2.0).pow(torch.arange(16.0) % 7)[:, None]
    for other in (transposed, longer, scaled):
        assert torch.equal(distinct_indices(other, scores, 9, 3), distinct)
        assert torch.equal(least_similar_indices(other, pivots, 9), least)
    wide = torch.stack([scores, scores], -1)[..., 0]
    assert torch.equal(distinct_indices(features, wide, 9, 3), distinct)


@pytest.mark.parametrize("elements", [1, 1000])
def test_cosines_of_a_block_at_a_time(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in every step, or once there are few enough: it changes nothing."""
    features, scores = inputs(2, 40, 6)
    expected = distinct_indices(features, scores, 20, 6)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
    assert torch.equal(distinct_indices(features, scores, 20, 6), expected)


def test_opcheck() -> None:
    features, scores = inputs(2, 20)
    opcheck(OPS.distinct_indices.default, (features, scores, 9, 3, 8))
    pivots = torch.tensor([[4, -1], [2, 7]])
    opcheck(OPS.least_similar_indices.default, (features, pivots, None, 9, None, 9))
    mask, counts = torch.ones(2, 20).bool(), torch.tensor([0, 4])
    opcheck(OPS.least_similar_indices.default, (features, pivots, mask, 0, counts, 5))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile() -> None:
    def run(features: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        pivots = scores.argmax(1, keepdim=True)
        return distinct_indices(features, scores, k, k // 2), least_similar_indices(features, pivots, k)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, tokens, k in ((2, 9, 3), (3, 17, 4)):
        given_inputs = (*inputs(batch, tokens), k)
        for found, expected in zip(compiled(*given_inputs), run(*given_inputs), strict=True):
            assert torch.equal(found, expected)

    def ragged(features: Tensor, counts: Tensor, length: int | None) -> Tensor:
        return least_similar_indices(features, torch.zeros(2, 1).long(), counts, length=length)

    compiled = torch.compile(ragged, fullgraph=True, backend="aot_eager")
    given_counts = inputs()[0], torch.tensor([2, 5])
    assert torch.equal(compiled(*given_counts, 6), ragged(*given_counts, 6))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"pass length=\.\.\. when compiling"):
        compiled(*given_counts, None)


def test_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        features = torch.empty(2, 20, 4, device="cuda")
        scores = torch.empty(2, 20, device="cuda")
        pivots = torch.empty(2, 3, device="cuda", dtype=torch.int64)
        found = [distinct_indices(features, scores, 6, 3), least_similar_indices(features, pivots, 6)]
    for index in found:
        assert (index.device.type, index.shape, index.dtype) == ("cuda", (2, 6), torch.int64)


FEATURES, SCORES, PIVOTS = torch.zeros(2, 6, 3), torch.zeros(2, 6), torch.tensor([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((FEATURES.int(), SCORES, 2, 1), {}, "features: expected dtype .*float16.*, got .*int32"),
        ((FEATURES[0], SCORES, 2, 1), {}, r"features: expected 3 dimensions \[B, N, C\], got shape \[6, 3\]"),
        ((FEATURES, SCORES[:, 1:], 2, 1), {}, r"scores: expected \[B, N\] with N = 6, got shape"),
        ((FEATURES, SCORES.double(), 2, 1), {}, "scores: expected dtype torch.float32, got .*float64"),
        ((FEATURES, SCORES, 7, 1), {}, r"k: expected an int in 0..6 \(N of features\), got 7"),
        ((FEATURES, SCORES, torch.tensor([2, 2]), 1), {}, r"k: expected an int in 0..6 \(N of features\), got shape"),
        ((FEATURES, SCORES, 2, 3), {}, r"important: expected an int in 0..2 \(k\), got 3"),
        ((FEATURES, SCORES, 2, True), {}, r"important: expected an int in 0..2 \(k\), got True"),
        ((FEATURES, SCORES, 2, 1), {"removed_at_once": 0}, "removed_at_once: expected an int >= 1, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments_of_distinct(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distinct_indices(*args, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((FEATURES.int(), PIVOTS, 2), {}, "features: expected dtype .*float16.*, got .*int32"),
        ((FEATURES, PIVOTS[:1], 2), {}, r"pivots: expected \[B, P\] with B = 2, got shape"),
        ((FEATURES, PIVOTS.int(), 2), {}, "pivots: expected dtype torch.int64, got .*int32"),
        ((FEATURES, PIVOTS + 3, 2), {}, "pivots: expected values in -1..5, got 6"),
        ((FEATURES, PIVOTS * 0, 2), {}, "pivots: expected distinct positions, got 0 twice in sample 0"),
        ((FEATURES, PIVOTS, 2), {"mask": SCORES}, "mask: expected dtype torch.bool, got .*float32"),
        ((FEATURES, PIVOTS, -1), {}, "k: expected a count >= 0, got -1"),
        ((FEATURES, PIVOTS, torch.tensor([1, -2])), {}, "k: expected counts >= 0, got -2"),
        (
            (FEATURES, PIVOTS, torch.tensor([1, 9])),
            {"length": 5},
            r"length: expected at least the largest min\(k, N\), 6, got 5",
        ),
        ((FEATURES, PIVOTS, 3), {"length": 2}, "length: expected at least 3, got 2"),
    ],
)  # fmt: skip
def test_bad_arguments_of_least_similar(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        least_similar_indices(*args, **kwargs)
