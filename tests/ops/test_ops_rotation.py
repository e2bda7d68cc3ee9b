"""Turning queries and keys back: what was rotated in a loop becomes what it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gap_kernels import unrotate
from support.naive.rotation import pairs_of, rotated
from torch import Tensor
from torch.library import opcheck

OP = torch.ops.gap_kernels.unrotate.default
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Of vectors of about 1 that are rounded when they are rotated, and when they are turned back."""


def case(
    dtype: torch.dtype = torch.float32,
    head_dim: int = 12,
    turned: int = 12,
    interleaved: bool = False,
    axes: int = 1,
    stretch: float = 1.0,
    samples: int = 2,
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """Arguments of the operator, and queries and keys before RoPE, in float64."""
    generator = torch.Generator().manual_seed(head_dim + axes)
    query, key = (
        torch.randn(2, heads, 7, head_dim, generator=generator).to(dtype).double() for heads in (4, 2)
    )
    angle = 50 * torch.randn(axes, samples, 7, turned, generator=generator, dtype=torch.float64)
    cos, sin = (stretch * function(angle[0] if axes == 1 else angle) for function in (torch.cos, torch.sin))
    pairs = pairs_of(head_dim, turned, interleaved, axes)
    given = {
        "query": rotated(query, cos, sin, pairs).to(dtype),
        "key": rotated(key, cos, sin, pairs).to(dtype),
        "cos": cos.to(dtype),
        "sin": sin.to(dtype),
        "pairs": pairs,
        "rescale": stretch != 1.0,
    }
    return given, (query, key)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"interleaved": True},
        {"turned": 8},
        {"turned": 6, "interleaved": True, "head_dim": 15},
        {"axes": 3},
        {"axes": 3, "samples": 1, "interleaved": True},
        {"samples": 1},
        {"stretch": 1.25},
        {"stretch": 0.5, "turned": 8},
    ],
    ids=str,
)
def test_a_rotation_is_taken_back(options: dict[str, Any], dtype: torch.dtype) -> None:
    given, expected = case(dtype, **options)
    for found, wanted in zip(unrotate(**given), expected, strict=True):
        assert found.dtype == dtype
        assert found.is_contiguous()
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=8 * TOLERANCE[dtype])


def test_float32_has_the_bits_of_a_rotation_by_the_negative_sine() -> None:
    """As `apply_rotary_pos_emb` of transformers computes it."""
    given, _ = case()
    cos, sin = given["cos"][:, None], -given["sin"][:, None]
    cos, sin = (torch.cat([each[..., :6], each[..., :6]], -1) for each in (cos, sin))
    for name, result in zip(("query", "key"), unrotate(**given), strict=True):
        vectors = given[name]
        half = torch.cat([-vectors[..., 6:], vectors[..., :6]], -1)
        assert torch.equal(result, vectors * cos + half * sin)


def test_cos_of_another_dtype() -> None:
    given, expected = case(torch.bfloat16)
    exact = case(torch.float32)[0]
    found = unrotate(**given | {"cos": exact["cos"], "sin": exact["sin"]})
    for one, wanted in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), wanted, rtol=0, atol=4 * TOLERANCE[torch.bfloat16])


def test_strided_inputs() -> None:
    given, _ = case(axes=3)
    strided = {
        "query": given["query"].transpose(1, 2).contiguous().transpose(1, 2),
        "key": torch.cat([given["key"]] * 2, 2)[:, :, 7:],
        "cos": torch.cat([given["cos"]] * 2, 2)[:, :, :7],
        "sin": given["sin"].transpose(1, 3).contiguous().transpose(1, 3),
        "pairs": given["pairs"].T.contiguous().T,
    }
    for one, other in zip(unrotate(**given | strided), unrotate(**given), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_nan_stays_in_its_pair_and_what_is_not_turned_keeps_its_bits() -> None:
    given, _ = case(turned=8)
    given["query"][0, 1, 2, 1], given["query"][0, 1, 3, 10] = math.nan, math.inf
    query, _ = unrotate(**given)
    assert query.isnan().nonzero().tolist() == [[0, 1, 2, 1], [0, 1, 2, 5]]
    assert torch.equal(query[..., 8:], given["query"][..., 8:])


def test_nothing_to_turn() -> None:
    given, _ = case()
    empty = {
        "query": given["query"][:0],
        "key": given["key"][:0],
        "cos": given["cos"][:0],
        "sin": given["sin"][:0],
    }
    assert unrotate(**given | empty)[1].shape == (0, 2, 7, 12)
    narrow = {"cos": given["cos"][..., :0], "sin": given["sin"][..., :0], "pairs": pairs_of(12, 0, False)}
    assert torch.equal(unrotate(**given | narrow)[0], given["query"])


@pytest.mark.parametrize("options", [{}, {"axes": 3, "stretch": 1.5}], ids=str)
def test_opcheck_and_no_gradient(options: dict[str, Any]) -> None:
    given, _ = case(**options)
    opcheck(OP, tuple(given.values()))
    with pytest.raises(RuntimeError, match=r"gap_kernels\.unrotate has no gradient"):
        unrotate(**given | {"query": given["query"].requires_grad_()})[0].sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"query": torch.ones(2, 4, 7)},
            r"query: expected 4 dimensions \[B, Hq, S, D\], got shape \[2, 4, 7\]",
        ),
        ({"key": torch.ones(2, 2, 7, 12).half()}, "key: expected dtype torch.float32, got"),
        ({"key": torch.ones(2, 2, 6, 12)}, r"key: expected \[B, Hkv, S, D\] with S = 7, got"),
        ({"key": torch.ones(2, 3, 7, 12)}, "query: expected a multiple of the 3 heads of key, got 4 heads"),
        ({"cos": torch.ones(3, 7, 12)}, r"cos: expected 2 samples or 1, got shape \[3, 7, 12\]"),
        (
            {"cos": torch.ones(1, 7, 12)},
            r"sin: expected \[B\|1, S, F\] with B\|1 = 1, got shape \[2, 7, 12\]",
        ),
        ({"cos": torch.ones(7, 12)}, r"cos: expected 3 dimensions \[B\|1, S, F\], got shape \[7, 12\]"),
        ({"sin": torch.ones(2, 7, 12).half()}, "sin: expected dtype torch.float32, got"),
        ({"pairs": torch.zeros(2, 12).long()}, "pairs: expected dtype torch.int32, got"),
        ({"pairs": torch.zeros(2, 11).int()}, r"pairs: expected \[2, D\] with D = 12, got shape \[2, 11\]"),
        ({"pairs": torch.full((2, 12), 12).int()}, "pairs: expected values in 0..11, got 12"),
        (
            {"pairs": torch.zeros(2, 12).int() - torch.tensor([[0], [2]]).int()},
            "pairs: expected values in -1..11, got -2",
        ),
        ({"rescale": 1}, r"rescale: expected a bool, got 1 \(int\)"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unrotate(**case()[0] | change)
