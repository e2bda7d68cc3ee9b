"""Importance against a float64 loop over samples, heads, rows and keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gap_kernels import visual_importance
from support.naive.importance import TOLERANCE, make, oracle
from torch import Tensor


def check(query: Tensor, key: Tensor, visual_index: Tensor, **kwargs: Any) -> Tensor:
    """Compare with the oracle, with and without the log-sum-exp given, and return the scores."""
    expected, lse = oracle(query, key, visual_index, **kwargs)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    tolerance = TOLERANCE[query.dtype]
    for given in (None, lse.to(dtype)):
        scores = visual_importance(query, key, visual_index, lse=given, **kwargs)
        assert scores.dtype == dtype
        torch.testing.assert_close(scores.double(), expected, rtol=10 * tolerance, atol=tolerance)
    return scores


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=["MHA", "GQA", "MQA"])
def test_heads_and_dtypes(heads: tuple[int, int], dtype: torch.dtype) -> None:
    query, key = make((2, *heads, 7, 7, 80), dtype)
    scores = check(query, key, torch.tensor([[1, 2, 3, 4], [5, 0, 2, 6]]))
    assert (scores > 0).all()


def make_value(key: Tensor, value_dim: int) -> Tensor:
    """Value vectors [B, Hkv, S, value_dim] for a key."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*key.shape[:3], value_dim, generator=generator).to(key.dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=["MHA", "GQA", "MQA"])
