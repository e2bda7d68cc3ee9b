"""Merging tokens by the cosines of their keys: against loops in Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gap_kernels import blocks, collect_nearest, merge_nearest
from support.naive.merge import collected, merged
from torch import Tensor
from torch.library import opcheck

OPS = torch.ops.gap_kernels
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2**-8, torch.bfloat16: 2**-5}
SIZES = [(1, 1, 1), (2, 12, 4), (1, 70, 17), (2, 41, 0), (3, 8, 8)]


def case(
    batch: int, rows: int, kept: int, dtype: torch.dtype = torch.float32, channels: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, keys, weights, and distinct rows, some of them filler."""
    generator = torch.Generator().manual_seed(rows)
    features = torch.randn(batch, rows, channels, generator=generator).to(dtype)
    keys = torch.randn(batch, rows, 7, generator=generator).to(dtype)
    order = torch.rand(batch, rows, generator=generator).argsort(1)
    hidden = torch.rand(batch, rows, generator=generator) < 0.2
    weights = torch.rand(batch, rows, generator=generator)
    return features, keys, weights, torch.where(hidden, -1, order)[:, :kept]


def assert_rows(found: Tensor, expected: list[list[Tensor]], dtype: torch.dtype = torch.float32) -> None:
    assert found.dtype == dtype
    nothing = torch.empty(0, found.shape[2], dtype=torch.float64)
    wanted = torch.stack([torch.stack(rows) if rows else nothing for rows in expected])
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=8 * TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("count", [0, 32])
def test_collecting_against_loops(sizes: tuple[int, int, int], count: int) -> None:
    features, keys, weights, kept = case(*sizes)
    weights[0, 0] = math.inf
    each = zip(features, keys, weights.tolist(), kept.tolist(), strict=True)
    assert_rows(
        collect_nearest(features, keys, weights, kept, count), [collected(*one, count) for one in each]
    )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("average", "some_excluded"), [(False, True), (True, False)])
def test_merging_against_loops(sizes: tuple[int, int, int], average: bool, some_excluded: bool) -> None:
    features, keys, _, rows = case(*sizes)
    targets, excluded = (rows[:, ::2], rows[:, 1::2]) if some_excluded else (rows, None)
    gone = [[]] * len(rows) if excluded is None else excluded.tolist()
    each = zip(features, keys, targets.tolist(), gone, strict=True)
    found = merge_nearest(features, keys, targets, excluded=excluded, average=average)
    assert_rows(found, [merged(*one, average) for one in each])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_dtypes(dtype: torch.dtype) -> None:
    features, keys, weights, kept = case(2, 30, 9, dtype, channels=33)
    each = list(zip(features, keys, weights.tolist(), kept.tolist(), strict=True))
    assert_rows(
        collect_nearest(features, keys, weights, kept, 4), [collected(*one, 4) for one in each], dtype
    )
    expected = [merged(x, k, own, [], True) for x, k, _, own in each]
    assert_rows(merge_nearest(features, keys, kept, average=True), expected, dtype)
    found = merge_nearest(features, keys.double(), kept)
    assert_rows(found, [merged(x, k, own, [], False) for x, k, _, own in each], dtype)


def test_equal_cosines_go_to_the_first() -> None:
    features = torch.tensor([[[1.0], [2.0], [3.0], [8.0], [16.0]]])
    keys = torch.tensor([[[1.0, 0], [2, 0], [0, 1], [3, 0], [4, 0]]])
    collects = collect_nearest(features, keys, torch.ones(1, 5), torch.tensor([[4, 2]]), 2)
    assert collects.flatten().tolist() == [16.0 + 1 + 2, 3.0 + 1 + 2, 1.0 + 2 + 8]
    assert merge_nearest(features, keys, torch.tensor([[3, 0]])).flatten().tolist() == [8 + 21 / 3, 1.0]
    assert merge_nearest(features, keys, torch.tensor([[0, 3]]), average=True).flatten().tolist() == [
        22 / 4,
        8.0,
    ]


def test_keys_of_nan() -> None:
    """Are not collected and collect nothing; but merge into the first target, as all that they have no cosine to."""
    features, keys, weights, _ = case(1, 12, 3)
    kept = torch.tensor([[-1, 5, 8, 2]])
    keys[0, 5] = keys[0, 7] = math.nan
    found = collect_nearest(features, keys, weights, kept, 32)
    assert_rows(found, [collected(features[0], keys[0], weights[0].tolist(), kept[0].tolist(), 32)])
    torch.testing.assert_close(found[0, 1], features[0, 5])
    found = merge_nearest(features, keys, kept)
    assert_rows(found, [merged(features[0], keys[0], kept[0].tolist(), [], False)])


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    features, keys, weights, kept = case(1, 40, 30)
    run = [
        lambda: collect_nearest(features, keys, weights, kept, 32),
        lambda: merge_nearest(features, keys, kept[:, :20], excluded=kept[:, 20:]),
    ]
    whole = [each() for each in run]
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 1000)
    for each, expected in zip(run, whole, strict=True):
        torch.testing.assert_close(each(), expected, rtol=1e-5, atol=1e-5)


