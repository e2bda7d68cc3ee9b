"""Putting rows among others: against loops in Python, and its gradient against that of PyTorch's own scatter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gap_kernels import scatter_rows
from support.naive.scatter import scattered
from torch import Tensor
from torch.library import opcheck

OP = torch.ops.gap_kernels.scatter_rows.default


def case(
    batch: int, length: int, num_rows: int, some: int, channels: int = 5, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Rows, an index in any order, with filler, of ``some`` of the rows of a base."""
    generator = torch.Generator().manual_seed(num_rows)

    def distinct(count: int, of: int) -> Tensor:
        order = torch.rand(batch, of, generator=generator).argsort(1)[:, :count]
        return torch.where(torch.rand(order.shape, generator=generator) < 0.2, -1, order)

    return {
        "values": torch.randn(batch, length, channels, generator=generator).to(dtype),
        "index": distinct(length, some),
        "num_rows": num_rows,
        "among": distinct(some, num_rows),
        "base": torch.randn(batch, num_rows, channels, generator=generator).to(dtype),
    }


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 4, 9, 6), (2, 65, 70, 68), (2, 0, 5, 3), (0, 2, 5, 3)])
@pytest.mark.parametrize("without", [(), ("among",), ("base",), ("among", "base")], ids=str)
def test_against_loops(sizes: tuple[int, int, int, int], without: tuple[str, ...]) -> None:
    given = {name: value for name, value in case(*sizes).items() if name not in without}
    found = scatter_rows(**given)
    assert torch.equal(found, scattered(**given))
    assert found.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_rows_keep_their_bits(dtype: torch.dtype) -> None:
    given = case(2, 4, 9, 6, dtype=dtype)
    given["values"][0, 0], given["base"][1, 1, 0] = math.nan, math.inf
    torch.testing.assert_close(scatter_rows(**given), scattered(**given), rtol=0, atol=0, equal_nan=True)


def test_nothing_is_put() -> None:
    """An index of filler, an empty one, and one that counts among nothing."""
    base = torch.randn(2, 4, 3)
    rows, filler = torch.full((2, 2, 3), math.nan), torch.full((2, 2), -1)
    assert torch.equal(scatter_rows(rows, filler, 4, base=base), base)
    assert torch.equal(scatter_rows(rows, filler, 4, among=filler[:, :0], base=base), base)
    assert torch.equal(scatter_rows(rows[:, :0], filler[:, :0], 4, base=base), base)
    assert not scatter_rows(rows, filler, 4).any()
    assert scatter_rows(rows, filler, 0).shape == (2, 0, 3)
    assert scatter_rows(rows[..., :0], filler, 4).shape == (2, 4, 0)


def test_strided_inputs() -> None:
    given = case(2, 4, 9, 6)
    strided = {
        "values": given["values"].transpose(1, 2).contiguous().transpose(1, 2),
        "index": given["index"].t().contiguous().t(),
        "among": torch.stack([given["among"]] * 2, -1)[..., 0],
        "base": torch.cat([given["base"][:, :1], given["base"]], 1)[:, 1:],
    }
    assert torch.equal(scatter_rows(**given | strided), scatter_rows(**given))


@pytest.mark.parametrize("with_base", [False, True])
def test_gradients_are_those_of_a_scatter(with_base: bool) -> None:
    given = case(2, 4, 9, 6, dtype=torch.float64)
    base = given["base"] if with_base else torch.zeros_like(given["base"])
    place = torch.where(given["index"] < 0, -1, given["among"].gather(1, given["index"].clamp(min=0)))
    found, expected = [], []
    for gradients in (found, expected):
        rows, under = given["values"].clone().requires_grad_(), base.clone().requires_grad_()
        if gradients is found:
            result = scatter_rows(**given | {"values": rows, "base": under if with_base else None})
        else:
            padded = torch.nn.functional.pad(under, (0, 0, 0, 1))
            target = torch.where(place < 0, 9, place)[..., None].expand_as(rows)
            result = padded.scatter(1, target, rows)[:, :-1]
        (result * torch.arange(result.numel()).view(result.shape)).sum().backward()
        gradients += [rows.grad, under.grad if with_base else None]
    for one, other in zip(found, expected, strict=True):
        assert one is other or torch.equal(one, other)


@pytest.mark.parametrize("without", [(), ("among", "base")], ids=str)
def test_opcheck(without: tuple[str, ...]) -> None:
    given = case(2, 4, 9, 6) | dict.fromkeys(without)
    given["values"].requires_grad_()
    opcheck(OP, tuple(given.values()))


def test_compile() -> None:
    given = case(2, 4, 9, 6)
    compiled = torch.compile(lambda **x: scatter_rows(**x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), scattered(**given) + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.ones(2, 4)}, r"values: expected 3 dimensions \[B, L, C\], got shape \[2, 4\]"),
        ({"values": torch.ones(2, 4, 5).int()}, "values: expected dtype .*, got"),
        ({"index": torch.ones(2, 4)}, "index: expected dtype torch.int64, got"),
        ({"index": torch.tensor([[6, 0, 1, 2]] * 2)}, "index: expected values in -1..5, got 6"),
        ({"index": torch.tensor([[0, -2, 1, 2]] * 2)}, "index: expected values in -1..5, got -2"),
        (
            {"index": torch.tensor([[0, 0, 1, 2]] * 2)},
            "index: expected distinct positions, got 0 twice in sample 0",
        ),
        ({"among": torch.full((2, 6), 9)}, "among: expected values in -1..8, got 9"),
        (
            {"among": torch.zeros(2, 6).long(), "index": torch.tensor([[0, 1, 2, 3]] * 2)},
            "among: expected distinct positions, got 0 twice in sample 0",
        ),
        ({"base": torch.ones(2, 8, 5)}, r"base: expected \[B, Q, C\] with Q = 9, got shape \[2, 8, 5\]"),
        ({"base": torch.ones(2, 9, 5).half()}, "base: expected dtype torch.float32, got"),
        ({"num_rows": None}, "num_rows: expected an int >= 0, got None"),
        ({"num_rows": -1}, r"num_rows: expected an int >= 0, got -1 \(int\)"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scatter_rows(**case(2, 4, 9, 6) | change)