@pytest.mark.parametrize(
    ("causal", "value_dim", "head_reduction"),
    [(False, None, "mean"), (True, 72, "mean"), (True, None, "max"), (False, 5, "max")],
)
def test_variants(
    causal: bool, value_dim: int | None, head_reduction: str, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    query, key = make((2, *heads, 5, 8, 16), dtype)
    options = {"causal": causal, "head_reduction": head_reduction}
    if value_dim is not None:
        options["value"] = make_value(key, value_dim)
    rows, real = torch.tensor([[1, 4, -1], [2, -1, -1]]), torch.ones(2, 8, dtype=torch.bool)
    real[1, 4] = False  # position 1
    visual_index = torch.tensor([[1, 2, 3, 4], [1, 0, -1, 2]])
    scores = check(query, key, visual_index, rows=rows, attention_mask=real, **options)
    assert scores[1, 0] == scores[1, 2] == 0
    assert (scores[0] > 0).all()
    assert not torch.allclose(
        scores, visual_importance(query, key, visual_index, rows=rows, attention_mask=real)
    )


@pytest.mark.parametrize("head_reduction", ["mean", "max"])
def test_last_row_and_no_mask_with_every_variant(head_reduction: str) -> None:
    query, key = make((2, 4, 2, 3, 7, 8))
    value = make_value(key, 9)
    check(query, key, torch.tensor([[0, 2]] * 2), causal=False, value=value, head_reduction=head_reduction)


def test_cls_attention() -> None:
    query, key = make((2, 3, 3, 10, 10, 8))
    rows, patches = torch.zeros(2, 1, dtype=torch.int64), torch.arange(1, 10).expand(2, 9)
    scores = check(query, key, patches, rows=rows, causal=False)
    probability = (query[:, :, :1] @ key.transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(scores, probability[:, :, 0, 1:].mean(1))
    assert visual_importance(query, key, patches, rows=rows).tolist() == [[0.0] * 9] * 2


def test_filler_rows_see_nothing_without_causality() -> None:
    query, key = make((1, 2, 1, 4, 4, 8))
    for head_reduction in ("mean", "max"):
        options = {"causal": False, "head_reduction": head_reduction}
        scores = check(query, key, torch.tensor([[0, 1]]), rows=torch.tensor([[-1, 2]]), **options)
        alone = visual_importance(query, key, torch.tensor([[0, 1]]), rows=torch.tensor([[2]]), **options)
        torch.testing.assert_close(scores, alone)


def test_the_norm_is_that_of_the_keys_own_value() -> None:
    query, key = make((2, 6, 2, 5, 7, 8))
    visual_index = torch.tensor([[0, 1, 3], [4, 2, 0]])
    value = torch.zeros(2, 2, 7, 3)
    value[:, :, :, 0], value[:, :, :, 1] = 2.0, -1.0  # 3 in L1, sqrt(5) in L2, 2 in the maximum norm
    plain = visual_importance(query, key, visual_index)
    torch.testing.assert_close(visual_importance(query, key, visual_index, value=value), 3 * plain)
    value[:, 1] = 0.0
    first = visual_importance(query[:, :3], key[:, :1], visual_index)  # the heads that share key head 0
    torch.testing.assert_close(visual_importance(query, key, visual_index, value=value), 1.5 * first)
    assert (visual_importance(query, key, visual_index, value=value[..., :0]) == 0).all()


@pytest.mark.parametrize("head_reduction", ["mean", "max"])
@pytest.mark.parametrize("causal", [True, False])
def test_values_that_are_not_used_are_not_read(causal: bool, head_reduction: str) -> None:
    query, key = make((2, 4, 2, 6, 8, 16))
    value = make_value(key, 24)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, :4] = False
    real[1, 7] = False
    key[~real[:, None].expand(2, 2, 8)] = math.nan
    visual_index = torch.tensor([[0, 2, 3, -1], [5, 1, -1, 4]])
    rows = torch.tensor([[3, 2], [4, 4]])
    options = {"rows": rows, "attention_mask": real, "causal": causal, "head_reduction": head_reduction}
    expected = check(query, key, visual_index, value=value, **options)
    unused = torch.ones(2, 8, dtype=torch.bool)
    for sample, position in ((0, 2), (0, 3), (1, 1), (1, 4)):
        unused[sample, position + 2] = False
    value[unused[:, None].expand(2, 2, 8)] = math.nan
    scores = check(query, key, visual_index, value=value, **options)
    assert torch.equal(scores, expected)
    assert scores[0, 0] == scores[1, 0] == 0


@pytest.mark.parametrize("head_reduction", ["mean", "max"])
def test_nan_in_a_value_counts_where_a_row_sees_its_key(head_reduction: str) -> None:
    query, key = make((2, 2, 1, 5, 5, 8))
    value = make_value(key, 8)
    value[:, :, 3] = math.nan
    rows, visual_index = torch.tensor([[2, 1], [2, 3]]), torch.tensor([[0, 3]] * 2)
    scores = visual_importance(
        query, key, visual_index, rows=rows, value=value, head_reduction=head_reduction
    )
    assert (scores[:, 0] > 0).all()
    assert scores[0, 1] == 0
    assert scores[1, 1].isnan()


@pytest.mark.parametrize("broken", [0, 1, 3])
def test_nan_in_one_head_wins_the_maximum(broken: int) -> None:
    query, key = make((2, 4, 2, 5, 5, 8))
    query[0, broken] = math.nan
    visual_index = torch.tensor([[0, 1, -1]] * 2)
    scores = visual_importance(query, key, visual_index, head_reduction="max")
    assert scores[0].isnan().tolist() == [True, True, False]
    assert scores[1].isfinite().all()


def test_maximum_is_over_means_of_rows() -> None:
    query, key = make((1, 2, 1, 4, 4, 8))
    rows, visual_index = torch.tensor([[2, 3]]), torch.tensor([[0, 1]])
    heads = [visual_importance(query[:, h : h + 1], key, visual_index, rows=rows) for h in range(2)]
    scores = visual_importance(query, key, visual_index, rows=rows, head_reduction="max")
    torch.testing.assert_close(scores, torch.maximum(*heads))


def naive_rotary_scores(query: Tensor, key: Tensor, positions: list[int], rotate: bool) -> Tensor:
    """Mean over heads of the last row's softmax, [B, S]; rotation turns pairs (j, j + D / 2) in the complex plane."""
    half = query.shape[-1] // 2

    def as_complex(vectors: Tensor) -> Tensor:
        vectors = vectors.double()
        return torch.complex(vectors[..., :half], vectors[..., half:])

    frequency = torch.tensor([100.0 ** (-j / half) for j in range(half)], dtype=torch.float64)
    angle = torch.tensor(positions, dtype=torch.float64)[:, None] * frequency * float(rotate)
    row = as_complex(query[:, :, -1]) * torch.polar(torch.ones(half, dtype=torch.float64), angle[-1])
    keys = as_complex(key) * torch.polar(torch.ones_like(angle), angle)
    logits = (row[:, :, None] * keys.conj()).real.sum(-1) / math.sqrt(2 * half)
    return logits.softmax(-1).mean(1)


def rotary(vectors: Tensor, positions: list[int]) -> Tensor:
    """Rotary embedding in the rotate-half convention, as decoders apply it."""
    half = vectors.shape[-1] // 2
    angle = torch.tensor(positions)[:, None] * 100.0 ** (-torch.arange(half) / half)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    return vectors * cos + torch.cat([-vectors[..., half:], vectors[..., :half]], -1) * sin


def test_scores_without_rotary_embedding() -> None:
    query, key = make((2, 3, 3, 7, 7, 8))
    positions = [0, 1, 2, 5, 9, 11, 40]
    visual_index = torch.arange(7).expand(2, 7)
    without = visual_importance(query, key, visual_index)
    expected = naive_rotary_scores(query, key, positions, rotate=False)
    torch.testing.assert_close(without.double(), expected, rtol=2e-5, atol=2e-6)
    rotated = visual_importance(rotary(query, positions), rotary(key, positions), visual_index)
    expected = naive_rotary_scores(query, key, positions, rotate=True)
    torch.testing.assert_close(rotated.double(), expected, rtol=2e-5, atol=2e-6)
    assert (rotated - without).abs().max() > 1e-2
    # The same content at every position: only the rotation tells positions apart.
    same = key[:, :, :1].expand(-1, -1, 7, -1)
    torch.testing.assert_close(visual_importance(query, same, visual_index), torch.full((2, 7), 1 / 7))
    rotated = visual_importance(rotary(query, positions), rotary(same, positions), visual_index)
    assert rotated.std(-1).min() > 1e-2


@pytest.mark.parametrize("past", [1, 6])
def test_earlier_keys(past: int) -> None:
    query, key = make((2, 4, 2, 5, 5 + past, 8))
    for causal in (True, False):
        rows = torch.tensor([[3, 4], [0, 2]])
        check(query, key, torch.tensor([[0, 1, 2], [4, 3, 1]]), rows=rows, causal=causal)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    query, key = make((3, 2, 1, 6, 8, 16))
    real = torch.ones(3, 8, dtype=torch.bool)
    last = torch.full((3, 1), 5)
    if side == "left":
        real[0, :4] = False
        real[2, :1] = False
    else:
        real[0, 5:] = False
        last[0] = 2
    key[~real[:, None].expand(3, 1, 8)] = math.nan  # what the mask hides must not be touched by arithmetic
    check(query, key, torch.tensor([[2, 1], [1, 2], [0, 3]]), rows=last, attention_mask=real)


def test_filler_rows_are_left_out_of_the_mean() -> None:
    query, key = make((2, 2, 2, 6, 6, 8))
    visual_index = torch.tensor([[0, 1, 2], [1, -1, 3]])
    scores = check(query, key, visual_index, rows=torch.tensor([[-1, 4, -1, 5], [3, -1, 5, 4]]))
    compact = visual_importance(query[:1], key[:1], visual_index[:1], rows=torch.tensor([[4, 5]]))
    torch.testing.assert_close(scores[:1], compact)
    assert scores[1, 1] == 0


def test_rows_see_earlier_columns_only() -> None:
    query, key = make((1, 2, 2, 6, 6, 8))
    scores = check(query, key, torch.tensor([[1, 2, 3, 4]]), rows=torch.tensor([[2]]))
    assert (scores[0, :2] > 0).all()
    assert scores[0, 2:].tolist() == [0.0, 0.0]


def test_a_row_that_sees_nothing_adds_zero() -> None:
    query, key = make((2, 2, 1, 4, 4, 8))
    real = torch.tensor([[False] * 4, [False, False, True, True]])
    # Sample 0 sees nothing at all; in sample 1, row 1 sees nothing but counts in the mean.
    rows = torch.tensor([[2, 3], [1, 3]])
    scores = check(query, key, torch.tensor([[0, 1], [2, 3]]), rows=rows, attention_mask=real)
    assert scores[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(scores[1].sum(), torch.tensor(0.5))


def test_samples_without_rows_or_visual_tokens() -> None:
    query, key = make((2, 2, 1, 4, 4, 8))
    visual_index = torch.tensor([[0, 1], [-1, -1]])
    scores = check(query, key, visual_index, rows=torch.tensor([[-1], [3]]))
    assert scores.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert visual_importance(query, key, visual_index[:, :0]).shape == (2, 0)
    assert visual_importance(query[:0], key[:0], visual_index[:0]).shape == (0, 2)
    no_rows = torch.empty(2, 0, dtype=torch.int64)
    for options in ({}, {"causal": False, "head_reduction": "max", "value": key}):
        scores = visual_importance(query, key, visual_index, rows=no_rows, **options)
        assert scores.tolist() == [[0.0, 0.0], [0.0, 0.0]]
        scores = visual_importance(query, key, visual_index, rows=torch.full((2, 1), -1), **options)
        assert scores.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_all_columns_of_a_row_sum_to_one() -> None:
    query, key = make((1, 4, 2, 9, 9, 8))
    scores = visual_importance(query, key, torch.arange(9)[None])
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0))


