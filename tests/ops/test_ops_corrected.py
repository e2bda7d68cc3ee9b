"""Attention over what RoPE makes of it, against a float64 loop over samples, heads, rows and tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gap_kernels import corrected_importance, visual_importance
from support.naive.corrected import CLEAR, TOLERANCE, halves, make_angles, oracle
from support.naive.importance import make
from torch import Tensor
from torch.library import opcheck


def check(*arguments: Any, **options: Any) -> Tensor:
    """Compare with the oracle, and return the scores."""
    dtype = arguments[0].dtype
    expected, clear = oracle(*arguments, **options)
    assert clear > CLEAR
    scores = corrected_importance(*arguments, **options)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(scores.double(), expected, rtol=10 * tolerance, atol=tolerance)
    return scores


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=["MHA", "GQA", "MQA"])
def test_heads_and_dtypes(heads: tuple[int, int], dtype: torch.dtype) -> None:
    query, key = make((2, *heads, 7, 7, 16), dtype)
    angles = make_angles(2, 7, 16, dtype)
    rows = torch.tensor([[5, 6, -1], [6, -1, -1]])
    scores = check(
        query, key, torch.tensor([[1, 2, -1, 4], [5, 0, 2, 6]]), *angles, halves(16, 16), 2, rows=rows
    )
    assert scores[0, 2] == 0
    assert (scores > 0).sum() == 7


TURNS = {
    "halves": [-1, -2, -3, 4, 5, 6],
    "side by side": [-1, 2, -3, 4, -5, 6],
    "of one angle each": [-1, -2, -3, 1, 2, 3],
    "a part": [-1, -2, 3, 4, 0, 0],
    "nothing": [0] * 6,
    "any": [-6, 0, 3, 3, -1, 2],
}


def test_every_channel_turns_as_it_is_told() -> None:
    query, key = make((1, 3, 1, 6, 9, 6))
    visual_index, rows, angles = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 3]]), make_angles(1, 6, 6)
    found = [
        check(query, key, visual_index, *angles, torch.tensor(turns), 2, rows=rows).tolist()
        for turns in TURNS.values()
    ]
    assert len({str(scores) for scores in found}) == len(TURNS)
    none = [x[..., :0] for x in angles]
    nothing = corrected_importance(query, key, visual_index, *none, torch.zeros(6).long(), 2, rows=rows)
    assert nothing.tolist() == found[list(TURNS).index("nothing")]


def test_padding_past_scale_and_a_dtype_of_their_own_for_angles() -> None:
    query, key = make((2, 4, 2, 5, 8, 6), torch.bfloat16)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, :5] = real[1, 4] = False
    visual_index = torch.tensor([[1, 2, 3, -1], [1, 0, -1, 2]])
    scores = check(
        query, key, visual_index, *make_angles(2, 5, 4), halves(4, 6), 1, attention_mask=real, scale=0.8
    )
    assert scores[0, 0] == scores[1, 0] == 0


def test_no_rotation_divides_by_the_root_of_the_channels() -> None:
    """Ones that are not turned have the product D, over its root."""
    query, key = make((2, 4, 2, 6, 6, 16))
    cos, visual_index = torch.ones(2, 6, 16), torch.tensor([[0, 1, 3], [4, 2, 0]])
    scores = corrected_importance(query, key, visual_index, cos, torch.zeros_like(cos), halves(16, 16), 4)
    torch.testing.assert_close(4 * scores, visual_importance(query, key, visual_index))


def equal_heads(heads: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, cos = torch.zeros(1, heads, rows, 4), torch.ones(1, rows, 4)
    return query, query.clone(), cos, torch.zeros_like(cos)


LLAMA = halves(4, 4)


def test_equal_heads_go_to_the_lower_one_and_nan_is_the_most() -> None:
    query, key, cos, sin = equal_heads(3, 3)
    visual_index = torch.tensor([[0, 1]])
    key[0, 0, 0, 0] = key[0, 1, 1, 0] = 4.0  # what these heads see most of, in other order
    query[0, :2, 2, 0] = 1.0
    first = corrected_importance(query[:, :1], key[:, :1], visual_index, cos, sin, LLAMA, 1)
    second = corrected_importance(query[:, 1:2], key[:, 1:2], visual_index, cos, sin, LLAMA, 1)
    assert first.flip(1).tolist() == second.tolist()
    assert first[0, 0] > first[0, 1]
    assert torch.equal(corrected_importance(query, key, visual_index, cos, sin, LLAMA, 1), first)
    both = corrected_importance(query, key, visual_index, cos, sin, LLAMA, 2)
    torch.testing.assert_close(both, (first + second) / 2)
    key[0, 2, 2, 0], query[0, 2, 2, 0] = math.nan, 1.0
    assert corrected_importance(query, key, visual_index, cos, sin, LLAMA, 1).isnan().all()


def test_where_rope_makes_nothing_of_attention() -> None:
    """A quarter turn makes vectors of ones orthogonal. A token that isn't seen has no score in spite of it."""
    query, key, cos, sin = equal_heads(1, 4)
    cos[0, :2], sin[0, :2] = 0.0, 1.0
    visual_index = torch.tensor([[0, 1, 2, -1]])
    real = torch.tensor([[True, False, True, True]])
    scores = corrected_importance(query, key, visual_index, cos, sin, LLAMA, 1, attention_mask=real)
    torch.testing.assert_close(scores, torch.tensor([[math.inf, 0.0, 1 / 6, 0.0]]))


