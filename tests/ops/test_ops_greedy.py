"""Greedy selection against a float64 loop over tokens and pairs; exact cases; as a torch.library object; its errors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from gap_kernels import blocks, greedy_indices
from gap_kernels.greedy import reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.naive.greedy import CLEAR, oracle
from support.naive.select import fill
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

NAN, INF = math.nan, math.inf
RULES = ["max_min", "determinant", "coverage_gain"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


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


@settings(deadline=None)
@given(st.data())
def test_what_a_loop_chooses(data: st.DataObject) -> None:
    """With duplicates, NaN and infinities, scores of both signs, a mask, more to choose than there is, a count each."""
    batch, tokens, channels = (
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(0, 6)),
    )
    rule, dtype = data.draw(st.sampled_from(RULES)), data.draw(st.sampled_from(DTYPES))
    features, scores = inputs(batch, tokens, channels, data.draw(st.integers(0, 999)))
    features = features.to(dtype)
    if data.draw(st.booleans()):
        features[:, -1] = features[:, 0]
    if data.draw(st.booleans()):
        features[:, tokens // 2] = 0
    if channels and data.draw(st.booleans()):
        features[0, tokens // 3, 0] = data.draw(st.sampled_from([NAN, INF, -INF]))
    given_scores = None
    if rule != "max_min" and data.draw(st.booleans()):
        given_scores = scores
        scores[0, 0] = data.draw(st.sampled_from([NAN, INF, -INF, -1.0, 0.0, 0.5]))
    mask = torch.rand(batch, tokens) < 0.8 if data.draw(st.booleans()) else None
    exponent = data.draw(st.sampled_from([0.0, 0.5, 1.0, 2]))
    counts = data.draw(st.lists(st.integers(0, tokens + 2), min_size=batch, max_size=batch))
    expected = []
    for sample, count in enumerate(counts):
        row, clear = oracle(
            features[sample],
            count,
            rule,
            None if given_scores is None else given_scores[sample].tolist(),
            exponent,
            None if mask is None else mask[sample].tolist(),
        )
        assume(clear > CLEAR)
        expected.append(row)
    options = {"scores": given_scores, "exponent": exponent, "mask": mask}
    length = min(max(counts), tokens)
    found = greedy_indices(features, torch.tensor(counts), rule, **options)
    assert found.dtype == torch.int64
    assert found.tolist() == [fill(row, length) for row in expected]
    found = greedy_indices(features, torch.tensor(counts), rule, **options, length=length + 2)
    assert found.tolist() == [fill(row, length + 2) for row in expected]
    found = greedy_indices(
        features[:1],
        counts[0],
        rule,
        **{k: v[:1] if isinstance(v, Tensor) else v for k, v in options.items()},
    )
    assert found.tolist() == [fill(expected[0], min(counts[0], tokens))]


# Along the axes, along a diagonal, and twice the first: cosines are 0, 1 and the root of a half.
AXES = [[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 3.0], [4.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("rule", "scores", "order"),
    [
        ("max_min", None, [3, 0, 1, 2, 4]),  # farthest from its nearest, then ties at distance 1, then the duplicate
        ("determinant", None, [0, 1, 3, 2, 4]),  # what is spanned comes last, by index
        ("determinant", [0.5, 1.0, 1.0, 0.1, 0.6], [1, 2, 3, 0, 4]),  # 0.5 and 0.6 are spanned by 1 and 2
        ("coverage_gain", None, [2, 3, 0, 1, 4]),  # gains of 1 + 3 r, 1, 2 (1 - r), 1 - r and 0, with r the root of a half
        ("coverage_gain", [0.1, 0.1, 0.1, 1.0, 0.2], [3, 4, 1, 2, 0]),  # 1 and 2 would gain the same
    ],
)  # fmt: skip
def test_order(rule: str, scores: list[float] | None, order: list[int]) -> None:
    features = torch.tensor([AXES])
    weight = None if scores is None else torch.tensor([scores])
    for k in range(len(order) + 1):
        assert greedy_indices(features, k, rule, scores=weight).tolist() == [sorted(order[:k])]


@pytest.mark.parametrize("rule", RULES)
def test_ties_and_what_is_spoiled(rule: str) -> None:
    same = torch.ones(1, 6, 4)
    for k in range(7):
        assert greedy_indices(same, k, rule).tolist() == [list(range(k))]
    same[0, 0, 2], same[0, 2, 0] = NAN, INF
    assert greedy_indices(same, 2, rule).tolist() == [[1, 3]]
    assert greedy_indices(same, 5, rule).tolist() == [[0, 1, 3, 4, 5]]
    mask = torch.tensor([[True, False, True, False, True, True]])
    assert greedy_indices(same, 3, rule, mask=mask).tolist() == [[0, 4, 5]]
    assert greedy_indices(same, 9, rule, mask=mask).tolist() == [[-1, -1, 0, 2, 4, 5]]


@pytest.mark.parametrize("rule", RULES)
def test_copies_are_worth_nothing(rule: str) -> None:
    """Whatever the rounding of the cosines between them, of which there are many."""
    for seed in range(5):
        copies = inputs(1, 1, 37, seed)[0].expand(-1, 70, -1).contiguous()
        copies[0, ::3] *= 3.7
        copies[0, 60] = -copies[0, 0].flip(0)
        assert greedy_indices(copies, 5, rule).tolist() == [[0, 1, 2, 3, 60]]


@pytest.mark.parametrize("rule", ["determinant", "coverage_gain"])
def test_scores_count(rule: str) -> None:
    features, _ = inputs(1, 6, 40)
    scores = torch.tensor([[0.0, 5.0, NAN, -3.0, 5.5, 0.0]])
    assert greedy_indices(features, 2, rule, scores=scores).tolist() == [[1, 4]]
    assert greedy_indices(features, 4, rule, scores=scores).tolist() == [[0, 1, 3, 4]]  # no score is above 0
    assert greedy_indices(features, 5, rule, scores=scores).tolist() == [[0, 1, 3, 4, 5]]
    plain = greedy_indices(features, 3, rule)
    assert torch.equal(greedy_indices(features, 3, rule, scores=scores.new_ones(1, 6), exponent=7.0), plain)
    assert torch.equal(greedy_indices(features, 3, rule, scores=scores.nan_to_num(), exponent=0), plain)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(0, 6, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0)])
def test_empty(rule: str, shape: tuple[int, int, int]) -> None:
    features = torch.zeros(shape)
    index = greedy_indices(features, 4, rule)
    assert index.tolist() == [list(range(min(4, shape[1])))] * shape[0]
    counts = torch.zeros(shape[0], dtype=torch.int64)
    assert greedy_indices(features, counts, rule, length=3).tolist() == [[-1] * 3] * shape[0]


@pytest.mark.parametrize("rule", RULES)
def test_strides_and_lengths_of_vectors(rule: str) -> None:
    features, _ = inputs(2, 8, 6)
    expected = greedy_indices(features, 5, rule)
    transposed = features.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(greedy_indices(transposed, 5, rule), expected)
    longer = torch.nn.functional.pad(features, (0, 0, 1, 0), value=NAN)[:, 1:]
    assert torch.equal(greedy_indices(longer, 5, rule), expected)
    assert torch.equal(
        greedy_indices(features * torch.tensor(2.0).pow(torch.arange(8.0))[:, None], 5, rule), expected
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("elements", [1, 300, 3000])
def test_gains_that_are_not_computed_again(seed: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many tokens the reference looks only at those that may be the best: it chooses what a look at all does."""
    generator = torch.Generator().manual_seed(seed)
    tokens = int(torch.randint(20, 90, (), generator=generator))
    features, scores = inputs(2, tokens, (6, 40)[seed % 2], seed)
    features[:, tokens // 2] = features[:, 0]
    features[0, tokens // 3] = NAN
    mask = torch.rand(2, tokens, generator=generator) < 0.9
    weight = scores.round(decimals=1) if seed % 3 else None
    given_all = (features, weight, mask, "coverage_gain", 1.0, tokens // 2, None, tokens // 2)
    expected = reference.greedy_indices(*given_all)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
    assert torch.equal(reference.greedy_indices(*given_all), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("full", [False, True])
def test_opcheck(rule: str, full: bool) -> None:
    features, scores = inputs()
    mask, counts = (torch.ones(2, 9).bool(), torch.tensor([0, 4])) if full else (None, None)
    weight = scores if full and rule != "max_min" else None
    opcheck(torch.ops.gap_kernels.greedy_indices.default, (features, weight, mask, rule, 1.0, 3, counts, 5))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("rule", RULES)
def test_compile(rule: str) -> None:
    def run(features: Tensor, k: int) -> Tensor:
        return greedy_indices(features, k, rule)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, tokens, k in ((2, 9, 3), (3, 7, 4)):
        features, _ = inputs(batch, tokens)
        assert torch.equal(compiled(features, k), run(features, k))

    def ragged(features: Tensor, counts: Tensor, length: int | None) -> Tensor:
        return greedy_indices(features, counts, rule, length=length)

    compiled = torch.compile(ragged, fullgraph=True, backend="aot_eager")
    given_counts = inputs()[0], torch.tensor([2, 5])
    assert torch.equal(compiled(*given_counts, 6), ragged(*given_counts, 6))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"pass length=\.\.\. when compiling"):
        compiled(*given_counts, None)


def test_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        index = greedy_indices(torch.empty(2, 20, 4, device="cuda"), 6, "coverage_gain")
    assert (index.device.type, index.shape, index.dtype) == ("cuda", (2, 6), torch.int64)


FEATURES, SCORES = torch.zeros(2, 6, 3), torch.zeros(2, 6)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((FEATURES.int(), 2, "max_min"), {}, "features: expected dtype .*float16.*, got .*int32"),
        ((FEATURES[0], 2, "max_min"), {}, r"features: expected 3 dimensions \[B, N, C\], got shape \[6, 3\]"),
        ((FEATURES, 2, "maxmin"), {}, "rule: expected one of max_min, determinant, coverage_gain, got 'maxmin'"),
        ((FEATURES, 2, None), {}, r"rule: expected one of .*, got None \(NoneType\)"),
        ((FEATURES, 2, "max_min"), {"scores": SCORES}, "scores: expected None with rule 'max_min', .* got shape"),
        ((FEATURES, 2, "determinant"), {"scores": SCORES[:, 1:]}, r"scores: expected \[B, N\] with N = 6, got shape"),
        ((FEATURES, 2, "coverage_gain"), {"scores": SCORES.half()}, "scores: expected dtype torch.float32, got .*float16"),
        ((FEATURES, 2, "coverage_gain"), {"mask": SCORES}, "mask: expected dtype torch.bool, got .*float32"),
        ((FEATURES, 2, "coverage_gain"), {"exponent": -0.5}, "exponent: expected a finite float >= 0, got -0.5"),
        ((FEATURES, 2, "coverage_gain"), {"exponent": NAN}, "exponent: expected a finite float >= 0, got nan"),
        ((FEATURES, -1, "coverage_gain"), {}, "k: expected a count >= 0, got -1"),
        ((FEATURES, torch.tensor([1, -2]), "coverage_gain"), {}, "k: expected counts >= 0, got -2"),
        (
            (FEATURES, torch.tensor([1, 9]), "coverage_gain"),
            {"length": 5},
            r"length: expected at least the largest min\(k, N\), 6, got 5",
        ),
        ((FEATURES, 3, "coverage_gain"), {"length": 2}, "length: expected at least 3, got 2"),
    ],
)  # fmt: skip
def test_bad_arguments(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        greedy_indices(*args, **kwargs)