def test_scale() -> None:
    query, key = make((1, 2, 2, 5, 5, 8))
    visual_index = torch.tensor([[0, 1, 2]])
    scaled = check(query, key, visual_index, scale=0.9)
    assert not torch.allclose(scaled, visual_importance(query, key, visual_index))


def test_large_scores_do_not_overflow() -> None:
    query, key = make((1, 2, 2, 5, 5, 8))
    scores = visual_importance(query * 1e4, key * 1e4, torch.arange(5)[None])
    assert scores.isfinite().all()
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0))


def test_nan_in_a_visible_key_spoils_the_rows_that_see_it() -> None:
    query, key = make((2, 2, 1, 5, 5, 8))
    key[0, 0, 1] = math.nan
    scores = visual_importance(query, key, torch.tensor([[0, 1, 3]] * 2), rows=torch.tensor([[0, 3], [0, 3]]))
    assert scores[0].isnan().all()
    assert scores[1].isfinite().all()
    scores = visual_importance(query, key, torch.tensor([[0, 1, 3]] * 2), rows=torch.tensor([[0], [0]]))
    assert scores.tolist() == [[1.0, 0.0, 0.0]] * 2


def test_strided_inputs() -> None:
    query, key = make((2, 4, 2, 6, 6, 8))
    visual_index = torch.tensor([[0, 1], [2, 3]])
    expected = visual_importance(query, key, visual_index)
    # [B, S, H, D] storage, as attention projections leave it, and a last dimension with a stride.
    query_t = query.transpose(1, 2).contiguous().transpose(1, 2)
    key_t = key.transpose(2, 3).contiguous().transpose(2, 3)
    assert not query_t.is_contiguous()
    assert key_t.stride(-1) != 1
    torch.testing.assert_close(visual_importance(query_t, key_t, visual_index), expected)
    value = make_value(key, 10)
    expected = visual_importance(query, key, visual_index, value=value)
    for value_t in (value.transpose(1, 2).contiguous().transpose(1, 2), value.mT.contiguous().mT):
        assert not value_t.is_contiguous()
        assert torch.equal(visual_importance(query, key, visual_index, value=value_t), expected)
    expected = visual_importance(query, key, visual_index, value=value[:1].expand(2, -1, -1, -1).contiguous())
    assert torch.equal(
        visual_importance(query, key, visual_index, value=value[:1].expand(2, -1, -1, -1)), expected
    )