@pytest.mark.parametrize("sizes", [(0, 3, 2), (2, 0, 2), (2, 3, 0)], ids=["samples", "tokens", "rows"])
def test_none_of_something(sizes: tuple[int, int, int]) -> None:
    batch, tokens, num_rows = sizes
    query, key = make((batch, 2, 1, 4, 4, 4))
    index, rows = torch.zeros(batch, tokens).long(), torch.zeros(batch, num_rows).long()
    angles = make_angles(batch, 4, 4)
    scores = corrected_importance(query, key, index, *angles, LLAMA, 1, rows=rows)
    assert torch.equal(scores, torch.zeros(batch, tokens))


def test_any_strides() -> None:
    query, key = make((2, 4, 2, 6, 6, 8))
    angles = make_angles(2, 6, 8)
    index, rows = torch.tensor([[0, 1, 3], [4, 2, 0]]), torch.tensor([[5, 4], [5, 3]])
    expected = corrected_importance(query, key, index, *angles, halves(8, 8), 2, rows=rows)
    turns = torch.stack([halves(8, 8)] * 2, 1)[:, 0]
    turned = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in (query, key, index, *angles, rows)]
    assert torch.equal(corrected_importance(*turned[:5], turns, 2, rows=turned[5]), expected)
    one = [x[:1] for x in angles]
    torch.testing.assert_close(
        corrected_importance(query, key, index, *(x.expand(2, -1, -1) for x in one), turns, 2, rows=rows)[:1],
        expected[:1],
    )


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full: bool) -> None:
    query, key = make((2, 4, 2, 5, 6, 8))
    angles = make_angles(2, 5, 8)
    optional = (torch.tensor([[4, -1]] * 2), torch.ones(2, 6).bool(), 0.3) if full else (None, None, None)
    arguments = (query, key, torch.tensor([[0, 1], [2, -1]]), *angles, halves(8, 8), 2, *optional)
    opcheck(torch.ops.gap_kernels.corrected_importance.default, arguments)


def test_backward_is_refused() -> None:
    query, key = make((1, 2, 2, 4, 4, 4))
    angles = make_angles(1, 4, 4)
    scores = corrected_importance(query.requires_grad_(), key, torch.tensor([[0]]), *angles, LLAMA, 1)
    with pytest.raises(RuntimeError, match=r"gap_kernels\.corrected_importance has no gradient"):
        scores.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.ones(2, 3, 6, 8)}, "query: expected a multiple of the 3 heads of key, got 4 heads"),
        ({"visual_index": torch.tensor([[5], [0]])}, r"visual_index: expected values in -1\.\.4, got 5"),
        ({"rows": torch.tensor([[-2], [0]])}, r"rows: expected values in -1\.\.4, got -2"),
        ({"cos": torch.ones(2, 6, 8)}, r"cos: expected \[B, Q, E\] with Q = 5, got shape \[2, 6, 8\]"),
        ({"sin": torch.ones(2, 5, 6)}, r"sin: expected \[B, Q, E\] with E = 8, got shape \[2, 5, 6\]"),
        ({"sin": torch.ones(2, 5, 8).half()}, "sin: expected dtype torch.float32, got"),
        ({"turns": 8}, r"turns: expected a tensor \[D\], got 8 \(int\)"),
        ({"turns": torch.zeros(6).long()}, r"turns: expected \[D\] with D = 8, got shape \[6\]"),
        ({"turns": torch.zeros(8)}, "turns: expected dtype torch.int64, got"),
        ({"turns": torch.full((8,), 9)}, r"turns: expected values in -8\.\.8, got 9"),
        ({"heads": 5}, r"heads: expected an int in 1\.\.4, got 5 \(int\)"),
        ({"heads": 0}, r"heads: expected an int in 1\.\.4, got 0 \(int\)"),
        ({"heads": None}, r"heads: expected an int in 1\.\.4, got None"),
        ({"scale": "1"}, "scale: expected a finite float or None, got"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    query, key = make((2, 4, 2, 5, 6, 8))
    cos, sin = make_angles(2, 5, 8)
    arguments = {"query": query, "key": key, "visual_index": torch.tensor([[0], [1]]), "cos": cos, "sin": sin}
    with pytest.raises(ValueError, match=message):
        corrected_importance(**arguments | {"turns": halves(8, 8), "heads": 2} | change)