def test_strided_inputs() -> None:
    features, keys, weights, kept = case(2, 20, 8)

    def turned(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, -1).contiguous().transpose(1, -1)

    index = kept.t().contiguous().t()
    found = collect_nearest(turned(features), turned(keys), weights, index, 5)
    torch.testing.assert_close(found, collect_nearest(features, keys, weights, kept, 5))
    found = merge_nearest(turned(features), turned(keys), index, excluded=index[:, :0])
    torch.testing.assert_close(found, merge_nearest(features, keys, kept))


def test_empty_shapes() -> None:
    features, keys, weights, kept = case(2, 20, 8)
    assert collect_nearest(features[:0], keys[:0], weights[:0], kept[:0], 4).shape == (0, 9, 5)
    assert collect_nearest(features[..., :0], keys, weights, kept, 4).shape == (2, 9, 0)
    empty = collect_nearest(features[:, :0], keys[:, :0], weights[:, :0], kept[:, :2] * 0 - 1, 4)
    assert empty.tolist() == [[[0.0] * 5] * 3] * 2
    assert merge_nearest(features, keys, kept[:, :0]).shape == (2, 0, 5)
    assert merge_nearest(features[..., :0], keys, kept).shape == (2, 8, 0)
    # Vectors without elements are vectors of zeros: all equal.
    assert_rows(
        merge_nearest(features, keys[..., :0], kept),
        [merged(x, k, own, [], False) for x, k, own in zip(features, keys * 0, kept.tolist(), strict=True)],
    )


def test_opcheck() -> None:
    features, keys, weights, kept = case(2, 20, 8)
    opcheck(OPS.collect_nearest.default, (features, keys, weights, kept, 3))
    opcheck(OPS.merge_nearest.default, (features, keys, kept[:, :4], kept[:, 4:], False))
    opcheck(OPS.merge_nearest.default, (features, keys, kept, None, True))


def test_backward_is_refused() -> None:
    features, keys, weights, kept = case(2, 20, 8)
    features.requires_grad_()
    with pytest.raises(RuntimeError, match=r"gap_kernels\.collect_nearest has no gradient"):
        collect_nearest(features, keys, weights, kept, 3).sum().backward()
    with pytest.raises(RuntimeError, match=r"gap_kernels\.merge_nearest has no gradient"):
        merge_nearest(features, keys, kept).sum().backward()


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        (collect_nearest, {"features": torch.ones(2, 5)}, r"features: expected 3 dimensions \[B, N, C\], got"),
        (collect_nearest, {"keys": torch.ones(2, 11, 7)}, r"keys: expected \[B, N, E\] with N = 12, got"),
        (collect_nearest, {"weights": torch.ones(2, 12).double()}, "weights: expected dtype torch.float32, got"),
        (collect_nearest, {"kept": torch.tensor([[12], [0]])}, "kept: expected values in -1..11, got 12"),
        (collect_nearest, {"kept": torch.tensor([[3, 3], [0, 1]])}, "kept: expected distinct positions, got 3 twice"),
        (collect_nearest, {"count": -1}, r"count: expected an int >= 0, got -1 \(int\)"),
        (collect_nearest, {"count": 2.0}, r"count: expected an int >= 0, got 2.0 \(float\)"),
        (merge_nearest, {"targets": torch.ones(2, 3)}, "targets: expected dtype torch.int64, got"),
        (merge_nearest, {"targets": torch.tensor([[-2], [0]])}, "targets: expected values in -1..11, got -2"),
        (merge_nearest, {"excluded": torch.tensor([[12], [0]])}, "excluded: expected values in -1..11, got 12"),
        (merge_nearest, {"average": 1}, r"average: expected a bool, got 1 \(int\)"),
    ],
)  # fmt: skip
def test_bad_arguments(function: Any, change: dict[str, Any], message: str) -> None:
    features, keys, weights, kept = case(2, 12, 4)
    given: dict[str, Any] = {"features": features, "keys": keys}
    given |= (
        {"weights": weights, "kept": kept, "count": 3} if function is collect_nearest else {"targets": kept}
    )
    with pytest.raises(ValueError, match=message):
        function(**given | change)