def test_lse_is_used_and_filler_entries_are_ignored() -> None:
    query, key = make((1, 2, 2, 5, 5, 8))
    visual_index, rows = torch.tensor([[0, 1]]), torch.tensor([[4, -1]])
    lse = oracle(query, key, visual_index, rows)[1].float()
    lse[:, :, 1] = math.nan
    expected = visual_importance(query, key, visual_index, rows=rows)
    torch.testing.assert_close(visual_importance(query, key, visual_index, rows=rows, lse=lse), expected)
    lse[:, :, 0] += math.log(2.0)
    torch.testing.assert_close(visual_importance(query, key, visual_index, rows=rows, lse=lse), expected / 2)


QUERY, KEY = make((2, 4, 2, 5, 6, 8))
VISUAL = torch.tensor([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((QUERY.int(), KEY, VISUAL), {}, "query: expected dtype torch.float32 or .*, got .*int32"),
        ((QUERY[0], KEY, VISUAL), {}, r"query: expected 4 dimensions \[B, Hq, Q, D\], got shape \[4, 5, 8\]"),
        ((QUERY[:, :, :0], KEY, VISUAL), {}, r"query: expected at least one row, got shape \[2, 4, 0, 8\]"),
        ((QUERY, KEY.half(), VISUAL), {}, "key: expected dtype torch.float32, got .*float16"),
        (
            (QUERY, KEY[..., :4], VISUAL),
            {},
            r"key: expected \[B, Hkv, S, D\] with D = 8, got shape \[2, 2, 6, 4\]",
        ),
        ((QUERY[:, :3], KEY, VISUAL), {}, "query: expected a multiple of the 2 heads of key, got 3 heads"),
        ((QUERY, KEY[:, :0], VISUAL), {}, "query: expected a multiple of the 0 heads of key"),
        ((QUERY, KEY[:, :, :4], VISUAL), {}, "key: expected at least the 5 positions of query, got shape"),
        ((QUERY, KEY, VISUAL.int()), {}, "visual_index: expected dtype torch.int64, got .*int32"),
        ((QUERY, KEY, VISUAL + 3), {}, "visual_index: expected values in -1..4, got 5"),
        ((QUERY, KEY, VISUAL - 2), {}, "visual_index: expected values in -1..4, got -2"),
        ((QUERY, KEY, VISUAL), {"rows": torch.tensor([[0], [9]])}, "rows: expected values in -1..4, got 9"),
        ((QUERY, KEY, VISUAL), {"rows": torch.tensor([4, 4])}, r"rows: expected 2 dimensions \[B, R\]"),
        (
            (QUERY, KEY, VISUAL),
            {"attention_mask": torch.ones(2, 5, dtype=torch.bool)},
            r"attention_mask: expected \[B, S\] with S = 6, got shape \[2, 5\]",
        ),
        (
            (QUERY, KEY, VISUAL),
            {"attention_mask": torch.ones(2, 6)},
            "attention_mask: expected dtype torch.bool, got .*float32",
        ),
        ((QUERY, KEY, VISUAL), {"lse": torch.zeros(2, 4, 2)}, r"lse: expected \[B, Hq, R\] with R = 1"),
        ((QUERY, KEY, VISUAL), {"lse": torch.zeros(2, 2, 1)}, r"lse: expected \[B, Hq, R\] with Hq = 4"),
        ((QUERY, KEY, VISUAL), {"scale": "1"}, r"scale: expected a finite float or None, got '1' \(str\)"),
        ((QUERY, KEY, VISUAL), {"scale": True}, r"scale: expected a finite float or None, got True \(bool\)"),
        ((QUERY, KEY, VISUAL), {"scale": math.nan}, r"scale: expected a finite float or None, got nan"),
        ((QUERY, KEY, VISUAL), {"scale": -math.inf}, r"scale: expected a finite float or None, got -inf"),
        (
            (QUERY, KEY, VISUAL),
            {"scale": 10**400},
            r"scale: expected a finite float or None, got an int of 1329 bits",
        ),
        ((QUERY[..., :0], KEY[..., :0], VISUAL), {}, r"query: expected D >= 1, got shape \[2, 4, \d, 0\]"),
        ((QUERY, KEY.to("meta"), VISUAL), {}, "key: expected device cpu, got .*meta"),
        ((QUERY, KEY, VISUAL), {"causal": 1}, r"causal: expected a bool, got 1 \(int\)"),
        ((QUERY, KEY, VISUAL), {"value": KEY.half()}, "value: expected dtype torch.float32, got .*float16"),
        (
            (QUERY, KEY, VISUAL),
            {"value": KEY[:, :, 1:]},
            r"value: expected \[B, Hkv, S, Dv\] with S = 6, got shape \[2, 2, 5, 8\]",
        ),
        (
            (QUERY, KEY, VISUAL),
            {"value": KEY[:, :1]},
            r"value: expected \[B, Hkv, S, Dv\] with Hkv = 2, got shape \[2, 1, 6, 8\]",
        ),
        (
            (QUERY, KEY, VISUAL),
            {"head_reduction": "sum"},
            r"head_reduction: expected 'mean' or 'max', got 'sum' \(str\)",
        ),
        (
            (QUERY, KEY, VISUAL),
            {"head_reduction": None},
            r"head_reduction: expected 'mean' or 'max', got None \(NoneType\)",
        ),
    ],
)
def test_bad_arguments(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        visual_importance(*args, **kwargs)
